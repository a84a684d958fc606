"""Kill train, predict and study at seeded instants, start them again, and compare what they leave.

    python benchmarks/faults/kills.py --train 20 --predict 15 --study 15

Simulated patients and the smallest networks, on one thread.  Each command is first run to its end undisturbed.  Then it
is started in an empty folder and gets a SIGKILL after a random share of the time that it took; the same command again
must end well and leave the same files, identical to the bit, and none more: no temporary and no half of anything.  Of
files that tell of time or place (`environment.json`, `done.json`, pages) only the presence is compared.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from chiasm.checksums import sha256_of
from chiasm.simulation.phantom import write_cohort

SMALL = ["data.patch=32", "generator.widths=[4,8]", "discriminators.global_widths=[4,8]"]
SMALL += ["discriminators.local_widths=[4,4,4]", "training.batch=2", "training.validations=3"]
TRAINING = ["--source", "t1", "--target", "t2", "--size", "tiny", "--folds", "3", "--accelerator", "cpu"]
STUDY = """
data = "{data}"
source = ["t1"]
target = "t2"
arms = ["A1", "A7"]
folds = 2
only_folds = [0]
steps = 24
size = "tiny"
set = ["training.accelerator=cpu", {settings}]
"""

#: Files that tell of time, of the machine or of the folder that they lie in.
TIMED = (
    "environment.json",
    "done.json",
    "study.json",
    "predictions.json",
    "plan.toml",
    "asked.json",
    "times.json",
    "progress.html",
)
PAGES = (".html", ".md", ".svg")  # which quote them


def main() -> None:
    """Print a line for each kill, and how many of each command were without a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=20)
    parser.add_argument("--predict", type=int, default=15)
    parser.add_argument("--study", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        root = Path(name)
        data = write_cohort(root / "cohort", 6, 0, spacing_mm=4.0)
        (root / "study.toml").write_text(STUDY.format(data=data, settings=", ".join(f'"{one}"' for one in SMALL)))
        run = root / "train"
        commands: dict[str, list[str]] = {
            "train": ["train", str(data), *TRAINING, "--steps", "24", "--set", *SMALL],
            "predict": ["predict", str(run), str(data), "--accelerator", "cpu"],
            "study": ["study", str(root / "study.toml")],
        }
        good = 0
        for verb, command in commands.items():
            good += try_kills(verb, command, root, getattr(asked, verb), random.Random(f"{asked.seed} {verb}"))
        print(f"{good} of {asked.train + asked.predict + asked.study} kills without a trace")


def try_kills(verb: str, command: Sequence[str], root: Path, count: int, rng: random.Random) -> int:
    """Kill a command `count` times, each in a folder of its own; return how often nothing showed it afterwards."""
    start = time.monotonic()
    finish(command, root / verb)
    took, whole, good = time.monotonic() - start, contents(root / verb), 0
    for number in range(count):
        out, after = root / f"{verb}-{number}", rng.uniform(0.2, 1.0) * took
        killed = kill(command, out, after)
        left = len(list(out.rglob(".chiasm-*")))
        finish(command, out)
        wrong = differences(whole, contents(out))
        good += not wrong
        when = f"killed after {after:5.2f} s, {left} temporaries" if killed else "was faster"
        print(f"{verb} {number + 1}: {when}; {'differs: ' + ', '.join(wrong) if wrong else 'identical'}", flush=True)
        shutil.rmtree(out)
    print(f"{verb}: {good} of {count} ({took:.1f} s undisturbed)", flush=True)
    return good


def started(command: Sequence[str], out: Path) -> subprocess.Popen[str]:
    """Start a command; what it prints can be read from its stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "chiasm.cli", *command, "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(command: Sequence[str], out: Path, after: float) -> bool:
    """Kill a command after some seconds; return whether it was still running."""
    process = started(command, out)
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


def finish(command: Sequence[str], out: Path) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: If it fails.
    """
    process = started(command, out)
    told, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(told)


def contents(folder: Path) -> dict[Path, str]:
    """Return the sha256 of every file of a folder; of those that tell of time, only that they are there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder): "" if is_timed(path) else sha256_of(path) for path in files}


def differences(whole: dict[Path, str], found: dict[Path, str]) -> list[str]:
    """Return the files that are missing, too many or other than they should be."""
    return sorted(str(path) for path in whole.keys() | found.keys() if whole.get(path) != found.get(path))


def is_timed(path: Path) -> bool:
    """Tell whether a file may differ between two runs; those of a model may not."""
    return path.parent.name != "model" and (path.name in TIMED or path.suffix in PAGES)


if __name__ == "__main__":
    main()
