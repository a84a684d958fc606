"""Measure what the checks cost a good run: CPU time of train, predict and evaluate, against an earlier build.

    git worktree add /tmp/before f63e0fb
    python benchmarks/faults/cost.py --before /tmp/before/src --pairs 3

Simulated patients and the same recipe for both builds (size tiny, which is the same network in both), on one thread, in
turn: before, now, before, now.  Each command
is a process of its own; its CPU time (user and system) is what the operating system counted.  The ratio of each pair is
printed for each command and for all three together, then the median.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import chiasm
from chiasm.simulation.phantom import write_cohort

TRAINING = ["--source", "t1", "--target", "t2", "--size", "tiny", "--folds", "4", "--accelerator", "cpu"]


def main() -> None:
    """Print a line for each pair and command, and the median of each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="Folder `src` of the earlier build.")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    now = Path(chiasm.__file__).parents[1]
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="cost-") as name:
        root = Path(name)
        data = write_cohort(root / "cohort", asked.subjects, 0, spacing_mm=2.0)
        for pair in range(asked.pairs):
            builds = {"before": asked.before, "now": now}
            spent = [work(source, data, root / f"{pair}-{build}", asked.steps) for build, source in builds.items()]
            for part in (*spent[0], "all"):
                before, after = (sum(one.values()) if part == "all" else one[part] for one in spent)
                ratios.setdefault(part, []).append(after / before)
                print(f"pair {pair}, {part:8}: {before:6.1f} s before, {after:6.1f} s now, ratio {after / before:.3f}")
    print("median: " + ", ".join(f"{part} {median(values):.3f}" for part, values in ratios.items()))


def work(source: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    """Train, predict and evaluate with one build; return the CPU seconds of each."""
    run, made, scored = folder / "run", folder / "made", folder / "scored"
    return {
        "train": seconds(source, "train", data, *TRAINING, "--steps", str(steps), "-o", run),
        "predict": seconds(source, "predict", run, data, "-o", made, "--only", "test"),
        "evaluate": seconds(source, "evaluate", made, data, "-o", scored),
    }


def seconds(source: Path, *words: str | Path) -> float:
    """Run a command of a build; return its CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "chiasm.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
