"""The main job on simulated patients: offline, without data, in minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chiasm.errors import unknown
from chiasm.locks import locked
from chiasm.methods import make_recipe
from chiasm.prediction.folders import predict
from chiasm.progress import StepProgress
from chiasm.reports.evaluation import evaluate
from chiasm.simulation.phantom import write_cohort
from chiasm.sizes import Changes
from chiasm.training.run import train

#: Task to (source, target, layout of the cohort).
TASKS = {"t1-t2": ("t1", "t2", "brats"), "ct-mr": ("ct", "mr", "synthrad")}

#: How many subjects, at which effort: the whole demo, and the quick one.
EFFORTS: dict[bool, tuple[int, Changes]] = {
    False: (12, {"schedule.steps": 1500, "split.folds": 4, "training.lesion_share": 0.4}),
    True: (5, {"schedule.steps": 200, "split.folds": 5, "training.validations": 2}),
}


def run_demo(
    out: Path, *, task: str, quick: bool, seed: int, say: Callable[[str], None], progress: StepProgress | None = None
) -> Path:
    """Simulate a cohort, train on it, predict its test cases, evaluate and report.

    Every stage resumes: the same call again goes on where it was stopped.

    Args:
        out: Folder for cohort, run, predictions and evaluation.
        task: A name of `TASKS`.
        quick: Fewer subjects and steps.
        seed: Of patients, weights and batches.
        say: Called with lines for the user.
        progress: Called after each training step.

    Returns:
        The report's path.

    Raises:
        RecipeError: If there is no such task.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    source, target, layout = TASKS[task]
    subjects, changes = EFFORTS[quick]
    folder = out / f"{task}{'-quick' if quick else ''}-{seed}"
    with locked(folder):
        say(f"simulating {subjects} patients")
        cohort = write_cohort(folder / "cohort", subjects, seed, layout=layout)
        data: Changes = {"data.sources": (source,), "data.target": target, "training.seed": seed}
        train(cohort, make_recipe("A7", "tiny", {**data, **changes}), folder / "run", say=say, progress=progress)
        predict(folder / "run", [cohort], folder / "predictions", only="test")
        scored = evaluate(folder / "predictions", cohort, folder / "evaluation")
        for line in scored.headlines:
            say(line)
    return scored.report
