"""`chiasm models`: what each model is, on what it was trained, how good it was on cases it had not seen, its limits.

A card quotes files: the model's own, and the scores of an evaluation where one
is given with it.  Models are compared only as far as their test cases allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, permutations
from pathlib import Path

import numpy as np

from chiasm.checksums import sha256_of
from chiasm.cohorts.splits import SplitRecord, read_splits
from chiasm.errors import RunError
from chiasm.evaluation.paired_tests import cluster_interval
from chiasm.methods import title_of
from chiasm.prediction.calibration import read_calibration
from chiasm.prediction.model_files import CARD, WEIGHTS, find_model, read_card
from chiasm.preparation.plan import Plan
from chiasm.reports.evidence import Evidence, read_evidence
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
        unit = "" if self.unit in ("", "1") else f" {self.unit}"
        if self.low is None:
            return f"{self.mean:.3g}{unit} (n {self.subjects})"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]{unit} (n {self.subjects})"


@dataclass(frozen=True)
class ModelCard:
    """What is to be known of a model.

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
    """Several cards, and what stands between their scores.

    Attributes:
        cards: In the order of the folders.
        warnings: Why the scores cannot be compared, one sentence each.
    """

    cards: tuple[ModelCard, ...]
    warnings: tuple[str, ...]


def describe_models(places: Sequence[Path]) -> ModelComparison:
    """Describe models, and say whether their scores can be compared.

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
        self.model = find_model(self.evidence.folder)
        card = read_card(self.model)
        self.hashes, self.parent = card.sha256, card.parent
        splits = self.model / "splits.json"
        self.splits: SplitRecord | None = read_splits(splits) if splits.is_file() else None

    def card(self) -> ModelCard:
        """Put it together."""
        return ModelCard(self.place, dict(self._facts()), tuple(_scores(self.evidence, self.splits)))

    def _facts(self) -> Iterator[tuple[str, str]]:
        recipe, plan = self.evidence.recipe, self.evidence.plan
        yield "method", f"{title_of(recipe.method)}, size {recipe.size}, {recipe.schedule.steps} steps"
        yield "images", f"{' + '.join(plan.sources)} to {plan.target}"
        yield "data", _describe_data(self.splits, self.evidence)
        rule = "folds by site" if recipe.split.by == "site" else "folds by subject"
        yield "split", f"{rule}, fold {recipe.split.fold} of {recipe.split.folds}, seed {recipe.split.seed}"
        yield "limits", "; ".join(_limits(plan, self.model))
        environment = read_facts(self.model.parent / "environment.json")
        yield "made with", f"chiasm {environment['chiasm']}" if "chiasm" in environment else "not noted"
        yield "sha256 of the model", sha256_of(self.model / CARD)
        yield "sha256 of the weights", self.hashes[WEIGHTS]
        if self.parent:
            yield "goes on from the model with sha256", self.parent
        yield "licence", _licence(self.model)
        yield "use", "for research; not for diagnostic use"


def _describe_data(splits: SplitRecord | None, evidence: Evidence) -> str:
    if splits is None:
        return f"{len(evidence.plan.trained_on)} training cases; the split is not known"
    roles = ", ".join(f"{count} {role}" for role, count in evidence.roles.items() if count)
    sites = sorted({site for site in splits.sites.values() if site})
    described = f"{roles}; {len(set(splits.subjects.values()))} subjects"
    return f"{described}; sites {', '.join(sites)}" if sites else described


def _limits(plan: Plan, model: Path) -> Iterator[str]:
    """Say on what inputs the model was trained, and how far its expected error can be trusted."""
    low, high = plan.grid_mm
    yield f"voxels from {_size(low)} to {_size(high)} mm"
    low, high = plan.body_mm
    yield f"a brain or body from {_size(low)} to {_size(high)} mm"
    calibration = read_calibration(model / "calibration.json") if (model / "calibration.json").is_file() else None
    if calibration is None:
        yield "no calibrated expected error"
    else:
        yield f"expected error {calibration.verdict}"


def _size(millimetres: Sequence[float]) -> str:
    return " x ".join(f"{one:.3g}" for one in millimetres)


def _licence(model: Path) -> str:
    """Quote the first line of a licence that somebody put beside the model."""
    for name in LICENCES:
        if (path := model / name).is_file():
            try:
                lines = path.read_text(encoding="utf-8").strip().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RunError("cannot be read", path=path, reason="unreadable", found=error) from error
            return lines[0].strip() if lines else f"{name} is empty"
    return f"not stated; put a file {LICENCES[0]} beside {CARD}"


def _scores(evidence: Evidence, splits: SplitRecord | None) -> Iterator[CardScore]:
    subjects = {} if splits is None else splits.subjects
    wanted = [("mask", metric) for metric in SCORES] + [(one.region, SCORES[0]) for one in evidence.lesions]
    for region, metric in wanted:
        by_subject: dict[str, list[float]] = {}
        for case, value in evidence.of_cases(region, metric).items():
            if not math.isnan(value):
                by_subject.setdefault(subjects.get(case, case), []).append(value)
        if by_subject:
            means = np.array([[np.mean(values)] for values in by_subject.values()])
            low, high = cluster_interval(means) if len(means) >= FEWEST else (None, None)
            yield CardScore(region, metric, evidence.unit(region, metric), float(means.mean()), low, high, len(means))


def _warn(read: Sequence[_Read]) -> Iterator[str]:
    """Say why scores of different models are no comparison."""
    tested = [{row.case for row in one.evidence.rows} for one in read]
    if len({frozenset(cases) for cases in tested if cases}) > 1:
        yield "the models were scored on different cases: their scores are no comparison"
    if len({(one.evidence.plan.sources, one.evidence.plan.target) for one in read}) > 1:
        yield "the models make different images of different sources"
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
        yield f"{card.place}"
        for name, words in card.facts.items():
            yield f"  {name}: {words}"
        for score in card.scores:
            yield f"  {score.region}, {score.metric}: {score}"
        if not card.scores:
            yield "  scores: none; give what chiasm run or evaluate wrote to see some"
        yield ""
    if len(found.cards) > 1:
        yield from _side_by_side(found.cards)
    yield from (f"warning: {sentence}" for sentence in found.warnings)


def _side_by_side(cards: Sequence[ModelCard]) -> Iterator[str]:
    """Set the scores of several models as a table: a line for each score, a column for each model."""
    shown = [{f"{score.region}, {score.metric}": str(score) for score in card.scores} for card in cards]
    lines = [["", *(str(card.place) for card in cards)]]
    lines += [[name, *(card.facts[name] for card in cards)] for name in ("method", "images")]
    lines += [
        [name, *(scores.get(name, "-") for scores in shown)] for name in dict.fromkeys(chain.from_iterable(shown))
    ]
    lines.append(["sha256", *(card.facts["sha256 of the model"][:SHOWN] for card in cards)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()
