"""Put bad cases among nine good ones, and compare what the good ones become with a cohort that has no bad ones.

    python benchmarks/faults/bad_cases.py --count 30

Simulated patients and the smallest networks, on one thread.  The nine are trained on, predicted and evaluated first.
Then the same is done with as many bad cases beside them as asked for, once with faults of the source and once of the
target.  Every bad case must be named, the model must be the same to the byte, and so must every good prediction.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from chiasm.cli import main as run_command
from chiasm.simulation.phantom import write_cohort

GOOD = 9
SMALL = ["data.patch=32", "generator.widths=[4,8]", "discriminators.global_widths=[4,8]"]
SMALL += ["discriminators.local_widths=[4,4,4]", "training.batch=2", "training.validations=3"]
TRAINING = [
    "--source",
    "t1",
    "--target",
    "t2",
    "--size",
    "tiny",
    "--folds",
    "3",
    "--steps",
    "24",
    "--accelerator",
    "cpu",
]

Array = NDArray[np.float32]


def two_voxels(array: Array) -> Array:
    """Keep two voxels alone, as of a scan that was not written to its end."""
    few = np.zeros_like(array)
    few[tuple(side // 2 for side in array.shape)] = 50
    few[tuple(side // 2 + 1 for side in array.shape)] = 60
    return few


def flipped(content: bytes, place: int) -> bytes:
    """Flip a bit in the middle of a file; near the end of a run of zeros it might change nothing that is read."""
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


#: What is done to the voxels of an image; the last ones are done to its file.
FAULTS: Mapping[str, Callable[[Array], Array]] = {
    "two voxels": two_voxels,
    "one value": lambda array: np.full_like(array, 7),
    "one value inside": lambda array: np.where(array == array[0, 0, 0], array, 7).astype(np.float32),
    "NaN": lambda array: np.where(array > np.median(array), np.nan, array).astype(np.float32),
    "a slice less": lambda array: array[..., :-1],
    "two slices": lambda array: array[..., :2],
    "infinity": lambda array: np.where(array == array.max(), np.inf, array).astype(np.float32),
}
FILES: Mapping[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: content[:0],
    "a bit flipped": lambda content: flipped(content, len(content) // 2),
}


def main() -> None:
    """Print a line for each cohort, and how many bad cases were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bad-cases-") as name:
        root = Path(name)
        patients = write_cohort(root / "patients", GOOD + asked.count, asked.seed, spacing_mm=4.0)
        cases = sorted(
            path.name for path in patients.iterdir() if path.is_dir() and (path / f"{path.name}_t1.nii.gz").exists()
        )
        rng = random.Random(asked.seed)
        good = sorted(rng.sample(cases, GOOD))
        bad = [one for one in cases if one not in good]
        alone = build(root / "alone", patients, good)
        before = work(alone, root / "work-alone")
        for modality in ("t1", "t2"):
            mixed = build(root / f"mixed-{modality}", patients, cases)
            for number, case in enumerate(bad):
                spoil(mixed / case / f"{case}_{modality}.nii.gz", number)
            after = work(mixed, root / f"work-{modality}")
            named = sum(f"case {case}" in after.told for case in bad)
            differing = [file for file in before.files if after.files.get(file) != before.files[file]]
            same = f"{len(before.files) - len(differing)} of {len(before.files)}"
            print(
                f"{modality}: {named} of {len(bad)} bad cases named, exit {after.code}; "
                f"{same} files of model and predictions are the same to the byte"
                + (f", not {', '.join(differing[:3])}" if differing else "")
            )


class Outcome:
    """What came of a cohort: what was printed, the exit code of training, and files of model and predictions."""

    def __init__(self, told: str, code: int, files: Mapping[str, bytes]) -> None:
        self.told, self.code, self.files = told, code, files


def build(folder: Path, patients: Path, cases: list[str]) -> Path:
    """Copy some patients into a cohort of their own."""
    for case in cases:
        shutil.copytree(patients / case, folder / case)
    return folder


def spoil(path: Path, number: int) -> None:
    """Give a file one of the faults in turn."""
    faults = [*FAULTS, *FILES]
    fault = faults[number % len(faults)]
    if fault in FILES:
        path.write_bytes(FILES[fault](path.read_bytes()))
        return
    image = nib.load(path)
    array = FAULTS[fault](np.asanyarray(image.dataobj).astype(np.float32))
    nib.save(nib.Nifti1Image(array, image.affine), path)


def work(data: Path, folder: Path) -> Outcome:
    """Train and predict as commands do."""
    told, code = command("train", data, *TRAINING, "-o", folder / "run", "--set", *SMALL)
    more, _ = command("predict", folder / "run", data, "-o", folder / "made", "--only", "test")
    kept = {}
    for place in (folder / "run" / "model", folder / "made"):
        for path in sorted(place.rglob("*.nii.gz") if place.name == "made" else place.rglob("*")):
            if path.is_file():
                kept[path.relative_to(folder).as_posix()] = path.read_bytes()
    return Outcome(told + more, code, kept)


def command(*words: str | Path) -> tuple[str, int]:
    """Run the command in this process; return what it printed and its exit code."""
    out = io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            run_command(list(map(str, words)))
    except SystemExit as ended:
        return out.getvalue(), int(ended.code or 0)
    return out.getvalue(), 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
