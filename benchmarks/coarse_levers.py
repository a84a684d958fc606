"""What a lever is worth on patients of sites that no training saw, at 2 mm and in half a minute of one core each.

    python benchmarks/coarse_levers.py DATA OUT painted "painted and simulated" --steps 2100 --seeds 0 --also PHANTOMS
    python benchmarks/coarse_levers.py DATA OUT "painted and simulated" pretrained --steps 2400 --fine
    python benchmarks/coarse_levers.py DATA OUT l2-expected-error dual-attention --seconds 330 --fine
    python benchmarks/coarse_levers.py DATA OUT "painted and simulated" pretrained --task t2 flair --steps 1894 --fine

DATA is a folder in the layout of BraTS, whose subjects are tested two at a time, in the order of their names; all
others train, and none validates.  The task is T1 to T2, or --task SOURCE... TARGET, one for each OUT.  Each arm is one
of `ARMS`, so many steps of its method at 2 mm, predicted as the mean over mirror images; with --fine at 1 mm, predicted
once.  With --seconds each gets the steps that fit into so much time of one thread, timed over its schedule.
`levers.judge` scores them on the prepared grid; subjects of PHANTOMS are scored by the first fold alone, and only those
with a lesion.  Rows go to OUT/judged.csv; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from levers import judge, print_timed, steps_within, time_training, write_rows

from chiasm.cohorts.cases import Case, Cohort
from chiasm.cohorts.discovery import find_cohort
from chiasm.methods import make_recipe
from chiasm.metrics.ranking import auroc, spearman
from chiasm.prediction.engines import Engine, pick_precision
from chiasm.preparation.arrays import PreparedCase, prepare_cohort
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run_planning import plan_run

COARSE = ("data.spacing_mm=2", "data.patch=64", "generator.widths=[24, 48, 96]", "generator.average=flip")
PRETRAINED = (
    *("training.class_share=0.5", "training.painted_share=0.5"),
    *("training.simulated_share=0.25", "training.pretrained=auto"),
)
ARMS: dict[str, tuple[str, ...]] = {
    "plain": ("training.class_share=0", "training.painted_share=0"),
    "painted": ("training.class_share=0.5", "training.painted_share=0.5"),
    "painted, lesions twice": (
        *("training.class_share=0.5", "training.painted_share=0.5"),
        *("loss.lesion=2", "training.transplant_share=0.25"),
    ),
    "simulated": ("training.class_share=0.5", "training.painted_share=0", "training.simulated_share=0.5"),
    "painted and simulated": (
        *("training.class_share=0.5", "training.painted_share=0.5"),
        "training.simulated_share=0.25",
    ),
    "pretrained": PRETRAINED,
    "shaded": (*PRETRAINED, "training.shaded_share=0.5"),
    "l2-expected-error": PRETRAINED,
    "dual-attention": (*PRETRAINED, "attention.gate=false"),  # no case validates, which would open the gate
}
METHODS = ("l2-expected-error", "dual-attention")  # arms of this name; all others are of method l2
PROBES = 20  # steps that are timed, evenly over a schedule of 50 times as many
FIELDS = ("arm", "fold", "seed", "cohort", "case", "steps", "seconds", "brain", "WT", "kept", "rho", "rho_WT", "auroc")


class Folders(NamedTuple):
    """Where real cases lie, where everything goes, and where simulated patients lie, if any do; and the task."""

    data: Path
    out: Path
    also: Path | None
    fine: bool
    task: tuple[str, ...] = ("t1", "t2")  # sources, and the target last


class Effort(NamedTuple):
    """The steps of a training, or the seconds of one thread that they are to fit into."""

    steps: int
    seconds: float | None


def recipe_of(arm: str, seed: int, steps: int, folders: Folders) -> Recipe:
    """Return the recipe of an arm."""
    *sources, target = folders.task
    asked = [f"data.sources={sources}", f"data.target={target}", "split.folds=1", "split.validation=0"]
    asked += [f"training.seed={seed}", "training.validations=1", "training.accelerator=cpu", f"schedule.steps={steps}"]
    asked += ["training.pretrained=none", "training.simulated_share=0", "training.shaded_share=0"]
    grid = ("generator.average=none",) if folders.fine else COARSE
    return make_recipe(arm if arm in METHODS else "l2", "small", {}, [*asked, *grid, *ARMS[arm]])


def plan_fold(fold: int, folders: Folders) -> tuple[Plan, Cohort]:
    """Plan for all subjects but two, which get the role of test cases."""
    cohort = find_cohort(folders.data)
    tested = sorted(case.id for case in cohort.cases)[2 * fold : 2 * fold + 2]
    roles = tuple(replace(case, split="test" if case.id in tested else "train") for case in cohort.cases)
    fixed = replace(cohort, cases=roles)
    recipe = recipe_of("plain", 0, 1, folders)
    return plan_run(fixed, recipe, folders.out / f"plan-{fold}", say=lambda _: None).plan, fixed


def score(learner: Learner, case: PreparedCase) -> dict[str, float]:
    """Predict a case as a run would, and judge it."""
    maps = learner.maps(case, Engine(learner.fabric.device, pick_precision("auto", "cpu")))
    mask, labels, truth = np.asarray(case.mask), np.asarray(case.labels), np.asarray(case.target).astype(float)
    found = judge(maps.prediction.astype(float), truth, mask, labels > 0)
    if maps.raw_error is not None:
        error, inside = np.abs(maps.prediction - truth), (labels > 0) & mask
        found |= {
            "rho": spearman(maps.raw_error[mask], error[mask]),
            "rho_WT": spearman(maps.raw_error[inside], error[inside]),
            "auroc": auroc(maps.raw_error[mask], error[mask] >= np.quantile(error[mask], 0.9)),
        }
    return {name: float(value) for name, value in found.items()}


def count_steps(arm: str, plan: Plan, cases: Sequence[PreparedCase], seconds: float, folders: Folders) -> int:
    """Count the steps of an arm that fit into a time of one thread; timed once."""
    path = folders.out / f"cost-{arm.replace(', ', '-').replace(' ', '-')}.json"
    if not path.exists():
        recipe = recipe_of(arm, 0, 50 * PROBES, folders)
        probes = [50 * probe + 26 for probe in range(PROBES)]
        path.write_text(json.dumps(time_training(lambda: Learner(recipe, plan, cases, make_fabric(recipe)), probes)))
    return steps_within(seconds, json.loads(path.read_text()))


def run_arm(arm: str, fold: int, seed: int, effort: Effort, folders: Folders) -> list[dict[str, object]]:
    """Train an arm on a fold, and judge it on cases that it did not see."""
    steps, seconds = effort
    much = steps if seconds is None else f"{seconds:g}s"
    kept = folders.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{fold}-{seed}-{much}.json"
    if not kept.exists():
        plan, cohort = plan_fold(fold, folders)
        by_role = {
            role: prepare([case for case in cohort.cases if case.split == role], plan, folders.out)
            for role in ("train", "test")
        }
        if seconds is not None:
            steps = count_steps(arm, plan, by_role["train"], seconds, folders)
        also = _with_lesion(folders.also) if folders.also is not None and fold == 0 else []
        recipe = recipe_of(arm, seed, steps, folders)
        fabric = make_fabric(recipe)
        fabric.launch()
        start = time.process_time()
        learner = Learner(recipe, plan, by_role["train"], fabric)
        for step in range(steps):
            learner.step(step)
        named = {"arm": arm, "fold": fold, "seed": seed, "steps": steps}
        named["seconds"] = round(time.process_time() - start, 1)
        scored = [("real", case) for case in by_role["test"]]
        scored += [("simulated", case) for case in prepare(also, plan, folders.out)]
        rows = [{**named, "cohort": cohort, "case": case.id, **score(learner, case)} for cohort, case in scored]
        kept.write_text(json.dumps(rows))
    found: list[dict[str, object]] = json.loads(kept.read_text())
    return found


def prepare(cases: Sequence[Case], plan: Plan, out: Path) -> Sequence[PreparedCase]:
    """Prepare cases, and name those that cannot be."""
    prepared, problems = prepare_cohort(cases, plan, out / "cache", warn=print)
    for problem in problems:
        print(problem.line)
    return prepared


def _with_lesion(folder: Path) -> list[Case]:
    """Return simulated patients with a tumour."""
    kinds = {name: note["lesion"] for name, note in json.loads((folder / "cohort.json").read_text())["cases"].items()}
    return [case for case in find_cohort(folder).cases if kinds[case.id] in ("high", "low")]


def main() -> None:
    """Run the arms, and print a row of a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="+", choices=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--folds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--also", type=Path)
    parser.add_argument("--fine", action="store_true")
    parser.add_argument("--task", nargs="+", default=["t1", "t2"], metavar="CONTRAST")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    folders = Folders(asked.data, asked.out, asked.also, asked.fine, tuple(asked.task))
    rows = [
        row
        for fold in asked.folds
        for arm in asked.arms
        for seed in asked.seeds
        for row in run_arm(arm, fold, seed, Effort(asked.steps, asked.seconds), folders)
    ]
    write_rows(asked.out / "judged.csv", FIELDS, rows)
    print_timed({"arm": "arm", "cohort": "cases"}, rows)


if __name__ == "__main__":
    main()
