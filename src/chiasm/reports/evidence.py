"""The content of the files of a training and of its evaluation, gathered for explanations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from chiasm.cohorts.splits import ROLES, SplitRecord, count_subjects, read_splits
from chiasm.errors import RunError
from chiasm.evaluation.headlines import BASE_REGIONS
from chiasm.evaluation.loading import PredictionFolder
from chiasm.evaluation.rows import LESION, Row, read_evaluation
from chiasm.evaluation.summary import ScoreSummary, paired, summarise
from chiasm.outputs import MODEL_CARD
from chiasm.prediction.manifest import Entry, find_path
from chiasm.prediction.model_files import PARTS
from chiasm.preparation.out_of_distribution import BEGINNING
from chiasm.preparation.plan import Plan, read_plan
from chiasm.recipe import Recipe, read_recipe
from chiasm.reports.curves import Curve, History, Point, find_points, read_history
from chiasm.reports.evaluation_folder import ASKED, open_assessed, read_asked
from chiasm.reports.naive_comparison import BaselineComparison, compare_with_baselines
from chiasm.times import read_times

WARNINGS = (BEGINNING, "the input is unlike the training cases")  # what the warning says; in version 0.1


@dataclass(frozen=True)
class Evidence:
    """The facts that an explanation uses.

    Attributes:
        folder: Of the run, or of the model.
        recipe: The settings.
        plan: The choices that follow from the data, with reasons.
        roles: Number of cases of each role; empty if the split is not known.
        sites: Case to site, if it is known.
        history: Lines of the training's log.
        seconds: Time of each stage, where it was noted.
        is_finished: Whether the training came to its end.
        rows: Scores of all regions but single lesions, over the cases that all methods have; none if not evaluated.
        naive: Names of the naive baselines.
        entries: What the manifests say of the predicted cases.
        subjects: Case to subject; a case without one is its own.
        averaged: What several models are called together, if the predictions are means over them.
        others: The further models, of several that share a cohort, are averaged or are scored together.
        planned: Number of models that the training is to have.
    """

    folder: Path
    recipe: Recipe
    plan: Plan
    roles: Mapping[str, int]
    sites: Mapping[str, str]
    history: History
    seconds: Mapping[str, float]
    is_finished: bool
    rows: Sequence[Row] = ()
    naive: Sequence[str] = ()
    entries: Sequence[Entry] = ()
    subjects: Mapping[str, str] = field(default_factory=dict)
    averaged: str = ""
    others: tuple[Evidence, ...] = ()
    planned: int = 1

    @property
    def models(self) -> dict[str, Evidence]:
        """Each model by what its sentences begin with: nothing if there is one, else its number, and its plane."""
        if not self.others:
            return {"": self}
        models = (self, *self.others)
        has_planes = len({one.plan.plane for one in models}) > 1
        planes = [f" ({one.plan.plane})" if has_planes else "" for one in models]
        return {f"Model {number}{plane}: ": one for number, (plane, one) in enumerate(zip(planes, models), 1)}

    @property
    def planes(self) -> str:
        """The slices that each model sees, in words; nothing where all see the same."""
        seen = [one.plan.plane for one in self.models.values()]
        return "" if len(set(seen)) == 1 else f"{', '.join(seen[:-1])} and {seen[-1]}, in the order of the models"

    @property
    def method(self) -> str:
        """What the scores of the predictions are called."""
        return self.averaged or self.recipe.method

    @property
    def roles_in_words(self) -> str:
        """How many cases are of each role; nothing where the split is not known."""
        return ", ".join(f"{count} {role}" for role, count in self.roles.items() if count)

    @property
    def comparisons(self) -> list[BaselineComparison]:
        """The method's mean absolute error beside that of the best naive baseline, region by region."""
        return compare_with_baselines(self.rows, method=self.method, naive=self.naive, subjects=self.subjects)

    @property
    def lesions(self) -> list[BaselineComparison]:
        """Those of labelled regions."""
        return [one for one in self.comparisons if one.region not in BASE_REGIONS and not is_size(one.region)]

    def scores(self, region: str, metric: str) -> ScoreSummary | None:
        """Return the method's mean over cases; None where no case has a score."""
        return next((one for one in summarise(self._mine(region, metric)) if one.n), None)

    def of_cases(self, region: str, metric: str) -> dict[str, float]:
        """Return the method's score of each case."""
        return {row.case: row.value for row in self._mine(region, metric)}

    def _mine(self, region: str, metric: str) -> list[Row]:
        """Return the method's rows of a score."""
        wanted = (self.method, region, metric)
        return [row for row in self.rows if (row.method, row.region, row.metric) == wanted]

    def unit(self, region: str, metric: str) -> str:
        """Return the unit of a score; nothing where there is none."""
        return next((row.unit for row in self.rows if (row.region, row.metric) == (region, metric)), "")

    def points(self, kind: str, name: str) -> list[Point]:
        """Return a curve of the log."""
        return find_points(self.history, Curve(kind, name))

    @property
    def seen(self) -> list[str]:
        """Predicted cases that were used in training."""
        return [one.case for one in self.entries if one.was_seen]

    @property
    def out_of_distribution(self) -> list[str]:
        """Cases whose input is out of distribution."""
        return [one.case for one in self.entries if any(words in said for said in one.warnings for words in WARNINGS)]


