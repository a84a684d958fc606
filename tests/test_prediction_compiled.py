"""Networks on OpenVINO and ONNX Runtime: equal to torch in float32, compiled once, kept where the user alone writes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chiasm
from chiasm.cli import main
from chiasm.errors import RecipeError, RunError
from chiasm.networks.catalogue import make_network
from chiasm.prediction import compiled, engines
from chiasm.prediction.compiled import TOLERANCE, Compiled, cache_folder, deviation
from chiasm.prediction.engines import Engine, Hardware
from chiasm.prediction.folders import predict
from chiasm.prediction.passes import Networks, synthesise_prepared
from chiasm.volumes import read_volume
from network_checks import lively
from synthetic_cohort import plan_of

TORCH = Engine.pick(Hardware("cpu", "32-true", "torch"))


def needing(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))


both = pytest.mark.parametrize("name", [needing("openvino"), needing("onnxruntime")])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let each test begin with an empty cache."""
    monkeypatch.delenv("CHIASM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chiasm" / "engines"


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix != ".lock")


def engine_of(name: str, precision: str = "32-true") -> Engine:
    return Engine.pick(Hardware("cpu", precision, name))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, padding=1)).eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def must_not_compile(*_: object) -> Any:
    raise AssertionError("compiled although the cache holds it")


