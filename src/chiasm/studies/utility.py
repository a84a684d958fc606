"""Whether completed cases help a later model, measured on test subjects that no model has seen.

Complete cases are assigned to folds by subject.  For each fold and seed, a completion model that never saw the test
subjects completes the other cases.  Then a later model, which needs the modality that was missing, is trained twice
with one recipe and one plan: `without` on the complete cases, `with` on these and the completed ones.  Both are scored
on the scans of the test subjects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chiasm import __version__
from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import MODALITIES, Case, Cohort, Problem, role_of
from chiasm.cohorts.splits import ROLES, Folds, Split, choose_folds, make_split
from chiasm.errors import CohortError, RecipeError
from chiasm.evaluation.predictions import score_folder
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.evaluation.statistics import Comparison, Declared, compare_methods
from chiasm.preparation.plan import read_plan, write_plan
from chiasm.progress import StepProgress
from chiasm.recipe import Recipe
from chiasm.studies.filling import fill, predict_as_asked
from chiasm.training.run import train

WITH, WITHOUT = "with", "without"
FEWEST_SUBJECTS = 2  # with both modalities: one trains and one validates
TRAININGS = 3  # of each fold and seed: the completion model and the later one twice


class Task(NamedTuple):
    """The sources and the target of the later model."""

    sources: tuple[str, ...]
    target: str

    def __str__(self) -> str:
        return f"{' + '.join(self.sources)} to {self.target}"


@dataclass(frozen=True)
class Fold:
    """The roles of cases in one fold of the utility.

    Attributes:
        number: Which.
        pairs: Cases that the completion model learns from, each with its role; no test subject is among them.
        real: Complete cases that the later model learns from, with their roles.
        gaps: Cases that are completed for it.
        test: Complete cases that it is scored on.
    """

    number: int
    pairs: tuple[Case, ...]
    real: tuple[Case, ...]
    gaps: tuple[Case, ...]
    test: tuple[Case, ...]


def choose_task(pairs: Sequence[Case], gaps: Sequence[Case], recipe: Recipe, utility: str) -> Task | None:
    """Choose the target of the later model; its sources are the other modalities among sources and target.

    Raises:
        CohortError: If no complete case, or no case with a gap, has the modality.
        RecipeError: If it is the completed modality.
    """
    if utility == "none":
        return None
    chosen = _most_shared(pairs, gaps, recipe) if utility == "auto" else role_of(utility)
    _check_modality(chosen, pairs, gaps, recipe.data.target)
    return Task(tuple(name for name in recipe.data.modalities if name != chosen), chosen)


def _check_modality(chosen: str, pairs: Sequence[Case], gaps: Sequence[Case], target: str) -> None:
    """Refuse a modality that a later model cannot make, or that is the completed one."""
    if chosen == target:
        raise RecipeError(
            f"{chosen} is the completed modality, so it cannot be the target of the later model",
            reason="utility",
            hint="Name another modality with --utility, or none.",
        )
    if not _count_shared(chosen, pairs, gaps):
        raise CohortError(f"cases with and without {target} do not share the modality {chosen!r}", reason="utility")


def _having(modality: str, cases: Iterable[Case]) -> list[Case]:
    """Return the cases that have a modality."""
    return [case for case in cases if modality in case.images]


def _count_shared(modality: str, pairs: Sequence[Case], gaps: Sequence[Case]) -> int:
    """Count the cases with a modality among complete cases and among others, and return the smaller number."""
    return min(len(_having(modality, pairs)), len(_having(modality, gaps)))


def _most_shared(pairs: Sequence[Case], gaps: Sequence[Case], recipe: Recipe) -> str:
    """Return the third modality that most cases of both kinds have; without one, the first source."""
    others = set(chain.from_iterable(case.images for case in gaps)) - set(recipe.data.modalities)
    order = sorted(others, key=lambda name: (_RANKS.get(name, len(_RANKS)), name))
    fewest = max(choose_folds(recipe.split.folds, FEWEST_SUBJECTS), FEWEST_SUBJECTS)
    usable = [name for name in order if len({case.subject for case in _having(name, pairs)}) >= fewest]
    shared = {name: _count_shared(name, pairs, gaps) for name in usable}
    return max(shared, key=shared.__getitem__, default=recipe.data.sources[0])


_RANKS = {name: rank for rank, name in enumerate(MODALITIES)}  # which of two comes first where they are shared alike


def assign(pairs: Sequence[Case], gaps: Sequence[Case], task: Task, recipe: Recipe) -> tuple[Fold, ...]:
    """Assign complete cases to folds by subject, and keep all other cases of test subjects out of training.

    Raises:
        CohortError: If there are too few subjects, or a fold has no case to complete.
        RecipeError: If there is one fold and no manifest says who is tested.
    """
    settings = recipe.split
    able, gaps = _having(task.target, pairs), _having(task.target, gaps)
    folds = []
    for number in range(_count_folds(able, settings.folds)):
        split = make_split(able, folds=settings.folds, fold=number, validation=settings.validation, seed=settings.seed)
        folds.append(_fold(number, split, able, pairs, gaps))
        if not folds[-1].gaps:
            raise CohortError("the later model would get no completed case to train on", reason="utility")
    return tuple(folds)


def _count_folds(able: Sequence[Case], folds: Folds) -> int:
    """Return the number of folds: one if a manifest fixes the test subjects, else the given number."""
    if any(case.split == "test" for case in able):
        return 1
    if folds == 1:
        raise RecipeError(
            "the utility needs test subjects", reason="folds", hint="Use --folds 2 or more, or --utility none."
        )
    return choose_folds(folds, len({case.subject for case in able}))


def _fold(number: int, split: Split, able: Sequence[Case], pairs: Sequence[Case], gaps: Sequence[Case]) -> Fold:
    places = {name: role for role in ROLES for name in getattr(split, role)}
    roles = {case.subject: places[case.id] for case in able}

    def cast(cases: Iterable[Case], *wanted: str) -> tuple[Case, ...]:
        given = (replace(case, split=roles.get(case.subject, case.split or "train")) for case in cases)
        return tuple(case for case in given if case.split in wanted)

    learning = ("train", "validation")
    return Fold(number, cast(pairs, *learning), cast(able, *learning), cast(gaps, "train"), cast(able, "test"))


def recipe_of(recipe: Recipe, task: Task, seed: int) -> Recipe:
    """Return the recipe of one training: what it makes of what, its seed, and no test set beside the cases' roles."""
    split = {"by": "subject", "folds": 1, "fold": 0, "locked": 0.0, "subject_pattern": ""}  # the cases know theirs
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=task._asdict()),
            "split": recipe.split.model_copy(update=split),
            "training": recipe.training.model_copy(update={"seed": seed}),
        }
    )


