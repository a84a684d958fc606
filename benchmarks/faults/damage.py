"""Change single bits of a run's files, give the files their times back, and see what the next command makes of it.

    python benchmarks/faults/damage.py --count 250

Simulated patients and the smallest networks, on one thread.  The bits are spread evenly over the model, the plan, the
split, the recipe, the checkpoints and the prepared images of a trained run, each in a copy of its own.  A damaged
model is met by `chiasm predict`; all else by `chiasm train`, once the run has lost its model so that there is something
to do.  Each bit counts as refused (exit 2, the file named), made anew (named, the same model to the byte) or harmless
(the same model to the byte without a word, such as the 17th digit of a number that needs but 16).  The rest was used in
silence.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from chiasm.cli import main as run_command
from chiasm.simulation.phantom import write_cohort

SMALL = ["data.patch=32", "generator.widths=[4,8]", "discriminators.global_widths=[4,8]"]
SMALL += ["discriminators.local_widths=[4,4,4]", "training.batch=2", "training.validations=3"]
TRAINING = ["--source", "t1", "--target", "t2", "--size", "tiny", "--folds", "3", "--accelerator", "cpu"]
PARTS = {
    "model": "model/*",
    "plan": "plan.toml",
    "split": "splits.json",
    "recipe": "recipe.toml",
    "checkpoints": "checkpoints/*",
    "cache": "cache/*/*",
}


def main() -> None:
    """Print a line for each part, and how many bits were used in silence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        root = Path(name)
        data = write_cohort(root / "cohort", 6, 0, spacing_mm=4.0)
        train = ["train", str(data), *TRAINING, "--steps", "24", "--set", *SMALL, "-o"]
        do([*train, str(root / "run")])
        whole = model_of(root / "run")
        results: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
        for number in range(asked.count):
            part = list(PARTS)[number % len(PARTS)]
            copy = root / "copy"
            shutil.copytree(root / "run", copy)
            damaged = flip(rng, copy, PARTS[part])
            volume = next(data.rglob("*t1.nii.gz"))
            if part == "model":
                code, told = do(["predict", str(copy), str(volume), "-o", str(root / "out"), "--accelerator", "cpu"])
                same = code == 0
            else:
                shutil.rmtree(copy / "model")
                code, told = do([*train, str(copy)])
                same = code == 0 and model_of(copy) == whole
            outcome = discriminator(code, told, same, damaged, part)
            results[part][outcome] += 1
            if outcome == "used in silence":
                print(f"{part} {number}: {damaged}: exit {code}: {told[-300:]}", flush=True)
            shutil.rmtree(copy)
            shutil.rmtree(root / "out", ignore_errors=True)
        for part, found in results.items():
            print(f"{part}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())))
        wrong = sum(found["used in silence"] for found in results.values())
        print(f"{asked.count - wrong} of {asked.count} refused, made anew or harmless")


def flip(rng: random.Random, run: Path, pattern: str) -> Path:
    """Change one bit of one of the files, in place and with its old times."""
    path = rng.choice(sorted(run.glob(pattern)))
    before, at = path.stat(), rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path.relative_to(run)


def discriminator(code: int, told: str, same: bool, damaged: Path, part: str) -> str:
    """Name what came of a damage."""
    if code == 2:
        return "refused" if damaged.name in told or part in told else "used in silence"
    if not same:
        return "used in silence"
    return "made anew" if "anew" in told or "passed over" in told else "harmless"


def do(command: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed."""
    told, code = io.StringIO(), 0
    with redirect_stdout(told), redirect_stderr(told):
        try:
            run_command(command)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, told.getvalue()


def model_of(run: Path) -> dict[str, bytes]:
    """Return the files of a model."""
    return {path.name: path.read_bytes() for path in sorted((run / "model").iterdir())}


if __name__ == "__main__":
    main()
