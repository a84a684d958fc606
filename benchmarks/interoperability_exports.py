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
from pathlib import Path

os.environ.setdefault("CHIASM_ENGINE", "torch")  # compiling costs a tiny network more than it saves

from exports import FORMS, deviations, predict_alone
from interoperability_readers import SECONDS, of_package

import chiasm
from chiasm.bids import derive_participants
from chiasm.methods import make_recipe
from chiasm.prediction.export import export
from conftest import QUICK
from synthetic_cohort import write_brats

ABSENT = "not here"


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


def _deviation(run: Path, source: Path, form: str, out: Path) -> str:
    """Predict without chiasm from an export, and compare with chiasm's prediction."""
    made = export(run, out, form)
    stem = predict_alone(made.script, form, source, out)
    wanted = chiasm.load(run, accelerator="cpu", precision="32-true", engine="torch").predict(source)
    return f"{max(value for _, value in deviations(wanted, stem, 't2')):.0e} of the range; the same grid"


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