@dataclass(frozen=True)
class UtilityRun:
    """One measurement: a fold with a seed.

    Attributes:
        fold: Who does what.
        task: Of the later model.
        recipe: Of the completion.
        seed: Of all three trainings.
    """

    fold: Fold
    task: Task
    recipe: Recipe
    seed: int

    @property
    def completion(self) -> Task:
        """The sources and the target of the completion model."""
        return Task(self.recipe.data.sources, self.recipe.data.target)

    def recipe_for(self, task: Task) -> Recipe:
        """Return the recipe of one of its trainings."""
        return recipe_of(self.recipe, task, self.seed)

    @property
    def folder(self) -> str:
        """Name of its folder, by what its scores depend on, files by content: other data are never taken for these."""
        given = [__version__, self.recipe.model_dump(mode="json"), self.task, self.seed]
        digest = hashlib.sha256(json.dumps(given).encode())
        for case in (*self.fold.pairs, *self.fold.real, *self.fold.gaps, *self.fold.test):
            files = [*case.images.values(), *filter(None, (case.mask, case.labels))]
            digest.update(json.dumps([case.id, case.subject, case.split, *map(sha256_of, files)]).encode())
        return f"fold-{self.fold.number}-seed-{self.seed}-{digest.hexdigest()[:12]}"


