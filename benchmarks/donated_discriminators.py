"""What discriminators that learnt from many patients of other hospitals are worth to a cohort of six.

    chiasm phantom -o PATIENTS --subjects 200 --seed 41 --spacing 3
    python benchmarks/donated_discriminators.py PATIENTS OUT --seeds 0 1 2 3 4

The donor is A7, trained on all patients of two hospitals.  Each receiver learns from six patients of the two others,
other ones for each seed, and is tested on 28 patients of these, the same for all seeds.  Arms of one seed share
the steps of the generator alone; then their discriminators begin with random weights, or with those of the donor
("donated"), without its optimisers, and all steps go on as in the studies; "fixed" ones do not learn from the six.
Steps are equal.  Scores of cases go to OUT/seed-N/ARM/evaluation.csv; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from coarse_levers import prepare

from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.discovery import find_cohort
from chiasm.evaluation.rows import Row, is_evaluation, read_evaluation, write_evaluation
from chiasm.evaluation.statistics import Declared, compare_methods, summarise_methods
from chiasm.methods import make_recipe
from chiasm.prediction.engines import Engine, pick_precision
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training.checkpoints import save_checkpoint
from chiasm.training.learner import Learner
from chiasm.training.loop import learn, make_fabric, validate
from chiasm.training.run_planning import plan_run
from chiasm.training.session import LearningCases, Session

DONORS = ("east", "west")  # hospitals
DONATED = ("global_discriminator", "local_discriminator")
TESTED, TRAINED, VALIDATED = 28, 6, 4  # patients of the others; those who are tested are the same for all seeds
STEPS = 1000
SCHEDULE = ("schedule.generator_alone=0.3", "schedule.discriminators_alone=0.3", "training.validations=3")
FIXED = ("optimiser.discriminator_rate=1e-9",)
#: Method, what its discriminators begin with, and its own settings.
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "A3b": ("A3b", "random", ()),
    "A7": ("A7", "random", ()),
    "A7 donated": ("A7", "donated", ()),
    "A7 fixed": ("A7", "fixed", FIXED),
}
AS_GIVEN = "as given"  # the donor's discriminators before they learn from the six
PAIRS = (("A7 donated", "A7"), ("A7 donated", "A3b"), ("A7 fixed", "A7"), ("A7 fixed", "A3b"), ("A7", "A3b"))
REGIONS = ("mask", "healthy", "WT")


Weights = dict[str, dict[str, torch.Tensor]]  # of networks, by name


class Setting(NamedTuple):
    """What a training learns from and is tested on."""

    plan: Plan
    cases: LearningCases
    tested: Sequence[PreparedCase]


def recipe_of(method: str, seed: int, own: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a training."""
    asked = ["data.sources=['t1']", "data.target=t2", "training.accelerator=cpu", "split.folds=1"]
    asked += ["split.validation=0.05", f"training.seed={seed}", f"schedule.steps={STEPS}"]
    return make_recipe(method, "tiny", {}, [*asked, *SCHEDULE, *own])


def settle(cohort: Cohort, recipe: Recipe, place: Path) -> Setting:
    """Plan for a cohort, and prepare it."""
    run = plan_run(cohort, recipe, place / "plan", say=lambda _: None)
    train, validation, test = (
        prepare([case for case in cohort.cases if case.id in getattr(run.split, role)], run.plan, place.parent)
        for role in ("train", "validation", "test")
    )
    return Setting(run.plan, LearningCases(train, validation), test)


def go_on(
    recipe: Recipe, setting: Setting, folder: Path, start: Path | None = None, until: int | None = None
) -> Learner:
    """Train in a folder, from a warm-up if there is one; what was trained before is not trained again."""
    fabric = make_fabric(recipe)
    fabric.launch()
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(fabric, lambda _: None)
    learner = learn(recipe, setting.plan, setting.cases, folder, session, start=start, until=until)
    assert isinstance(learner, Learner)
    return learner


def train_donor(cohort: Cohort, out: Path) -> Weights:
    """Return the weights of the discriminators that many patients have taught."""
    path = out / "donor.pt"
    if not path.exists():
        recipe, place = recipe_of("A7", 0), out / "donor"
        donor = go_on(recipe, settle(cohort, recipe, place), place)
        torch.save({name: donor.trainables.bare(name).state_dict() for name in DONATED}, path)
    weights: Weights = torch.load(path, weights_only=True)
    return weights


def donate(donor: Weights, learner: Learner) -> None:
    """Let the discriminators be the donor's, with the receiver's own statistics of its images."""
    for name in DONATED:
        network = learner.trainables.bare(name)
        own = {key: value for key, value in network.state_dict().items() if key.startswith("standardise")}
        network.load_state_dict(donor[name] | own)


