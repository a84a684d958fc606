"""What a lever is worth in an equal time: trainings of one processor time each, judged on cases that they did not see.

    python benchmarks/levers.py DATA OUT "l2 before" "l2" --seconds 150 --folds 0 1 --seeds 0 1

Each arm is one of `ARMS`.  Its steps are what SECONDS of the processor buy, one thread, as counted once before, where
arms take turns; set-up, one validation and predictions are not among them.  Of three folds each trains on half of the
subjects.  All others, the validation case too (it decides nothing of the image), are predicted once and as the mean
over mirror images ("flip"), and judged by this script alone: truth in SD of the brain, the prediction fitted to it by
one affine map, mean absolute error in the brain and in labelled lesions (WT); "kept" is the lesion's mean minus the
rest's, predicted over true, within -2 and 2.  Rows go to OUT/judged.csv; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import read_splits
from chiasm.methods import make_recipe
from chiasm.prediction.folders import predict
from chiasm.preparation.arrays import prepare_cohort
from chiasm.preparation.plan import read_plan
from chiasm.recipe import Recipe
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run

#: The size that was called small before, whatever a size is called now.
BEFORE = (
    "generator.fold=1",
    "generator.widths=[16, 32, 64, 128]",
    "optimiser.generator_rate=5e-4",
)
FOLDED = ("generator.fold=2", "generator.widths=[24, 48, 96, 192]", "optimiser.generator_rate=1e-3")
#: But where an arm says otherwise.
UNVARIED = (
    *(f"training.{name}_share=0" for name in ("class", "painted", "simulated")),
    "training.pretrained=none",
)
ARMS = {
    "l2 before": ("l2", BEFORE),
    "l2 folded": ("l2", FOLDED),
    "l2 folded classes": ("l2", (*FOLDED, "training.class_share=0.5")),
    "l2 folded painted": ("l2", (*FOLDED, "training.painted_share=0.5")),
    "l2 folded classes painted": ("l2", (*FOLDED, "training.class_share=0.5", "training.painted_share=0.5")),
    "l2 before classes painted": ("l2", (*BEFORE, "training.class_share=0.5", "training.painted_share=0.5")),
    "l2 folded 5e-4": ("l2", (*FOLDED, "optimiser.generator_rate=5e-4")),
    "l2 folded wide": ("l2", (*FOLDED, "generator.widths=[32, 64, 128, 256]")),
    "dual-attention before": ("dual-attention", BEFORE),
    "dual-attention folded": ("dual-attention", FOLDED),
}
FIELDS = ("arm", "fold", "seed", "steps", "case", "brain", "WT", "kept")
REFERENCE = "l2 before"
PROBES = 10  # steps that are timed of each arm, evenly over its schedule


def recipe_of(arm: str, fold: int, seed: int, steps: int) -> Recipe:
    """Return the recipe of an arm."""
    method, settings = ARMS[arm]
    asked = ["data.sources=['t1']", "data.target=t2", "split.folds=3", f"split.fold={fold}", f"training.seed={seed}"]
    asked += ["training.validations=1", "training.accelerator=cpu", f"schedule.steps={steps}"]
    return make_recipe(method, "small", {}, [*asked, *UNVARIED, *settings])


def step_costs(arms: Sequence[str], run: Path, data: Path, out: Path) -> dict[str, float]:
    """Return the seconds of the processor that a step of each arm takes, on average over its schedule.

    Arms take turns, since the same step takes twice as long beside busy neighbours; what was counted before is kept,
    and others are counted beside the first arm.
    """
    path = out / "cost.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    fresh = [arm for arm in dict.fromkeys((REFERENCE, *arms)) if arm not in known]
    if fresh:
        counted = dict.fromkeys(dict.fromkeys((REFERENCE, *fresh)), 0.0)
        plan, split = read_plan(run / "plan.toml"), read_splits(run / "splits.json").split
        cases = [case for case in find_cohort(data).cases if case.id in split.train]
        prepared, _ = prepare_cohort(cases, plan, out / "cache", warn=lambda _: None)
        learners = {}
        for arm in counted:
            recipe = recipe_of(arm, 0, 0, PROBES * 100)
            fabric = make_fabric(recipe)
            fabric.launch()
            learners[arm] = Learner(recipe, plan, prepared, fabric)
        for probe in range(PROBES):
            for arm, learner in learners.items():
                counted[arm] += timed_step(learner, 100 * probe + 50) / PROBES
        unit = known.get(REFERENCE, counted[REFERENCE]) / counted[REFERENCE]
        known |= {arm: unit * seconds for arm, seconds in counted.items()}
        path.write_text(json.dumps(known, indent=1))
    return known


def timed_step(learner: Learner, step: int) -> float:
    """Return the seconds of the processor that a step takes, right after the one before it."""
    learner.step(step - 1)
    start = time.process_time()
    learner.step(step)
    return time.process_time() - start


def time_training(begin: Callable[[], Learner], probes: Sequence[int]) -> dict[str, float]:
    """Return the seconds of the processor that a training takes to set up, and on average for a step.

    Args:
        begin: Sets the training up.
        probes: Steps that are timed, evenly over its schedule.
    """
    start = time.process_time()
    learner = begin()
    set_up = time.process_time() - start
    return {"set_up": set_up, "step": mean(timed_step(learner, probe) for probe in probes)}


def steps_within(seconds: float, cost: Mapping[str, float]) -> int:
    """Return the steps of a training that fit into a time, its set-up included."""
    return max(1, round((seconds - cost["set_up"]) / cost["step"]))


def fit(
    prediction: NDArray[np.float64], truth: NDArray[np.float64], brain: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a prediction after one affine map that fits it to the truth, and the truth; both in SD of the brain."""
    true = truth / truth[brain].std()
    slope, offset = np.polyfit(prediction[brain], true[brain], 1)
    return slope * prediction + offset, true


