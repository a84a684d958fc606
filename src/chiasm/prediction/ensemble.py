"""Several models of one task as one: the mean of their images, and how far they disagree.

Each model prepares the scan by its own plan and predicts it; the images are averaged in the unit of the first model.
The expected error of the mean is the mean of the models' expected errors.  That is a bound, not a fit: for any true
value, the error of a mean of predictions is at most the mean of their errors (triangle inequality).  So where each map
is right on average, their mean is not too small.  The spread over models is written beside it; it is no error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import RunError, unknown
from chiasm.methods import title_of
from chiasm.prediction.engines import Engine
from chiasm.prediction.manifest import Role
from chiasm.prediction.model import Model
from chiasm.prediction.passes import scatter
from chiasm.prediction.synthesis import Synthesis, synthesise
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.out_of_distribution import BEGINNING
from chiasm.preparation.plan import Plan
from chiasm.recipe import Average
from chiasm.registration.cohort import align_sources
from chiasm.volumes import Volume

EXPECTED = "mean of the models' expected errors"

#: Properties that models must share, in words, and the fields of their plans.
SHARED: Mapping[str, str] = {
    "sources": "sources",
    "target": "target",
    "unit": "target_unit",
    "intensity convention of the sources": "source_kinds",
    "intensity convention of the target": "target_kind",
    "window in HU": "window_hu",
    "rule for the mask": "mask_rule",
    "use of mask files": "mask_files",
    "thick slices": "degradation",
    "registration of the sources": "registration",
    "way to read files": "reading",
}
#: A role that a case has for all models together if it has it for one: the first that is found here.
STRONGEST: tuple[Role, ...] = ("train", "validation", "out-of-fold", "locked", "test")


class Moments:
    """Mean and standard deviation (n - 1) of arrays, holding one at a time; equal ones give exactly 0.

    Reference:
        Welford, Note on a method for calculating corrected sums of squares, 1962.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(())
        self._squares: NDArray[np.float64] = np.zeros(())

    def add(self, array: NDArray[Any]) -> None:
        """Add an array of the shape of the others."""
        self.count += 1
        change = array - self.mean
        self.mean = self.mean + change / self.count
        self._squares = self._squares + change * (array - self.mean)

    def spread(self) -> NDArray[np.float32]:
        """Return the standard deviation.

        Raises:
            ValueError: If there are fewer than two arrays.
        """
        if self.count < 2:
            raise ValueError(f"a spread needs at least two images, not {self.count}")
        return np.sqrt(self._squares / (self.count - 1)).astype(np.float32)


def check_agreement(models: Sequence[Model], runs: Sequence[Path]) -> None:
    """Refuse models whose images cannot be averaged, and a model that is given twice.

    Args:
        models: One or several.
        runs: Their folders.

    Raises:
        RunError: If two of them differ in what `SHARED` lists, or are the same.
    """
    first = models[0].plan
    for model, run in zip(models[1:], runs[1:]):
        for words, field in SHARED.items():
            there, expected = getattr(model.plan, field), getattr(first, field)
            if there != expected:
                raise RunError(
                    f"cannot be averaged with {runs[0]}: they differ in {words}",
                    path=run,
                    reason="other-models",
                    found=_in_words(there),
                    expected=_in_words(expected),
                    hint="Predict with each alone.",
                )
    hashes = [model.sha256 for model in models]
    twice = next((run for place, run in enumerate(runs) if hashes[place] in hashes[:place]), None)
    if twice is not None:
        raise RunError("is the same model as one before it", path=twice, reason="same-model", hint="Name it once.")


def _in_words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def average_models(
    models: Sequence[Model],
    volumes: Sequence[Volume],
    *,
    mask: Volume | None = None,
    engine: Engine,
    degrade: bool = False,
    average: Average | None = None,
) -> Synthesis:
    """Predict a volume with several models, and average their images inside the masks of all.

    Args:
        models: At least 2, which `check_agreement` accepts; the first one's unit holds.
        volumes: As for `synthesise`, as all others.
        mask: Valid voxels on the first one's grid.
        engine: Device and precision.
        degrade: For super-resolution: whether slices are thin and must be made thick first.
        average: "flip" for the mean over each volume and its mirror image; as each recipe says by default.

    Raises:
        ChiasmError: As `synthesise`.
        ValueError: If there are fewer than two models.
    """
    plan = models[0].plan
    volumes, moved = align_sources(volumes, plan.sources, plan.registration)  # once for all
    found = _Found()
    for model in models:
        alone = replace(model, plan=replace(model.plan, registration="none"))
        made = synthesise(alone, volumes, mask=mask, engine=engine, degrade=degrade, average=average)
        found.add(_in_unit_of(made, model.plan, plan))
    warnings = (*moved, *shared_warnings(found.warnings))
    return found.sum_up(plan.target_background, warnings)


def common_average(asked: str, models: Sequence[Model]) -> Average:
    """Return how each model's predictions are averaged over mirror images.

    Args:
        asked: "flip", "none", or "auto" for what the recipes say.
        models: One or several.

    Raises:
        RunError: If "auto" means different averages for several models.
        RecipeError: If the name is unknown.
    """
    if asked not in ("auto", *get_args(Average)):
        raise unknown("average", asked, ("auto", *get_args(Average)))
    if asked != "auto":
        return cast(Average, asked)
    chosen = [model.recipe.generator.average for model in models]
    if len({*chosen}) > 1:
        raise RunError(
            "the models were made for different averages of mirror images",
            reason="average",
            found=", ".join(chosen),
            hint="Say which: chiasm predict, export or serve --average none, or average='none' in Python.",
        )
    return chosen[0]


