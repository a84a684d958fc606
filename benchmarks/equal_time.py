"""Steps that each arm of a study can do in an equal time, as variants for another study file.

    python benchmarks/equal_time.py studies/systems.toml OUT --seconds 40

Each arm is trained twice on the study's first fold, briefly and at least three
times as long, with one thread.  What the longer training took beyond the shorter,
five seconds or more, is the cost of a step: set-up, preparation and validations,
which both have, fall out of it; critics and later stages are in.
Time is that of the processor, so that other programs do not lengthen it; with
one thread and an idle core it is the time on the wall.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from chiasm.recipe import Recipe
from chiasm.studies.jobs import find_cases, list_jobs
from chiasm.studies.study_file import data_folder, read_study
from chiasm.studies.work import simulate
from chiasm.training.run import train

STEPS = 20  # of the shorter training
ROUNDS = 1  # likewise, where a step is a round over all patches
LEAST_SECONDS = 5.0  # that the longer one takes more


def spent(recipe: Recipe, steps: int, data: Path, folder: Path, cache: Path) -> float:
    """Train for a few steps, and tell the seconds of the processor."""
    schedule = recipe.schedule.model_copy(update={"steps": steps})
    start = time.process_time()
    train(data, recipe.model_copy(update={"schedule": schedule}), folder, say=lambda _: None, cache=cache)
    return time.process_time() - start


def main() -> None:
    """Print a variant for each arm of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0)
    asked = parser.parse_args()
    study, out = read_study(asked.study), asked.out
    if study.phantom is not None:
        simulate(study.phantom, data_folder(study, out))
    one = study.model_copy(
        update={"only_folds": (0,), "seeds": study.seeds[:1], "warmup": "own", "expected_error": None}
    )
    jobs = [job for job in list_jobs(one, out, find_cases(study, out)) if job.kind == "arm"]
    data, cache = data_folder(study, out), out / "cache"
    torch.set_num_threads(1)
    with threadpool_limits(1):
        spent(jobs[0].recipe, 1, data, out / "first", cache)  # fills the cache
        for job in jobs:
            least = ROUNDS if job.recipe.optimiser.kind == "admm" else STEPS
            brief = spent(job.recipe, least, data, out / f"{job.key}-{least}", cache)
            beyond, count = 0.0, least
            while beyond < LEAST_SECONDS:
                count *= 3
                beyond = spent(job.recipe, count, data, out / f"{job.key}-{count}", cache) - brief
            cost = beyond / (count - least)
            steps = max(1, round(asked.seconds / cost))
            base, *own = study.variants.get(job.arm, (job.arm,))
            settings = [
                base,
                *(each for each in own if not each.startswith("schedule.steps=")),
                f"schedule.steps={steps}",
            ]
            named = ", ".join(f'"{each}"' for each in settings)
            print(f'"{base}, timed" = [{named}]  # {1000 * cost:.0f} ms a step', flush=True)


if __name__ == "__main__":
    main()