@both
def test_the_default_method_predicts_as_torch_does_in_float32(
    name: str, finished_run: Path, toy_cohort: Path, tmp_path: Path, cache: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    source = toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz"
    made = {}
    for engine in ("torch", name):
        found = predict(finished_run, [source], tmp_path / engine, precision="32-true", engine=engine)
        (entry,) = found.manifest.cases
        assert entry.engine == f"{engine} {engines.installed_version(engine)}, 32-true"
        assert found.manifest.options["engine"] == engine
        made[engine] = [
            read_volume(tmp_path / engine / str(file)).array for file in (entry.image, entry.expected_error)
        ]
    for found_by, exact in zip(made[name], made["torch"], strict=True):
        assert 0 < np.abs(found_by - exact).max() <= TOLERANCE * np.ptp(exact)
    assert len(kept(cache)) == 1
    predict(finished_run, [source], tmp_path / "mean", precision="32-true", engine=name, average="flip")
    assert len(kept(cache)) == 3, "the mean's image and map took the program of one pass for theirs"
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before, "wrote into the run"


@both
@pytest.mark.parametrize(("network", "dims"), [("unet", 2), ("fcn3d", 3)])
def test_networks_of_the_literature_predict_as_torch_does_in_float32(
    name: str, network: str, dims: Any, cache: Path
) -> None:
    torch.manual_seed(0)
    generator = lively(make_network(network, in_channels=1, dims=dims, scale=1 / 16)).eval()
    rng = np.random.default_rng(0)
    mask = np.ones((37, 41, 12) if dims == 2 else (33, 34, 35), bool)
    source = rng.normal(size=(1, *mask.shape)).astype(np.float32)
    plan = plan_of(dims=dims, slices=1, patch=(32,) * dims)
    made = [
        synthesise_prepared(
            Networks(generator, model=network),
            source,
            mask,
            plan=plan,
            conditional=False,
            error_scale=0.0,
            engine=engine,
        ).prediction
        for engine in (TORCH, engine_of(name))
    ]
    assert np.abs(made[0] - made[1]).max() <= TOLERANCE * np.ptp(made[0])
    assert kept(cache)  # it was compiled, and an engine that was named is used or refuses


@both
def test_what_was_compiled_is_taken_from_the_cache_by_the_next_process(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, engine, images = small(), engine_of(name), image(3, 2, 40, 48)
    first = Compiled(engine, network, "a model")(images)
    assert cache_folder() == cache and len(kept(cache)) == 1
    for name_of in ("_export", "_export_any"):
        monkeypatch.setattr(compiled, name_of, must_not_compile)
    torch.testing.assert_close(Compiled(engine, network, "a model")(images), first, atol=0, rtol=0)
    torch.testing.assert_close(first, network(images), atol=1e-4, rtol=0)


@both
def test_another_model_other_weights_version_or_cpu_are_not_taken_for_it(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, engine, images = small(), engine_of(name), image(1, 2, 32, 32)

    def known(count: int, key: str = "a model") -> None:
        torch.testing.assert_close(Compiled(engine, network, key)(images), network(images), atol=1e-4, rtol=0)
        assert len(kept(cache)) == count

    known(1)
    known(2, "another")
    with torch.no_grad():
        network[0].weight.add_(0.1)  # type: ignore[union-attr,operator]
    known(3)
    monkeypatch.setattr(compiled, "describe_cpu", lambda: ["another CPU"])
    known(4)
    monkeypatch.setattr(engines, "installed_version", lambda _: "another version")
    known(5)


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(_: bytes) -> bytes:
    return b""


def foreign(_: bytes) -> bytes:
    return b"no network at all" * 100


@both
@pytest.mark.parametrize("spoil", [damaged, emptied, foreign])
def test_a_damaged_entry_of_the_cache_is_made_anew(name: str, spoil: Callable[[bytes], bytes], cache: Path) -> None:
    network, engine, images = small(), engine_of(name), image(1, 2, 32, 32)
    first = Compiled(engine, network, "a model")(images)
    (path,) = kept(cache)
    right = path.read_bytes()
    path.write_bytes(spoil(right))
    again = Compiled(engine, network, "a model")
    torch.testing.assert_close(again(images), first, atol=0, rtol=0)
    assert not again.failed and not engine.notes
    assert len(path.read_bytes()) > len(right) // 2


@both
def test_the_program_of_another_network_in_its_place_is_noticed(name: str, cache: Path) -> None:
    network, engine, images = small(), engine_of(name), image(1, 2, 32, 32)
    torch.manual_seed(5)
    other = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, padding=1)).eval()
    Compiled(engine, other, "a model")(images)
    (wrong,) = kept(cache)
    Compiled(engine, network, "a model")(images)
    (place,) = set(kept(cache)) - {wrong}
    place.write_bytes(wrong.read_bytes())
    torch.testing.assert_close(Compiled(engine, network, "a model")(images), network(images), atol=1e-4, rtol=0)


class Wrong(nn.Module):
    """Computes one thing for whoever exports it and another for whoever calls it, as a faulty converter would."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1] * (2 if torch.compiler.is_compiling() else 1)


@both
def test_where_an_engine_computes_something_else_torch_steps_in_unless_the_user_named_the_engine(name: str) -> None:
    images = image(1, 2, 32, 32)
    by_name = engine_of(name)
    with pytest.raises(RunError, match=f"{name} cannot compute this model"):
        Compiled(by_name, Wrong(), "a model")(images)
    chosen = Engine(by_name.device, "32-true", name=by_name.name)
    made = Compiled(chosen, Wrong(), "a model")(images)
    torch.testing.assert_close(made, images[:, :1])
    assert chosen.notes and "so torch did" in chosen.notes[0] and chosen.used.startswith("torch ")


@both
def test_a_cache_that_cannot_be_written_only_costs_time(name: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    network, images = small(), image(1, 2, 32, 32)
    torch.testing.assert_close(
        Compiled(engine_of(name), network, "a model")(images), network(images), atol=1e-4, rtol=0
    )


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_several_processes_predict_the_same_as_one(finished_run: Path, toy_cohort: Path, tmp_path: Path) -> None:
    alone = predict(finished_run, [toy_cohort], tmp_path / "alone", engine="openvino")
    spread = predict(finished_run, [toy_cohort], tmp_path / "spread", engine="openvino", runner="processes")
    assert spread.manifest.cases == alone.manifest.cases and len(alone.manifest.cases) == 6
    for entry in alone.manifest.cases:
        for file in (entry.image, entry.expected_error, entry.mask):
            assert file and (tmp_path / "alone" / file).read_bytes() == (tmp_path / "spread" / file).read_bytes()


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_the_command_says_which_engine_and_why(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("CHIASM_ENGINE")
    source = str(toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz")
    for engine, reason in (("auto", engines.FASTEST), ("torch", "named")):
        with pytest.raises(SystemExit) as done:
            main(["predict", str(finished_run), source, "-o", str(tmp_path / engine), "--engine", engine])
        assert done.value.code == 0
        told = " ".join(capsys.readouterr().out.split())
        name = "openvino" if engine == "auto" else engine
        assert f"engine: {name} {engines.installed_version(name)}, " in told and f"({reason})" in told


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_what_is_compiled_for_unasked_is_worth_it(
    finished_run: Path, toy_cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHIASM_ENGINE")
    source = read_volume(toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz")
    voxels = source.array.size
    for engine, least, name in (
        ("auto", voxels + 1, "torch"),
        ("auto", voxels // 8, "openvino"),  # what a volume is prepared to may be cropped
        ("openvino", voxels + 1, "openvino"),
    ):
        monkeypatch.setattr(engines, "WORTH_COMPILING", least)
        assert chiasm.load(finished_run, accelerator="cpu", engine=engine).predict(source).engine.startswith(name)
    assert kept(cache_folder())


def test_without_openvino_torch_is_chosen_and_what_would_be_faster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHIASM_ENGINE")
    monkeypatch.setattr(engines, "installed_version", {"torch": torch.__version__}.get)
    chosen = Engine.pick(Hardware("cpu"))
    assert chosen.name == "torch" and "pip install 'chiasm[fast]'" in chosen.announce()
    with pytest.raises(RecipeError, match="openvino is not installed") as caught:
        Engine.pick(Hardware("cpu", engine="openvino"))
    assert caught.value.reason == "not-installed" and "chiasm[fast]" in caught.value.hint


def test_an_unknown_engine_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="engine"):
        chiasm.load(tmp_path / "nothing", engine="tensorflow")


def test_a_gpu_has_no_engine_but_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed_version", lambda _: "1")
    monkeypatch.delenv("CHIASM_ENGINE")
    cuda = torch.device("cuda")
    assert engines.pick_engine("auto", cuda, "auto")[0] == "torch"
    with pytest.raises(RecipeError, match="is for networks on a CPU"):
        engines.pick_engine("openvino", cuda, "auto")


def test_a_difference_counts_as_a_share_of_its_own_channel() -> None:
    exact = np.zeros((1, 2, 4), np.float32)
    exact[0, 0, 0], exact[0, 1, 0] = 1000, 0.1
    found = exact + np.float32(0.001)
    assert deviation(found, exact) == pytest.approx(0.01, rel=1e-3)
    assert deviation(found[:, :1], exact) == np.inf
    assert np.isnan(deviation(found * np.nan, exact))