class TargetUnit(NamedTuple):
    """The unit of a model's image among several models.

    Attributes:
        reference: Its inverse converts a normalised image to the unit.
        size_of_one: How many raw units a normalised unit of an error has.
    """

    reference: IntensityMap
    size_of_one: float


def target_unit_of(plan: Plan, first: Plan) -> TargetUnit:
    """Return the unit in which a model's image is averaged: that of the first model, or its own if both have one.

    MR has no unit, so each model's images have the unit of its own training cases.

    Args:
        plan: Of the model.
        first: Of the first model.
    """
    own, wanted = plan.target_reference, first.target_reference
    is_own = own == wanted or first.own is not None or first.target_unit == "HU"
    return TargetUnit(own if is_own else wanted, _size_of_one(plan if is_own else first))


def _in_unit_of(made: Synthesis, plan: Plan, first: Plan) -> Synthesis:
    """Convert a model's image and map to the unit of the first model; both have the same normalised intensities."""
    own, unit = plan.target_reference, target_unit_of(plan, first)
    if unit.reference == own:
        return made
    inside = made.mask.array > 0
    values = unit.reference.invert(own.apply(made.image.array[inside]))
    image = Volume(scatter(values, inside, first.target_background), made.image.geometry)
    if made.expected_error is None:
        return replace(made, image=image)
    ratio = unit.size_of_one / _size_of_one(plan)
    error = Volume((made.expected_error.array * ratio).astype(np.float32), made.expected_error.geometry)
    return replace(made, image=image, expected_error=error)


def _size_of_one(plan: Plan) -> float:
    """Return how many raw units of the target one normalised unit has, on average over its range."""
    return float(np.ptp(plan.target_range) / np.ptp(plan.target_reference.apply(np.array(plan.target_range))))


class _Found:
    """The predictions of several models for one scan: sums at the voxels of the first one's mask."""

    def __init__(self) -> None:
        self.images, self.errors = Moments(), Moments()
        self.warnings: list[tuple[str, ...]] = []
        self.engines: list[str] = []
        self.first: Synthesis | None = None
        self.all_asked: NDArray[np.bool_] = np.zeros((), np.bool_)

    def add(self, made: Synthesis) -> None:
        """Add the prediction of one more model, in the unit of the first."""
        asked = made.mask.array > 0
        if self.first is None:
            self.first, self.all_asked = made, asked
            self.inside = asked
        self.all_asked = self.all_asked & asked
        self.images.add(made.image.array[self.inside])
        if made.expected_error is not None:
            self.errors.add(made.expected_error.array[self.inside])
        self.warnings.append(made.warnings)
        self.engines.append(made.engine)

    def sum_up(self, background: float, warnings: Sequence[str]) -> Synthesis:
        """Lay out mean, spread and expected error."""
        assert self.first is not None
        grid, kept = self.first.image.geometry, self.all_asked[self.inside]

        def laid_out(values: NDArray[Any], outside: float = 0.0) -> Volume:
            return Volume(scatter(values[kept].astype(np.float32), self.all_asked, outside), grid)

        lacking = self.images.count - self.errors.count
        if lacking:
            warnings = [*warnings, _without_map(lacking, self.images.count)]
        return Synthesis(
            laid_out(self.images.mean, background),
            None if lacking else laid_out(self.errors.mean),
            Volume(self.all_asked, grid),
            tuple(warnings),
            self.first.mask_rule,
            "; ".join(dict.fromkeys(self.engines)),
            spread=laid_out(self.images.spread()),
        )


def _without_map(lacking: int, count: int) -> str:
    return f"{lacking} of {count} models have no expected-error map, so their mean image has none"


def shared_warnings(warnings: Sequence[Sequence[str]]) -> list[str]:
    """Return each sentence once, with the numbers of its models unless all models share it.

    Of warnings that the input is out of distribution the longest stands for all: models find nearly the same.

    >>> shared_warnings([["a"], ["a", "b"]])
    ['a', 'model 2: b']
    """
    odd = [sentence for sentences in warnings for sentence in sentences if sentence.startswith(BEGINNING)]
    one = max(odd, key=len, default="")
    whose: dict[str, list[str]] = {}
    for number, sentences in enumerate(warnings, 1):
        for sentence in dict.fromkeys(one if sentence in odd else sentence for sentence in sentences):
            whose.setdefault(sentence, []).append(str(number))
    every = len(warnings)
    return [
        sentence if len(numbers) == every else f"model {', '.join(numbers)}: {sentence}"
        for sentence, numbers in whose.items()
    ]


class Named(NamedTuple):
    """The name of a group of models, and one hash for all of them.

    Attributes:
        method: As tables name it.
        sha256: Of one model's card, or of the hashes of several.
        titles: What readers call their methods, each once.
    """

    method: str
    sha256: str
    titles: str


def name_of(models: Sequence[Model]) -> Named:
    """Name one model by its method and its card, and several by their number and the hash of their hashes."""
    methods = list(dict.fromkeys(model.recipe.method for model in models))
    titles = " and ".join(map(title_of, methods))
    if len(models) == 1:
        return Named(methods[0], models[0].sha256, titles)
    name = f"mean-of-{len(models)}-{methods[0]}" if len(methods) == 1 else f"mean-of-{len(models)}"
    return Named(name, hashlib.sha256("\n".join(model.sha256 for model in models).encode()).hexdigest(), titles)


def common_roles(roles: Iterable[Mapping[str, Role]]) -> dict[str, Role]:
    """Return the common role of each case for several models: a case that one model learnt from is no test case.

    >>> common_roles([{"a": "test", "b": "test"}, {"a": "train", "c": "test"}])
    {'a': 'train', 'b': 'test', 'c': 'test'}
    """
    found: dict[str, Role] = {}
    for one in roles:
        for case, role in one.items():
            found[case] = min(found.get(case, role), role, key=STRONGEST.index)
    return found