def judge(
    prediction: NDArray[np.float64], truth: NDArray[np.float64], brain: NDArray[np.bool_], lesion: NDArray[np.bool_]
) -> dict[str, float]:
    """Score one prediction after one affine map; see the head of this file."""
    fitted, true = fit(prediction, truth, brain)
    error, sick, rest = np.abs(fitted - true), lesion & brain, brain & ~lesion
    contrast = [image[sick].mean() - image[rest].mean() for image in (fitted, true)]
    kept = float(np.clip(contrast[0] / contrast[1], -2, 2))
    return {"brain": error[brain].mean(), "WT": error[sick].mean(), "kept": kept}


def read(path: Path) -> NDArray[np.float64]:
    """Read a volume as it lies on disk."""
    return np.asanyarray(nibabel.load(path).dataobj).astype(np.float64)  # type: ignore[attr-defined]


def judge_folder(made: Path, data: Path) -> dict[str, dict[str, float]]:
    """Judge each prediction of a folder against a cohort in the layout of BraTS."""
    found = {}
    for path in sorted(made.glob("*_t2.nii.gz")):
        case = path.name.removesuffix("_t2.nii.gz")
        truth, source, labels = (read(data / case / f"{case}_{name}.nii.gz") for name in ("t2", "t1", "seg"))
        found[case] = judge(read(path), truth, source > 0, labels > 0)
    return found


def run_arm(arm: str, fold: int, seed: int, steps: int, data: Path, out: Path) -> list[dict[str, object]]:
    """Train an arm, predict what it did not see, once and averaged over mirror images, and judge both."""
    folder = out / f"{arm.replace(' ', '-')}-{fold}-{seed}"
    told = folder / "judged.json"
    content = json.loads(told.read_text()) if told.exists() else {}
    if not content:
        start = time.process_time()
        train(data, recipe_of(arm, fold, seed, steps), folder / "run", say=lambda _: None, cache=out / "cache")
        content = {"steps": steps, "seconds": time.process_time() - start}
    for average, key in (("none", "cases"), ("flip", "flipped")):
        if key not in content:
            start, content[key] = time.process_time(), {}
            for role in ("validation", "test"):
                made = folder / f"{role}-{average}"
                predict(folder / "run", [data], made, only=role, accelerator="cpu", average=average)
                content[key] |= judge_folder(made, data)
            content[f"{key}_seconds"] = time.process_time() - start
    told.write_text(json.dumps(content))
    return [
        {"arm": arm + suffix, "fold": fold, "seed": seed, "steps": content["steps"], "case": case, **scores}
        for key, suffix in (("cases", ""), ("flipped", ", flip"))
        for case, scores in content[key].items()
    ]


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write judged cases as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def column(rows: Sequence[Mapping[str, object]], name: str) -> list[float]:
    """Return the numbers of a column."""
    return [float(str(row[name])) for row in rows]


def figures(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the cells "brain", "WT", "kept, median" and "n" of a table's row."""
    brain, lesion, kept = (column(rows, name) for name in ("brain", "WT", "kept"))
    return f"{mean(brain):.3f} | {mean(lesion):.3f} | {100 * median(kept):.0f} % | {len(rows)}"


def print_timed(heads: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> None:
    """Print a row of a table for each combination of some columns, with the mean seconds of its trainings.

    Args:
        heads: Columns, and what the table calls them.
        rows: Judged cases.
    """
    print(f"| {' | '.join(heads.values())} | brain | WT | kept, median | n | seconds |")
    print("|---" * (len(heads) + 5) + "|")
    groups: dict[tuple[str, ...], list[Mapping[str, object]]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row[head]) for head in heads)].append(row)
    for names, own in groups.items():
        print(f"| {' | '.join(names)} | {figures(own)} | {mean(column(own, 'seconds')):.0f} |")


def print_table(head: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a row of a table for each value of the column `head`, with the steps of its trainings."""
    print(f"| {head} | steps | brain | WT | kept, median | n |\n|---|---|---|---|---|---|")
    groups: dict[object, list[Mapping[str, object]]] = defaultdict(list)
    for row in rows:
        groups[row[head]].append(row)
    for name, own in groups.items():
        print(f"| {name} | {own[0]['steps']} | {figures(own)} |")


def main() -> None:
    """Run the arms, and print a table row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="+", choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--folds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    probe = plan_run(asked.data, recipe_of(REFERENCE, 0, 0, 1), asked.out / "probe", say=lambda _: None)
    costs = step_costs(asked.arms, probe.folder, asked.data, asked.out)
    steps = {arm: max(1, round(asked.seconds / costs[arm])) for arm in asked.arms}
    rows = [
        row
        for seed in asked.seeds
        for fold in asked.folds
        for arm in asked.arms
        for row in run_arm(arm, fold, seed, steps[arm], asked.data, asked.out)
    ]
    write_rows(asked.out / "judged.csv", FIELDS, rows)
    print_table("arm", rows)


if __name__ == "__main__":
    main()