def measure(
    cell: UtilityRun,
    cohort: Cohort,
    out: Path,
    progress: Sequence[StepProgress | None] = (None,) * TRAININGS,
    *,
    trust: Collection[str] = (),
) -> tuple[list[Row], list[Problem]]:
    """Train the later model with and without completed cases, and score both on the fold's test subjects.

    Args:
        cell: Fold and seed, and what is trained.
        cohort: The completed one: its folder holds the test subjects' scans.
        out: The completion's folder; what was measured there already is read.
        progress: Of the three trainings.
        trust: Classes of others that a model may consist of.

    Returns:
        Rows of the methods "with" and "without", and cases that could not be used.

    Raises:
        ChiasmError: If a training fails or a file cannot be written.
    """
    place, fold = out / "utility" / cell.folder, cell.fold
    if (place / "evaluation.csv").is_file():
        return read_evaluation(place), []
    training = _Trainings(cohort, place, out / "cache")
    training.run("completion", fold.pairs, cell.recipe_for(cell.completion), progress[0])
    filled, problems = fill(fold.gaps, place / "completion", place / "made", cell.recipe, trust)
    if not filled:
        return [], problems
    later = cell.recipe_for(cell.task)
    problems += training.run(WITHOUT, fold.real, later, progress[1])
    rows, failed = _score(cell, place / WITHOUT, cohort.root, trust)
    _share_plan(place, (*fold.real, *filled))
    lost = training.run(WITH, (*fold.real, *filled), later, progress[2])
    problems += [*failed, *lost]
    if {case.id for case in filled} <= {problem.case for problem in lost}:
        return [], problems  # both models would be one, and their difference 0 no finding
    more, failed = _score(cell, place / WITH, cohort.root, trust)
    rows, problems = [*rows, *more], [*problems, *failed]
    if not problems:  # else they would be forgotten
        write_evaluation(place, rows)
    return rows, problems


class _Trainings(NamedTuple):
    """The cases and the folder of the three trainings of a fold and seed."""

    cohort: Cohort
    place: Path
    cache: Path

    def run(
        self, name: str, cases: tuple[Case, ...], recipe: Recipe, progress: StepProgress | None
    ) -> tuple[Problem, ...]:
        """Train on some cases; return those that could not be used."""
        learning = replace(self.cohort, cases=cases)
        return train(learning, recipe, self.place / name, say=_silence, progress=progress, cache=self.cache).problems


def _share_plan(place: Path, cases: Iterable[Case]) -> None:
    """Give the model of completed cases the plan of the real ones, so that both errors have one unit."""
    path = place / WITH / "plan.toml"
    if not path.is_file():
        plan = read_plan(place / WITHOUT / "plan.toml")
        learning = tuple(sorted(case.id for case in cases if case.split == "train"))
        write_plan(path, replace(plan, trained_on=learning))


def _score(cell: UtilityRun, run: Path, root: Path, trust: Collection[str]) -> tuple[list[Row], list[Problem]]:
    """Score a later model on the test subjects' scans; its folder gives its name."""
    made = predict_as_asked(run, cell.fold.test, run / "predictions", cell.recipe, trust)
    scored, failed, _ = score_folder(run / "predictions", root, naive=False)
    rows = [row._replace(fold=cell.fold.number, method=run.name) for row in scored]
    return rows, [*made.problems, *failed]


def compare_utility(
    rows: Sequence[Row], regions: Mapping[str, Sequence[int]], subjects: Mapping[str, str]
) -> tuple[Comparison, ...]:
    """Compare `with` and `without` in pairs by subject and seed; MAE in the mask is the declared comparison."""
    declared = [Declared(WITH, WITHOUT, "mask", "mae")]
    found = compare_methods(
        rows,
        [(WITH, WITHOUT)],
        metrics=SHOWN,
        regions=("mask", "healthy", *regions),
        declared=declared,
        subjects=subjects,
    )
    return tuple(found)


def _silence(line: str) -> None:
    """Say nothing: a completion reports its folds, not of their insides."""
    del line


SHOWN = ("mae", "ssim")
