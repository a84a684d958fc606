"""The model folder: what comes back, what is refused, and what a kill leaves."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import chiasm
from chiasm.checksums import sha256_of, with_checksum
from chiasm.cli import main
from chiasm.errors import ChiasmError, RunError
from chiasm.methods import make_recipe
from chiasm.networks.generator import KNOTS
from chiasm.prediction import model as module
from chiasm.prediction.model import (
    Model,
    input_statistics,
    load_model,
    make_generator,
    make_refiner,
    save_model,
    source_channels,
)
from chiasm.prediction.model_files import CARD, NEEDED, WEIGHTS, find_model
from chiasm.preparation.plan import read_plan, write_plan
from chiasm.recipe import write_recipe
from chiasm.storage import read_toml, write_toml
from chiasm.volumes import read_volume
from full_disk import no_file_above


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Model:
    return load_model(finished_run)


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run / "model", tmp_path / "model")
    return tmp_path / "model"


def sign_again(folder: Path, **changes: object) -> None:
    """Do what somebody would who wanted a changed folder to be believed."""
    card = {name: value for name, value in read_toml(folder / CARD).items() if name != "checksum"}
    card["sha256"] = {name: sha256_of(folder / name) for name in card["sha256"] if (folder / name).exists()}
    write_toml(folder / CARD, with_checksum(card | changes))


def predictions(model: Model) -> list[torch.Tensor]:
    torch.manual_seed(0)
    source = torch.randn(1, source_channels(model.plan), 16, 16)
    assert model.local_discriminator is not None
    with torch.no_grad():
        image = model.generator(source)
        return [image, *model.local_discriminator(torch.cat([source, image], dim=1))]


def test_a_model_with_a_weight_that_is_not_a_number_is_not_written(model: Model, tmp_path: Path) -> None:
    generator = copy.deepcopy(model.generator)
    with torch.no_grad():
        next(generator.parameters()).fill_(float("inf"))
    with pytest.raises(RunError, match=r"generator.* holds NaN or infinite values") as caught:
        save_model(tmp_path / "model", replace(model, generator=generator))
    assert caught.value.reason == "not-finite" and not (tmp_path / "model").exists()


def test_a_model_comes_back_with_the_same_predictions_and_records(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    for a, b in zip(predictions(model), predictions(again), strict=True):
        assert torch.equal(a, b)
    assert (again.recipe, again.plan, again.calibration) == (model.recipe, model.plan, model.calibration)
    assert again.error_scale == model.error_scale and again.sha256 == sha256_of(tmp_path / "model" / CARD)


def test_a_model_without_discriminator_and_calibration_comes_back_so(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "model", replace(model, local_discriminator=None, calibration=None))
    again = load_model(tmp_path / "model")
    assert again.local_discriminator is None and again.calibration is None


def test_a_flipped_bit_is_refused_in_every_file(folder: Path) -> None:
    rng = np.random.default_rng(0)
    names = sorted(path.name for path in folder.iterdir())
    assert set(names) > NEEDED and CARD in names
    for name in names:
        whole = (folder / name).read_bytes()
        for place in {0, len(whole) - 1, *rng.integers(len(whole), size=6).tolist()}:
            content = bytearray(whole)
            content[place] ^= 1 << int(rng.integers(8))
            if name == CARD and read_or_none(bytes(content), folder) == read_toml(folder / CARD):
                continue  # white space
            (folder / name).write_bytes(content)
            with pytest.raises(RunError, match=None if name == CARD else name):
                load_model(folder)
            (folder / name).write_bytes(whole)
    load_model(folder)


def read_or_none(content: bytes, folder: Path) -> dict[str, object] | None:
    path = folder.with_name("card.toml")
    path.write_bytes(content)
    try:
        return read_toml(path)
    except RunError:
        return None


def test_a_changed_number_in_the_card_is_refused(folder: Path) -> None:
    card = read_toml(folder / CARD)
    write_toml(folder / CARD, card | {"error_scale": card["error_scale"] * 2})
    with pytest.raises(RunError, match="changed since") as caught:
        load_model(folder)
    assert caught.value.reason == "damaged" and caught.value.path == folder / CARD


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_missing_file_is_refused_even_where_the_card_does_not_name_it(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(RunError, match=name):
        load_model(folder)
    sign_again(folder)
    with pytest.raises(RunError, match=CARD):
        load_model(folder)


def test_a_calibration_that_the_card_does_not_name_is_not_used(model: Model, folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "plain", replace(model, calibration=None))
    shutil.copy(folder / "calibration.json", tmp_path / "plain")
    assert load_model(tmp_path / "plain").calibration is None


@pytest.mark.parametrize("number", [2, "1", None])
def test_another_format_is_refused_and_named(number: object, folder: Path) -> None:
    sign_again(folder, **({"format": number} if number else {}))
    if number is None:
        card = read_toml(folder / CARD)
        write_toml(folder / CARD, {name: value for name, value in card.items() if name != "format"})
    with pytest.raises(RunError, match=r"expected 1\)") as caught:
        load_model(folder)
    assert caught.value.reason == "format"


class Trap:
    """Runs something when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "torchscript", "cut", "other network"])
