"""Kill workers of a study with SIGKILL at jobs and steps that a seed chooses, and count what is lost.

    python benchmarks/faults/lost_workers.py OUT --seed 0

A small study of simulated patients runs twice: in one process, and with `--runner processes` while this script kills.
Of ten trainings five are killed once and two twice, after as many steps as the seed says.  Expected: what was killed
once has the numbers of the study without kills, what was killed twice is named in the report, and the command exits
with 3.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from chiasm.cli import main as chiasm
from chiasm.evaluation.rows import read_evaluation
from chiasm.storage import write_toml
from chiasm.studies.jobs import find_cases, list_jobs
from chiasm.studies.study_file import read_study

STEPS = 12
ONCE, TWICE = 5, 2  # trainings that are killed so often
STUDY = {
    "phantom": {"subjects": 4, "seed": 1, "spacing_mm": 4.0},
    "source": ["t1"],
    "target": "t2",
    "arms": ["A1"],
    "folds": 2,
    "seeds": [0, 1, 2, 3, 4],
    "warmup": "own",
    "size": "tiny",
    "steps": STEPS,
    "set": ["data.patch=32", "generator.widths=[4, 8]", "training.validations=1", "training.accelerator=cpu"],
}


@dataclass
class Fate:
    """What is still to happen to a job: after how many steps it is killed, and how many times."""

    name: str
    step: int
    kills: int


class Killer(threading.Thread):
    """Kills each process that works on a job whose time has come."""

    def __init__(self, jobs: Path, fates: dict[str, Fate]) -> None:
        super().__init__(daemon=True)
        self.jobs, self.fates, self.ended = jobs, fates, threading.Event()
        self.killed: set[int] = set()

    def run(self) -> None:
        """Look at all workers a hundred times a second."""
        while not self.ended.wait(0.01):
            for process, key in workers(self.jobs):
                fate = self.fates.get(key)
                if fate and fate.kills and process not in self.killed and self.steps_of(key) >= fate.step:
                    os.kill(process, signal.SIGKILL)
                    self.killed.add(process)
                    fate.kills -= 1
                    print(f"killed: {fate.name}, pid {process}, at step {fate.step} or soon after", flush=True)

    def steps_of(self, key: str) -> int:
        """Count the training steps that a job has noted."""
        log = self.jobs / key / "log.jsonl"
        return log.read_text().count('"kind": "step"') if log.exists() else 0


def workers(jobs: Path) -> Iterator[tuple[int, str]]:
    """Yield each child of this process with the job whose folder it holds."""
    for child in psutil.Process().children(recursive=True):
        try:
            for file in child.open_files():
                path = Path(file.path)
                if path.name in (".lock", "log.jsonl") and path.parent.parent == jobs:
                    yield child.pid, path.parent.name
                    break
        except psutil.Error:  # it ended meanwhile
            continue


def run(words: list[str]) -> int:
    """Run the command here and return its exit code."""
    try:
        chiasm(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def numbers(folder: Path) -> dict[int | None, list[str]]:
    """Return the rows of a study by fold and seed, baselines apart."""
    found: dict[int | None, list[str]] = {}
    for row in read_evaluation(folder):
        if row.method == "A1":
            found.setdefault(10 * row.fold + row.seed, []).append(repr(row))
    return {job: sorted(rows) for job, rows in found.items()}


def main() -> None:
    """Print a line for each kill and one count; exit 1 where anything is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    file, whole, killed = asked.out / "study.toml", asked.out / "whole", asked.out.resolve() / "killed"
    write_toml(file, STUDY)
    start = time.monotonic()
    code = run(["study", str(file), "-o", str(whole)])
    if code:
        sys.exit(f"the study without kills ended with exit code {code}")

    study = read_study(file)
    jobs = [job for job in list_jobs(study, killed, find_cases(study, killed)) if job.kind == "arm"]
    rng = random.Random(asked.seed)
    chosen = rng.sample(jobs, ONCE + TWICE)
    fates = {
        job.key: Fate(job.name, rng.randrange(STEPS - 1), 1 if number < ONCE else 2)
        for number, job in enumerate(chosen)
    }
    killer = Killer(killed / "jobs", fates)
    killer.start()
    code = run(["study", str(file), "-o", str(killed), "--runner", "processes"])
    killer.ended.set()
    killer.join()

    gone = {10 * job.fold + job.seed for job in chosen[ONCE:]}
    before, after = numbers(whole), numbers(killed)
    alike = sum(after.get(job) == rows for job, rows in before.items() if job not in gone)
    page = (killed / "report.html").read_text()
    named = sum(f"failed: {job.name}: its worker was lost twice" in page for job in chosen[ONCE:])
    kills = ONCE + 2 * TWICE - sum(fate.kills for fate in fates.values())
    print(f"{kills} of {ONCE + 2 * TWICE} kills done")
    print(f"{alike} of {len(jobs) - TWICE} other jobs have the numbers of the study without kills")
    print(f"{named} of {TWICE} jobs that were killed twice are named in the report; exit code {code}")
    print(f"{time.monotonic() - start:.0f} s")
    found = (kills, alike, named, code, gone & after.keys())
    sys.exit(found != (ONCE + 2 * TWICE, len(jobs) - TWICE, TWICE, 3, set()))


if __name__ == "__main__":
    main()
