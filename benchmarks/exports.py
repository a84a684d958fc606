"""How closely exported models make what chiasm makes of a scan: each form, run where chiasm cannot be imported.

    python benchmarks/exports.py RUN SCAN.nii.gz                    # a model, or a run of several, as it averages
    python benchmarks/exports.py RUN SCAN.nii.gz --average none     # without the mean with the mirror image
    python benchmarks/exports.py RUN RUN_2 SCAN.nii.gz --forms onnx openvino

Each number is the largest difference of a voxel from what `chiasm.load` makes by torch in float32, as a share of the
range of that image.  The exports compute in float32, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np

import chiasm
from chiasm.prediction.export import export
from chiasm.prediction.synthesis import Synthesis

SECONDS = 3600
#: Forms of `chiasm export`, with the package that runs them.
FORMS: Mapping[str, str] = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch", "monai-bundle": "monai"}
#: Runs a script or a module where chiasm cannot be imported.
ALONE = "import runpy, sys; sys.modules['chiasm'] = None; "
SCRIPT = ALONE + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
MODULE = ALONE + "runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)"


def predict_alone(script: Path, form: str, source: Path, out: Path) -> Path:
    """Predict by an export without chiasm; returns what the names of its files begin with."""
    if form == "monai-bundle":
        words = [MODULE, "run", "--config_file", "configs/inference.json", "--source_files", f"['{source.resolve()}']"]
        _run([*words, "--output_prefix", "eval/p1"], out)
        return out / "eval" / "p1"
    _run([SCRIPT, script, source.resolve(), "-o", out / "made"], out)
    return out / "made"


def _run(words: Sequence[str | Path], folder: Path) -> None:
    command = [sys.executable, "-c", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS, cwd=folder)


def deviations(wanted: Synthesis, stem: Path, target: str) -> Iterator[tuple[str, float]]:
    """Compare each image of an export with chiasm's: name, largest difference as a share of the range."""
    named = {target: wanted.image, "expected-error": wanted.expected_error, "spread": wanted.spread}
    for name, volume in named.items():
        if volume is None:
            continue
        image = nibabel.load(f"{stem}_{name}.nii.gz")
        if np.abs(image.affine - volume.geometry.affine).max() > 1e-4:
            raise SystemExit(f"{name}: lies elsewhere")
        yield name, float(np.abs(np.asarray(image.dataobj) - volume.array).max() / np.ptp(volume.array))


def main() -> None:
    """Measure each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, help="Runs, then one scan.")
    parser.add_argument("--average", default="auto")
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    asked = parser.parse_args()
    *runs, scan = asked.places
    predictor = chiasm.load(runs, accelerator="cpu", precision="32-true", engine="torch", average=asked.average)
    wanted = predictor.predict(scan)
    print(f"{len(predictor.models)} models, average {predictor.average}, {wanted.image.array.shape} voxels", flush=True)
    for form in asked.forms:
        with tempfile.TemporaryDirectory() as folder:
            made = export(runs, Path(folder) / form, form, average=asked.average)
            stem = predict_alone(made.script, form, scan, Path(folder) / form)
            found = deviations(wanted, stem, predictor.model.plan.target)
            print(f"{form}: {', '.join(f'{name} {value:.1e}' for name, value in found)}", flush=True)


if __name__ == "__main__":
    main()