def test_what_stands_in_place_of_weights_is_refused_and_never_run(kind: str, folder: Path, tmp_path: Path) -> None:
    path, proof = folder / WEIGHTS, tmp_path / "it ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(proof)))
    elif kind == "torch":
        torch.save({"generator": Trap(proof)}, path)
    elif kind == "torchscript":
        archive = torch._C.PyTorchFileWriter(str(path))  # what torch.jit.save writes, without its deprecation
        archive.write_record("data.pkl", pickle.dumps(Trap(proof)), len(pickle.dumps(Trap(proof))))
        archive.write_end_of_file()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        from safetensors.torch import save_file

        save_file({"generator.stem": torch.zeros(3)}, path)
    sign_again(folder)
    for load in (load_model, chiasm.load):
        with pytest.raises(RunError, match=r"weights\.safetensors") as caught:
            load(folder)
        assert caught.value.reason == "damaged"
    assert not proof.exists()


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


@pytest.mark.parametrize("last", range(18))
def test_a_kill_at_any_moment_leaves_the_old_model_or_the_new_one(
    last: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_model(folder, replace(model, error_scale=1.0))
    save_model(folder, replace(model, error_scale=2.0))
    calls = []

    def mortal(function):  # type: ignore[no-untyped-def]
        def run(*arguments, **options):  # type: ignore[no-untyped-def]
            if len(calls) >= last:
                raise Killed
            calls.append(function)
            return function(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (module, "sha256_of"), (shutil, "rmtree")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        with suppress(Killed):
            save_model(folder, replace(model, error_scale=3.0))
    assert load_model(folder).error_scale in (2.0, 3.0)
    assert load_model(tmp_path).error_scale in (2.0, 3.0)
    save_model(folder, replace(model, error_scale=4.0))
    assert load_model(folder).error_scale == 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # and nothing is left over


def test_a_full_disk_keeps_the_old_model_and_leaves_nothing_partial(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_model(folder, model)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ChiasmError, match=r"No space left.*MiB free"):
            save_model(folder, replace(model, error_scale=9.0))
    assert load_model(folder).error_scale == model.error_scale
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_real_limit_on_file_size_is_told_as_one(model: Model, tmp_path: Path) -> None:
    with no_file_above(2_000), pytest.raises(ChiasmError, match="cannot be written: File too large"):
        save_model(tmp_path / "model", model)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def own_model(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose network is a user's own class, `toy_networks:Plain`."""
    settings = model.recipe.generator.model_copy(update={"network": "toy_networks:Plain", "options": {"width": 3}})
    recipe = model.recipe.model_copy(update={"generator": settings})
    folder = tmp_path_factory.mktemp("own") / "model"
    save_model(folder, replace(model, recipe=recipe, generator=make_generator(recipe, model.plan)))
    return folder


@pytest.mark.parametrize("trust", [(), ("toy_networks:TwoChannels",), "toy_networks:Plain2", "x:toy_networks:Plain"])
def test_a_model_of_a_users_own_class_is_refused_without_that_name(trust: Any, own_model: Path) -> None:
    with pytest.raises(RunError, match=r"not part of chiasm.*--trust toy_networks:Plain") as caught:
        chiasm.load(own_model, trust=trust)
    assert caught.value.reason == "untrusted"


@pytest.mark.parametrize("trust", ["toy_networks:Plain", ["a:B", "toy_networks:Plain"]])
def test_a_class_that_the_user_names_is_loaded(trust: Any, own_model: Path) -> None:
    assert type(chiasm.load(own_model, trust=trust).model.generator).__name__ == "Plain"


def test_the_command_predicts_with_a_class_of_others_only_where_it_is_named(
    own_model: Path, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = next(toy_cohort.rglob("*_t1.nii.gz"))
    words = ["predict", str(own_model), str(scan), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as refused:
        main(words)
    told = capsys.readouterr().err
    assert refused.value.code == 2 and "--trust toy_networks:Plain" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as done:
        main([*words, "--trust", "toy_networks:Plain"])
    assert not done.value.code and list((tmp_path / "out").glob("*_t2.nii.gz"))


def test_weights_of_other_shapes_are_refused_before_memory_is_taken(model: Model, folder: Path) -> None:
    widths = {"widths": (4096,) * 8}
    recipe = model.recipe.model_copy(update={"generator": model.recipe.generator.model_copy(update=widths)})
    write_recipe(folder / "recipe.toml", recipe)
    sign_again(folder)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RunError, match=r"no weights of this model's networks .*generator\."):
        load_model(folder)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_split_that_the_card_does_not_name_is_never_opened(folder: Path, toy_cohort: Path, tmp_path: Path) -> None:
    (folder / "splits.json").unlink()
    sign_again(folder)
    os.mkfifo(folder / "splits.json")  # whoever opens it waits for ever
    made = chiasm.predict(folder, [next(iter(sorted(toy_cohort.rglob("*_t1.nii.gz"))))], tmp_path / "made")
    assert [entry.role for entry in made.manifest.cases] == ["new"]


def test_a_model_that_changed_in_its_folder_is_loaded_again(folder: Path, toy_cohort: Path, tmp_path: Path) -> None:
    scan = next(iter(sorted(toy_cohort.rglob("*_t1.nii.gz"))))
    before = chiasm.predict(folder, [scan], tmp_path / "before")
    plan = read_plan(folder / "plan.toml")
    write_plan(folder / "plan.toml", replace(plan, target_background=plan.target_background - 7))
    sign_again(folder)
    after = chiasm.predict(folder, [scan], tmp_path / "after")
    corners = [read_volume(one.folder / one.manifest.cases[0].image).array[0, 0, 0] for one in (before, after)]
    assert corners[1] == corners[0] - 7
    with pytest.raises(RunError, match="the model was"):
        chiasm.predict(folder, [scan], tmp_path / "before")


def test_networks_that_make_no_finite_numbers_write_no_image(folder: Path, toy_cohort: Path, tmp_path: Path) -> None:
    weights = {
        name: value * 1e38 if value.is_floating_point() else value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS)
    sign_again(folder)
    made = chiasm.predict(folder, [next(iter(sorted(toy_cohort.rglob("*_t1.nii.gz"))))], tmp_path / "made")
    assert [problem.reason for problem in made.problems] == ["not-finite"] and not made.done
    assert not list((tmp_path / "made").glob("*.nii.gz"))


def test_loading_a_model_imports_neither_torchs_compiler_nor_scipys_filters(folder: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom chiasm.prediction.folders import load_model\n"
        "load_model(Path(sys.argv[1]))\n"
        "assert not {'sympy', 'scipy.ndimage', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_without_a_model_says_which_kind_of_folder_it_is(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no model"):
        find_model(tmp_path)
    shutil.copy(finished_run / "recipe.toml", tmp_path)
    with pytest.raises(RunError, match="no finished model yet"):
        find_model(tmp_path)
    assert find_model(finished_run) == finished_run / "model" == find_model(finished_run / "model")


def test_a_model_is_found_from_inside_its_folder(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run / "model")
    assert find_model(Path()) == Path()


def test_channels_and_their_statistics_follow_sources_and_slices(model: Model) -> None:
    plan = replace(
        model.plan,
        sources=("a", "b"),
        source_kinds=model.plan.source_kinds * 2,
        source_ranges=model.plan.source_ranges * 2,
        source_histograms=model.plan.source_histograms * 2,
        source_limits=model.plan.source_limits * 2,
        input_mean=(1.0, 2.0, 3.0),
        input_sd=(4.0, 5.0, 6.0),
        slices=3,
    )
    assert source_channels(plan) == 6
    mean, sd = input_statistics(plan)
    assert (mean.tolist(), sd.tolist()) == ([1, 1, 1, 2, 2, 2, 3], [4, 4, 4, 5, 5, 5, 6])
    solid = replace(plan, dims=3, slices=1, patch=(32, 32, 32))
    assert source_channels(solid) == 2 and input_statistics(solid)[0].tolist() == [1, 2, 3]
    ranked = replace(solid, histogram=True)
    assert source_channels(ranked) == 4
    mean, sd = input_statistics(ranked)
    assert (mean.tolist(), sd.tolist()) == ([1, 2, 0, 0, 3], [4, 5, 1, 1, 6])


def test_an_untrained_lookup_generator_is_the_plans_lookup(model: Model) -> None:
    plan = replace(model.plan, lookup=((-1.0, 0.0, 2.0), (3.0, 1.0, -4.0)), slices=3)
    generator = make_generator(make_recipe("A1", "tiny", {"generator.skip": "lookup"}), plan).eval()
    source = torch.linspace(-1, 2, 3 * 16 * 16).reshape(1, 3, 16, 16)
    expected = np.interp(source[0, 1].numpy(), *plan.lookup)  # of the slice in the middle
    step = 7 / (KNOTS - 1)  # the generator's table has knots of its own
    np.testing.assert_allclose(generator(source)[0, 0].detach().numpy(), expected, atol=step)
    assert isinstance(generator, nn.Module)


def test_a_model_with_a_refiner_comes_back_with_it_and_is_refused_without(model: Model, tmp_path: Path) -> None:
    recipe = model.recipe.model_copy(
        update={"generator": model.recipe.generator.model_copy(update={"refiner": (4, 8)})}
    )
    refiner = make_refiner(recipe, model.plan).eval()
    for parameter in refiner.last.parameters():
        nn.init.normal_(parameter)
    save_model(tmp_path / "model", replace(model, recipe=recipe, refiner=refiner))
    again = load_model(tmp_path / "model").refiner
    assert again is not None and not again.training
    seen = torch.randn(1, source_channels(model.plan) + 2, 16, 16)
    assert torch.equal(again(seen), refiner(seen)) and refiner(seen).any()
    save_model(tmp_path / "model", replace(model, recipe=recipe))
    with pytest.raises(RunError, match="holds no weights of this model's networks"):
        load_model(tmp_path / "model")


def test_the_lookup_of_a_generator_with_ranks_is_of_the_first_sources_middle_slice(model: Model) -> None:
    plan = replace(model.plan, lookup=((-1.0, 0.0, 2.0), (3.0, 1.0, -4.0)), slices=3, histogram=True)
    generator = make_generator(make_recipe("A14", "tiny", {"generator.skip": "lookup"}), plan).eval()
    source = torch.linspace(-1, 2, 6 * 16 * 16).reshape(1, 6, 16, 16)
    expected = np.interp(source[0, 1].numpy(), *plan.lookup)
    np.testing.assert_allclose(generator(source)[0, 0].detach().numpy(), expected, atol=7 / (KNOTS - 1))
