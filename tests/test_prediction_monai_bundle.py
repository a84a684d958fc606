"""`chiasm export --to monai-bundle`: MONAI's own checks accept it, and MONAI makes with it what chiasm predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import chiasm
from chiasm.checksums import sha256_of
from chiasm.cli import main
from chiasm.errors import RunError
from chiasm.methods import make_recipe
from chiasm.prediction.export import export
from chiasm.training.cross_fitting import train
from conftest import QUICK
from synthetic_cohort import stored_as, write_brats

bundle = pytest.importorskip("monai.bundle")

CLOSE = 1e-4  # of the range of what is made

#: `python -m monai.bundle` where chiasm cannot be imported.
ALONE = (
    "import runpy, sys; sys.modules['chiasm'] = None; "
    "runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)"
)

TENSOR = {
    "type": "object",
    "required": [
        "type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"
    ],
    "properties": {
        "type": {"enum": ["image", "tuples", "probabilities", "array"]},
        "format": {"enum": ["magnitude", "hounsfield", "kspace", "raw", "labels", "classes", "segmentation"]},
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 2, "maxItems": 3},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}  # fmt: skip
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
#: The required fields of the bundle specification, in words of our own; the original would be downloaded.
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "required": [
        "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
        "description", "authors", "copyright", "network_data_format", "schema", "changelog",
    ],
    "properties": {
        **{name: {"type": "string", "pattern": r"^\d+\.\d+"} for name in ("version", "monai_version", "numpy_version")},
        "pytorch_version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "changelog": {"type": "object", "minProperties": 1},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}},
        **{name: {"type": "string", "minLength": 1} for name in ("task", "description", "authors", "copyright")},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "t1-to-t2"
    with pytest.raises(SystemExit) as done:
        main(["export", str(finished_run), "--to", "monai-bundle", "-o", str(folder)])
    assert done.value.code == 0
    return folder


def verify(folder: Path, schema: Path) -> None:
    metadata = folder / "configs" / "metadata.json"
    bundle.verify_metadata(str(metadata), str(schema), hash_val=sha256_of(schema), hash_type="sha256")


def test_monai_accepts_the_metadata_and_would_find_what_is_missing(exported: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    verify(exported, schema)
    content = json.loads((exported / "configs" / "metadata.json").read_text())
    del content["network_data_format"]["inputs"]["image"]["num_channels"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="num_channels"):
        verify(tmp_path, schema)


CONFIGS = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json"}


def into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go into a bundle, whose scripts are imported from there."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(("channels", "fits"), [(None, True), (7, False)])
def test_monai_finds_the_network_as_the_metadata_describes_it(
    channels: int | None, fits: bool, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(exported, monkeypatch)
    override = {} if channels is None else {"_meta_::network_data_format::outputs::pred::num_channels": channels}
    if fits:
        bundle.verify_net_in_out("network_def", **CONFIGS, device="cpu", n=3, **override)
    else:
        with pytest.raises(ValueError, match="output channel number"):
            bundle.verify_net_in_out("network_def", **CONFIGS, device="cpu", n=3, **override)


def test_monai_makes_what_chiasm_predicts_without_chiasm(exported: Path, finished_run: Path, toy_cohort: Path) -> None:
    pytest.importorskip("fire")
    source = next(toy_cohort.glob("*1/*_t1.nii.gz"))
    words = ["--config_file", "configs/inference.json", "--source_files", f"['{source}']", "--output_prefix", "eval/p1"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, "run", *words],
        cwd=exported, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    check_made(exported / "eval", finished_run, source, ["t2", "expected-error"])


def check_made(folder: Path, run: Path, source: Path, names: list[str]) -> None:
    """Compare the images of a bundle with what chiasm makes by torch in float32."""
    wanted = chiasm.load(run, accelerator="cpu", precision="32-true", engine="torch").predict(source)
    made = {"t2": wanted.image, "expected-error": wanted.expected_error, "spread": wanted.spread}
    volumes = {name: volume for name, volume in made.items() if volume is not None}
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"p1_{name}.nii.gz" for name in names)
    assert list(volumes) == names
    for name, volume in volumes.items():
        image = nib.load(folder / f"p1_{name}.nii.gz")
        extent = float(np.ptp(volume.array))
        assert extent > 0 and np.abs(np.asarray(image.dataobj) - volume.array).max() <= CLOSE * extent
        np.testing.assert_allclose(image.affine, nib.load(source).affine)


@pytest.mark.filterwarnings("ignore:parsing config_file")  # it says that a bundle is code
def test_a_run_of_models_of_three_planes_is_one_bundle_with_its_mirror_images_and_its_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = write_brats(tmp_path / "cohort", 3, shape=(24, 30, 22), spacing=(1.0, 1.0, 1.0))
    changes = {**QUICK, "split.folds": "auto", "split.models": 3, "training.validations": 1, "schedule.steps": 8}
    spatial = {"generator.skip": "none", "generator.average": "flip"}  # at its start no copy of a look-up
    recipe = make_recipe("l2-expected-error", "tiny", {**changes, **spatial})
    run, folder = tmp_path / "run", tmp_path / "out"
    train(cohort, recipe, run, say=lambda _: None)
    export(run, folder, "monai-bundle")
    source = stored_as("LIP", next(cohort.glob("*1/*_t1.nii.gz")), tmp_path / "t1.nii.gz")
    into(folder, monkeypatch)
    bundle.run(config_file="configs/inference.json", source_files=[str(source)], output_prefix="eval/p1")
    check_made(folder / "eval", run, source, ["t2", "expected-error", "spread"])
    card = json.loads((folder / "scripts" / "model.json").read_text())
    assert card["network_includes"]["mean_with_mirror_image"] is True
    assert [network["plane"] for network in card["networks"]] == ["axial", "coronal", "sagittal"]
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert "3 networks see axial, coronal and sagittal slices" in metadata["description"]
    bundle.verify_net_in_out("network_def", **CONFIGS, device="cpu", n=3)  # the first network


def test_a_bundle_is_written_again_and_files_of_somebody_else_stay(
    exported: Path, finished_run: Path, tmp_path: Path
) -> None:
    assert export(finished_run, exported, "monai-bundle").network == exported / "models" / "model.pt2"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("mine")
    with pytest.raises(RunError, match=r"configs/metadata\.json, which was not written by chiasm"):
        export(finished_run, tmp_path, "monai-bundle")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["configs", "metadata.json"]
