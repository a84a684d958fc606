"""`chiasm models`: the card of a model: its data, its scores on test cases, its limits.

A card takes its facts from files: those of the model, and those of an evaluation if one is given.  Models are compared
only if their test cases allow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations, repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import grouped
from chiasm.cohorts.splits import SplitRecord
from chiasm.errors import RunError
from chiasm.evaluation.paired_tests import cluster_interval
from chiasm.methods import title_of
from chiasm.names import sizes_in_mm, three_digits
from chiasm.prediction.calibration import read_calibration
from chiasm.prediction.model_files import CARD, WEIGHTS, find_model, read_card
from chiasm.preparation.plan import Plan
from chiasm.reports.drawing import with_unit
from chiasm.reports.evidence import Evidence, find_splits, known_sites, read_evidence
from chiasm.reports.tables import cases_of
from chiasm.storage import read_facts

LICENCES = ("LICENCE", "LICENSE", "LICENCE.txt", "LICENSE.txt")  # in a model's folder, whoever put one there
SCORES = ("mae", "psnr", "ssim")  # in the mask; in labelled regions the first
FEWEST = 3  # subjects, for an interval
SHOWN = 12  # characters of a hash


@dataclass(frozen=True)
class CardScore:
    """A mean over subjects.

    Attributes:
        region: Where.
        metric: What.
        unit: Of the numbers.
        mean: Over subjects.
        low: Lower end of the 95 % interval, by resampling subjects; None with fewer than three.
        high: Upper end.
        subjects: How many.
    """

    region: str
    metric: str
    unit: str
    mean: float
    low: float | None
    high: float | None
    subjects: int

    def __str__(self) -> str:
        interval = (
            "" if self.low is None or self.high is None else f" [{three_digits(self.low)}, {three_digits(self.high)}]"
        )
        return f"{with_unit(f'{three_digits(self.mean)}{interval}', self.unit)} (n {self.subjects})"

    @property
    def name(self) -> str:
        """What to call it in a list."""
        return f"{self.region}, {self.metric}"


@dataclass(frozen=True)
class ModelCard:
    """The facts on a model.

    Attributes:
        place: The folder that was named.
        facts: Name to words: method, images, data, split, limits, hashes, licence.
        scores: On test cases; none without an evaluation.
    """

    place: Path
    facts: Mapping[str, str]
    scores: tuple[CardScore, ...]

    def to_dict(self) -> dict[str, object]:
        """Return what JSON can hold."""
        return {"place": str(self.place), **self.facts, "scores": [asdict(score) for score in self.scores]}


@dataclass(frozen=True)
class ModelComparison:
    """Several cards, with warnings if their scores cannot be compared.

    Attributes:
        cards: In the order of the folders.
        warnings: Why the scores cannot be compared, one sentence each.
    """

    cards: tuple[ModelCard, ...]
    warnings: tuple[str, ...]


def describe_models(places: Sequence[Path]) -> ModelComparison:
    """Describe models, and warn if their scores cannot be compared.

    Args:
        places: Runs, model folders, evaluations, or what `chiasm run` wrote; of the latter two also the scores.

    Raises:
        RunError: If one is none of these, has no finished model, or a file is damaged.
    """
    read = [_Read(Path(place)) for place in places]
    return ModelComparison(tuple(one.card() for one in read), tuple(_warn(read)))


class _Read:
    """One model's files."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.evidence = read_evidence(place)
        self.models = models = [find_model(one.folder) for one in self.evidence.models.values()]
        self.model = models[0]
        self.hashes = ", ".join(sha256_of(one / CARD) for one in models)
        cards = [read_card(one) for one in models]
        self.weights, self.parent = ", ".join(one.sha256[WEIGHTS] for one in cards), cards[0].parent
        self.splits = find_splits(self.model)

    @property
    def subjects(self) -> Mapping[str, str]:
        """Case id to subject; empty where the split is not known."""
        return {} if self.splits is None else self.splits.subjects

    def card(self) -> ModelCard:
        """Put it together."""
        return ModelCard(self.place, dict(self._facts()), tuple(_scores(self.evidence, self.subjects)))

    def _facts(self) -> Iterator[tuple[str, str]]:
        recipe, plan = self.evidence.recipe, self.evidence.plan
        yield "method", f"{title_of(recipe.method)}, size {recipe.size}, {recipe.schedule.steps} steps"
        yield "images", f"{' + '.join(plan.sources)} to {plan.target}"
        if self.evidence.others:
            planes = self.evidence.planes
            slices = f"; slices: {planes}" if planes else ""
            yield "models", f"{len(self.evidence.models)}{slices}"
        each = list(zip(self.models, self.evidence.models.values(), strict=True))
        yield "data", _of_each(_describe_data(find_splits(model), one) for model, one in each)
        rule = "folds by site" if recipe.split.by == "site" else "folds by subject"
        yield "split", f"{rule}, {recipe.split.described}, seed {recipe.split.seed}"
        yield "limits", _of_each("; ".join(_limits(one.plan, model)) for model, one in each)
        environment = read_facts(self.model.parent / "environment.json")
        yield "made with", f"chiasm {environment['chiasm']}" if "chiasm" in environment else "not noted"
        yield "sha256 of the model", self.hashes
        yield "sha256 of the weights", self.weights
        if self.parent:
            yield "goes on from the model with sha256", self.parent
        yield "licence", _licence(self.model)
        yield "use", "for research; not for diagnostic use"