def score(learner: Learner, cases: Sequence[PreparedCase], arm: str, seed: int) -> list[Row]:
    """Score the images and the confidence of a training on each of some cases."""
    rows, engine = [], Engine(learner.fabric.device, pick_precision("auto", "cpu"))
    for case in cases:
        found, _ = validate(learner, [case], engine)
        mask = np.asarray(case.mask)
        share = float((np.asarray(case.labels) > 0)[mask].mean())
        errors = {"mask": found["mae"], "healthy": (found["mae"] - share * found.get("lesion_mae", 0)) / (1 - share)}
        errors |= {"WT": found["lesion_mae"]} if share else {}
        rows += [Row(case.id, 0, seed, arm, region, "mae", error, "SD", "") for region, error in errors.items()]
        known = [name for name in ("auroc_lesion", "weight_ratio") if name in found]
        rows += [Row(case.id, 0, seed, arm, "mask", name, found[name], "1", "") for name in known]
    return rows


def divide(found: Cohort) -> tuple[Cohort, Cohort]:
    """Return the patients of the donor's hospitals, and those of the others."""
    gives = [case.site in DONORS for case in found.cases]
    giving = tuple(case for case, its in zip(found.cases, gives) if its)
    others = tuple(case for case, its in zip(found.cases, gives) if not its)
    return replace(found, cases=giving), replace(found, cases=others)


def receivers_of(others: Cohort, seed: int) -> Cohort:
    """Return the patients whom one seed trains on, validates on and tests, with these roles."""
    first = TESTED + (TRAINED + VALIDATED) * seed
    own = others.cases[first : first + TRAINED + VALIDATED]
    if len(own) < TRAINED + VALIDATED:
        raise SystemExit(f"{others.root}: too few patients of other hospitals than {' and '.join(DONORS)} for {seed=}")
    roles = {"test": others.cases[:TESTED], "train": own[:TRAINED], "validation": own[TRAINED:]}
    return replace(others, cases=tuple(replace(case, split=role) for role, some in roles.items() for case in some))


def run_seed(seed: int, donor: Weights, others: Cohort, arms: Sequence[str], out: Path) -> list[Row]:
    """Train and score all arms with one seed."""
    place, usual = out / f"seed-{seed}", recipe_of("A7", seed)
    ends = usual.schedule.ends
    setting = settle(receivers_of(others, seed), usual, place)
    go_on(recipe_of("A1", seed), setting, place / "random", until=ends["generator"])
    rows: list[Row] = []
    for name, done in (("donated", ends["generator"]), ("fixed", ends["discriminators"])):
        if not (place / name / "checkpoints").exists():
            learner = go_on(usual, setting, place / name, place / "random", ends["generator"])
            donate(donor, learner)
            if name == "donated":
                write_evaluation(place / AS_GIVEN, score(learner, setting.tested, AS_GIVEN, seed))
            (place / name / "checkpoints").mkdir(parents=True)
            save_checkpoint(place / name / "checkpoints", done, learner.parts, learner.state.to_dict())
        go_on(usual, setting, place / name, until=ends["discriminators"])
    for arm in (AS_GIVEN, *arms):
        if not is_evaluation(place / arm):
            method, start, own = ARMS[arm]
            learner = go_on(recipe_of(method, seed, own), setting, place / arm, place / start)
            write_evaluation(place / arm, score(learner, setting.tested, arm, seed))
        rows += read_evaluation(place / arm)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print the mean of each score, with the SD over seeds, and the differences of pairs of arms."""
    print("| arm | region | score | mean | n |\n|---|---|---|---|---|")
    for one in summarise_methods(rows, metrics=("mae", "auroc_lesion", "weight_ratio"), regions=REGIONS):
        print(f"| {one.method} | {one.region} | {one.metric} | {one.mean:.3f} ± {one.sd_seeds:.3f} | {one.subjects} |")
    arms = {row.method for row in rows}
    pairs = [pair for pair in PAIRS if arms.issuperset(pair)]
    declared = [Declared(*pair, "WT", "mae") for pair in pairs]
    for found in compare_methods(rows, pairs, metrics=("mae", "auroc_lesion"), regions=REGIONS, declared=declared):
        by_seed = ", ".join(f"{100 * difference / found.mean_against:+.1f}" for difference in found.by_seed)
        print(f"- {found.verdict} ({by_seed})")


def main() -> None:
    """Train the donor, then all arms with each seed, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patients", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    giving, others = divide(find_cohort(asked.patients))
    donor = train_donor(giving, asked.out)
    show([row for seed in asked.seeds for row in run_seed(seed, donor, others, asked.arms, asked.out)])


if __name__ == "__main__":
    main()
