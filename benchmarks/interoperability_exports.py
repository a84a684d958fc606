"""What other programs make of our exports: a tiny network is trained, exported in each form, and run without chiasm.

`interoperability.py` writes the table: the largest difference of their image and
expected error from chiasm's, as a share of its range, and what the validator of
BIDS says of our derivatives.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("CHIASM_ENGINE", "torch")  # compiling costs a tiny network more than it saves

import nibabel
import numpy as np
from interoperability_readers import SECONDS, of_package

import chiasm
from chiasm.bids import derive_participants
from chiasm.methods import make_recipe
from chiasm.prediction.export import export
from conftest import QUICK
from synthetic_cohort import write_brats

ABSENT = "not here"
#: Forms of `chiasm export`, with the package that runs them.
FORMS: Mapping[str, str] = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch", "monai-bundle": "monai"}
#: Runs a script or a module where chiasm cannot be imported.
ALONE = "import runpy, sys; sys.modules['chiasm'] = None; "
SCRIPT = ALONE + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
MODULE = ALONE + "runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)"


def table() -> list[str]:
    """Return the lines of the table of exports."""
    lines = ["| what | tool | measured |", "|---" * 3 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cohort = write_brats(place / "cohort", 6)
        run = place / "run"
        chiasm.train(cohort, make_recipe("A7", "tiny", QUICK), run, say=lambda _: None)
        source = next(cohort.glob("*1/*_t1.nii.gz"))
        for form, package in FORMS.items():
            found = of_package(package)()
            said = ABSENT if found is None else _deviation(run, source, form, place / form)
            lines.append(_row(f"`chiasm export --to {form}`", f"{package} {found or ''}", said))
        validator = of_package("bids-validator-deno")()
        said = ABSENT if validator is None else _validated(run, cohort, place)
        lines.append(_row("`chiasm bids`", f"bids-validator-deno {validator or ''}", said))
    return lines


def _row(what: str, tool: str, said: str) -> str:
    print(what, tool, said, flush=True)
    return f"| {what} | {tool.strip()} | {said} |"


def _alone(words: Sequence[str | Path], folder: Path) -> None:
    command = [sys.executable, "-c", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=5 * SECONDS, cwd=folder)


def _deviation(run: Path, source: Path, form: str, out: Path) -> str:
    """Predict without chiasm from an export, and compare with chiasm's prediction."""
    made = export(run, out, form)
    if form == "monai-bundle":
        words = [MODULE, "run", "--config_file", "configs/inference.json", "--source_files", f"['{source}']"]
        _alone([*words, "--output_prefix", "eval/p1"], out)
        stem = out / "eval" / "p1"
    else:
        stem = out / "made"
        _alone([SCRIPT, made.script, source, "-o", stem], out)
    wanted = chiasm.load(run, accelerator="cpu", precision="32-true", engine="torch").predict(source)
    worst = 0.0
    for name, volume in {"t2": wanted.image, "expected-error": wanted.expected_error}.items():
        if volume is not None:
            image = nibabel.load(f"{stem}_{name}.nii.gz")
            apart = np.abs(np.asarray(image.dataobj) - volume.array).max() / np.ptp(volume.array)
            placed = np.abs(image.affine - volume.geometry.affine).max()
            worst = max(worst, float(apart), float(placed))
    return f"{worst:.0e} of the range; the same grid"


def _validated(run: Path, cohort: Path, place: Path) -> str:
    """Derive one subject and count what the validator says."""
    raw = place / "raw"
    anat = raw / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for modality in ("t1", "t2"):
        shutil.copy(next(cohort.glob(f"*1/*_{modality}.nii.gz")), anat / f"sub-01_{modality.upper()}w.nii.gz")
    about = {"Name": "made", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (raw / "dataset_description.json").write_text(json.dumps(about))
    (raw / "README").write_text("Made for a measurement.")
    derive_participants(raw, place / "derived", run)
    words = [Path(sys.executable).with_name("bids-validator-deno"), "--format", "json", place / "derived"]
    if not words[0].is_file():
        words[0] = Path(shutil.which("bids-validator-deno") or "bids-validator-deno")
    said = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=SECONDS)
    severities = [issue["severity"] for issue in json.loads(said.stdout)["issues"]["issues"]]
    return f"{severities.count('error')} errors, {severities.count('warning')} warnings"
