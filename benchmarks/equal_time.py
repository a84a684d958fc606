"""Steps that each method of a study can do in an equal time, as variants to paste into a study file.

    python benchmarks/equal_time.py STUDY.toml COHORT --seconds 30

Each arm is trained alone, on one thread, twice from the start with few steps; the difference in the processor's
seconds is what its steps cost, its discriminators' share included, and its set-up does not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from chiasm.evidence.jobs import Study, read_study
from chiasm.training.run import train

FEW, MORE = 20, 60


def seconds_a_step(study: Study, arm: str, data: Path, cache: Path) -> float:
    """Train an arm for `FEW` and for `MORE` steps and return what one more costs, in processor seconds."""
    spent = []
    for steps in (FEW, FEW, MORE):  # the first fills the cache
        changes: dict[str, object] = {
            "data.sources": study.sources,
            "data.target": study.target,
            "split.folds": study.folds,
            "schedule.steps": steps,
            "training.validations": 1,
        }
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            train(data, study.build(arm, changes), Path(folder) / "run", say=lambda _: None, cache=cache)
            spent.append(time.process_time() - start)
    return (spent[2] - spent[1]) / (MORE - FEW)


def main() -> None:
    """Print a variant for each arm of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    asked = parser.parse_args()
    study = read_study(asked.study)
    torch.set_num_threads(1)
    with threadpool_limits(1), tempfile.TemporaryDirectory() as cache:
        for arm in study.arms:
            cost = seconds_a_step(study, arm, asked.cohort, Path(cache))
            steps = round(asked.seconds / cost, -1)
            print(
                f'"{arm}, timed" = ["{arm}", "schedule.steps={steps:.0f}"]  # {1000 * cost:.1f} ms a step', flush=True
            )


if __name__ == "__main__":
    main()