def is_size(region: str) -> bool:
    """Return whether a region holds the lesions of one size."""
    return region.startswith("lesions-")


def read_evidence(place: Path) -> Evidence:
    """Gather the facts on a training and its evaluation.

    Args:
        place: What `chiasm run`, `train` or `evaluate` wrote, or a model folder.

    Raises:
        RunError: If it is none of these, or a file is damaged.
    """
    if (place / ASKED).is_file():
        return read_evaluated(place)
    if (place / "run" / "recipe.toml").is_file():
        evaluation = place / "evaluation"
        return read_evaluated(evaluation) if (evaluation / ASKED).is_file() else _read_run(place / "run")
    if (place / "recipe.toml").is_file() and any((place / name).exists() for name in ("plan.toml", PARTS)):
        return _read_run(place)
    raise RunError(
        "holds neither a training nor an evaluation",
        path=place,
        reason="no-results",
        hint="Give a folder that chiasm run, train or evaluate wrote.",
    )


def read_evaluated(out: Path) -> Evidence:
    """Gather the facts from an evaluation's folder; the recipe is that of the first model.

    Raises:
        ChiasmError: If a file is missing or damaged.
    """
    asked = read_asked(out)
    return gather_evidence(open_assessed(out, asked), read_evaluation(out), asked.get("subjects", {}))


def gather_evidence(assessed: Sequence[PredictionFolder], rows: Sequence[Row], subjects: Mapping[str, str]) -> Evidence:
    """Gather the facts on scored predictions.

    Args:
        assessed: One for each model that is scored alone; the recipe is that of the first.
        rows: All scores.
        subjects: Case to subject, where it is not the case's id.

    Raises:
        ChiasmError: If a file is missing or damaged.
    """
    of_training = _read_models(_models_of(assessed))
    scored = paired([row for row in rows if not LESION.fullmatch(row.region)])
    entries = tuple(chain.from_iterable(one.manifest.cases for one in assessed))
    seconds = {**of_training.seconds, **read_times(assessed[0].folder.parent)}
    manifest = assessed[0].manifest
    return replace(
        of_training,
        seconds=seconds,
        rows=scored,
        naive=assessed[0].baselines.names,
        entries=entries,
        subjects=subjects,
        averaged=manifest.method if manifest.models else "",
    )


def _models_of(assessed: Sequence[PredictionFolder]) -> list[Path]:
    """List the folders of the models whose images are scored, one by one or as a mean; the first is always there."""
    first, *further = assessed
    averaged = [find_path(first.folder, first.manifest, one.model) for one in first.manifest.models[1:]]
    others = averaged or [one.model for one in further]
    return [first.model, *(one for one in others if (one / "plan.toml").is_file())]


def find_splits(model: Path) -> SplitRecord | None:
    """Read the split of a model; None where it is not known."""
    splits = model / "splits.json"
    return read_splits(splits) if splits.is_file() else None


def _count_roles(record: SplitRecord) -> dict[str, int]:
    return {role: len(getattr(record.split, role)) for role in ROLES}


def known_sites(record: SplitRecord) -> dict[str, str]:
    """Return the site of each case whose site is known."""
    return {name: site for name, site in record.sites.items() if site}


def _read_run(folder: Path) -> Evidence:
    """Read a run folder, of one model or several, or a model folder with the run that it lies in."""
    if not (folder / PARTS / "1" / "recipe.toml").is_file():
        return _read_one(folder)
    planned = int(read_recipe(folder / "recipe.toml").split.models)
    parts = [folder / PARTS / str(number) for number in range(1, planned + 1)]
    return replace(_read_models([part for part in parts if (part / "plan.toml").is_file()]), planned=planned)


def _read_models(folders: Sequence[Path]) -> Evidence:
    """Read the folders of several models as that of the first, with the others and the time of all."""
    first, *others = map(_read_one, folders)
    seconds = Counter[str]()
    for one in (first, *others):
        seconds.update(one.seconds)
    return replace(first, others=tuple(others), seconds=seconds)


def _read_one(folder: Path) -> Evidence:
    is_model = (folder / MODEL_CARD).is_file()
    run = folder.parent if is_model else folder
    record = find_splits(folder)
    return Evidence(
        folder=folder,
        recipe=read_recipe(folder / "recipe.toml"),
        plan=read_plan(folder / "plan.toml"),
        roles={} if record is None else _count_roles(record),
        sites={} if record is None else known_sites(record),
        history=read_history(run / "log.jsonl"),
        seconds=read_times(run),
        is_finished=is_model or (run / "model" / MODEL_CARD).is_file(),
    )


def split_facts(assessed: Sequence[PredictionFolder]) -> dict[str, str]:
    """Describe how subjects were assigned to roles, and count those of each model that was assessed."""
    recipe = read_recipe(assessed[0].model / "recipe.toml").split
    rule = f"by {recipe.by}, {recipe.described}, {100 * recipe.validation:g} % of the others for validation"
    records = [find_splits(one.model) for one in assessed]
    counts = {f"model {number}": count_subjects(one) for number, one in enumerate(records, 1) if one is not None}
    return {"rule": f"{rule}, seed {recipe.seed}", **counts}