def _of_each(described: Iterable[str]) -> str:
    """Say once what holds for all models, else what holds for each.

    >>> _of_each(["4 train", "4 train"]), _of_each(["4 train", "5 train"])
    ('4 train', 'model 1: 4 train; model 2: 5 train')
    """
    texts = list(described)
    return texts[0] if len({*texts}) == 1 else "; ".join(f"model {n}: {text}" for n, text in enumerate(texts, 1))


def _describe_data(splits: SplitRecord | None, evidence: Evidence) -> str:
    if splits is None:
        return f"{len(evidence.plan.trained_on)} training cases; the split is not known"
    described = f"{evidence.roles_in_words}; {len(set(splits.subjects.values()))} subjects"
    sites = sorted(set(known_sites(splits).values()))
    return f"{described}; sites {', '.join(sites)}" if sites else described


def _limits(plan: Plan, model: Path) -> Iterator[str]:
    """Describe the inputs that the model was trained on, and the calibration of its expected error."""
    yield f"voxels of {sizes_in_mm(*plan.grid_mm)}"
    yield f"a brain or body of {sizes_in_mm(*plan.body_mm)}"
    calibration = model / "calibration.json"
    if calibration.is_file():
        yield f"expected error: {read_calibration(calibration).verdict}"
    else:
        yield "no calibrated expected error"


def _licence(model: Path) -> str:
    """Return the first line of a licence beside the model."""
    path = next((path for path in map(model.joinpath, LICENCES) if path.is_file()), None)
    if path is None:
        return f"not stated; put a file {LICENCES[0]} beside {CARD}"
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError("cannot be read", path=path, reason="unreadable", found=error) from error
    return lines[0].strip() if lines else f"{path.name} is empty"


def _scores(evidence: Evidence, subjects: Mapping[str, str]) -> Iterator[CardScore]:
    """Average the scores over subjects: in the mask, and in labelled regions."""
    labelled = (one.region for one in evidence.lesions)
    for region, metric in (*zip(repeat("mask"), SCORES), *zip(labelled, repeat(SCORES[0]))):
        means = _subject_means(evidence.of_cases(region, metric), subjects)
        if len(means):
            low, high = cluster_interval(means) if len(means) >= FEWEST else (None, None)
            yield CardScore(region, metric, evidence.unit(region, metric), float(means.mean()), low, high, len(means))


def _subject_means(scores: Mapping[str, float], subjects: Mapping[str, str]) -> NDArray[np.float64]:
    """Average the scores of cases over each subject, shape (subjects, 1); a case without a subject is one."""
    known = {case: value for case, value in scores.items() if not math.isnan(value)}
    people = grouped(known, lambda case: subjects.get(case, case))
    return np.array([[np.mean([known[case] for case in cases])] for cases in people.values()])


def _warn(read: Sequence[_Read]) -> Iterator[str]:
    """Say why the scores of different models cannot be compared."""
    tested = {frozenset(cases_of(one.evidence.rows)) for one in read}
    if len(tested - {frozenset()}) > 1:
        yield "the models were scored on different cases: their scores cannot be compared"
    if len({(one.evidence.plan.sources, one.evidence.plan.target) for one in read}) > 1:
        yield "the models make different images of different sources"
    yield from _leaks(read)


def _leaks(read: Sequence[_Read]) -> Iterator[str]:
    """Name the models that were trained on test cases of others."""
    for one, other in permutations(read, 2):
        seen = _voxels(other.splits, "train") & _voxels(one.splits, "test")
        if seen:
            yield f"{other.place} was trained on {len(seen)} of the test cases of {one.place}"


def _voxels(splits: SplitRecord | None, role: str) -> set[str]:
    """Return what the images of a role are, by their voxels."""
    if splits is None:
        return set()
    return {splits.hashes[case] for case in getattr(splits.split, role) if case in splits.hashes}


def report_models(found: ModelComparison) -> Iterator[str]:
    """Write cards as lines of text; of several models the scores stand side by side at the end."""
    for card in found.cards:
        yield from _report_card(card)
    if len(found.cards) > 1:
        yield from _side_by_side(found.cards)
    yield from (f"warning: {sentence}" for sentence in found.warnings)


def _report_card(card: ModelCard) -> Iterator[str]:
    """Write a card as lines of text, with an empty line at the end."""
    yield f"{card.place}"
    yield from (f"  {name}: {words}" for name, words in card.facts.items())
    yield from (f"  {score.name}: {score}" for score in card.scores)
    if not card.scores:
        yield "  scores: none; give what chiasm run or evaluate wrote to see some"
    yield ""


def _side_by_side(cards: Sequence[ModelCard]) -> Iterator[str]:
    """Set the scores of several models as a table: a line for each score, a column for each model."""
    columns = [_column(card) for card in cards]
    scores = dict.fromkeys(score.name for card in cards for score in card.scores)
    names = ("", "method", "images", *scores, "sha256")
    yield from _in_columns([[name, *(column.get(name, "-") for column in columns)] for name in names])


def _column(card: ModelCard) -> dict[str, str]:
    """Return a model's column of the table, by the names of the lines."""
    facts = {name: card.facts[name] for name in ("method", "images")}
    scores = {score.name: str(score) for score in card.scores}
    return {"": str(card.place), **facts, **scores, "sha256": card.facts["sha256 of the model"][:SHOWN]}


def _in_columns(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Write a table as lines of text, its columns below each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()
