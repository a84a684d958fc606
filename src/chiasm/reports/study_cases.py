"""Cases of a study to look at: the images of its methods, the difference of their errors, and the attention's weight.

One row of pictures for each case, of the axial slice with most of the lesion.  The weight is made anew by the model of
the run, where that is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.errors import ChiasmError
from chiasm.evaluation.loading import EvaluationCase, PredictionFolder, load_case
from chiasm.evaluation.rows import Row
from chiasm.evaluation.scoring import reporting_unit
from chiasm.evaluation.weight_map import describe_weight, weight_map, why_no_weight
from chiasm.prediction.folders import Predictor, load
from chiasm.prediction.manifest import Entry
from chiasm.recipe import Attention, read_recipe
from chiasm.reports.curves import read_history
from chiasm.reports.drawing import show_number, show_unit, with_unit
from chiasm.reports.gallery import (
    COVERED,
    LESION,
    MASK,
    CutCase,
    PictureColumn,
    cut_slices,
    in_ras,
    round_up,
    show_gallery,
    source_window,
)
from chiasm.volumes import Volume, canonical

ROWS = 12  # cases with pictures
DIFFERENCE_COLOURS, WEIGHT_COLOURS = "RdBu_r", "magma"  # the first: blue below zero, red above

Image = NDArray[np.float32]


class ShownMethod(NamedTuple):
    """A method whose images are shown, and its predictions with one seed, a folder for each fold."""

    name: str
    folders: Sequence[PredictionFolder]

    def find(self, case: str) -> tuple[PredictionFolder, Entry] | None:
        """Return the folder that holds a case, and what its manifest says of it; None where it was not predicted."""
        found = ((one, entry) for one in self.folders for entry in one.manifest.cases if entry.case == case)
        return next(found, None)

    @property
    def attention(self) -> Attention:
        """The settings of its attention."""
        return read_recipe(self.folders[0].model / "recipe.toml").attention


class ModelInputs(NamedTuple):
    """What models made their predictions from.

    Attributes:
        cohort: With the sources of each case.
        are_aligned: Whether sources lie on one grid already, also for models that align them.
    """

    cohort: Cohort
    are_aligned: bool


@dataclass(frozen=True)
class CasePanes:
    """Rows of pictures as a page shows them.

    Attributes:
        gallery: From `show_gallery`.
        sentences: On what the panes show, and on what is missing.
    """

    gallery: Mapping[str, Any]
    sentences: tuple[str, ...]


def show_cases(
    methods: Sequence[ShownMethod], cases: Sequence[str], cohort: Cohort, rows: Sequence[Row], inputs: ModelInputs
) -> CasePanes:
    """Show the images of a method and of those that it is compared with, a row for each of the first cases.

    Args:
        methods: The first is under assessment; the others are what it is compared with.
        cases: Predicted by the first, in the order in which they are shown.
        cohort: With the real images.
        rows: Scores; mean absolute errors are quoted.
        inputs: What the models were given.

    Raises:
        ChiasmError: If an image of a case has gone or changed.
    """
    shown, weights = cases[:ROWS], WeightMaker(methods, inputs)
    quoted = [row for row in rows if (row.region, row.metric) == (MASK, "mae")]
    gallery = show_gallery(_share_windows([_cut(case, methods, cohort, quoted, weights) for case in shown]), None)
    counted = [f"{len(shown)} of {len(cases)} cases are shown."] if len(shown) < len(cases) else []
    return CasePanes(gallery, (*_describe_images(methods), *weights.sentences, *counted))


class WeightMaker:
    """Makes the attention's weight of cases by the models of a method, each of which is loaded once.

    Attributes:
        method: Whose weight it is: the first one that has one; None where none has.
    """

    def __init__(self, methods: Sequence[ShownMethod], inputs: ModelInputs) -> None:
        reasons = {method.name: why_no_weight(method.attention) for method in methods}
        self.method = next((method for method in methods if not reasons[method.name]), None)
        self._problems = [] if self.method else [" and ".join(f"{name} {why}" for name, why in reasons.items())]
        self._inputs = inputs
        self._loaded: dict[str, Predictor] = {}

    @property
    def label(self) -> str:
        """Of its column of pictures."""
        return f"weight F of {self.method.name}" if self.method else ""

    @property
    def unit(self) -> str:
        """Of its colour bar."""
        return "mean 1" if self.method and self.method.attention.norm == "mean" else ""

    @property
    def sentences(self) -> Iterator[str]:
        """What the weight is, how often training went without it, and why it is missing where it is."""
        if self.method is not None:
            yield f"The {self.label} is {describe_weight(self.method.attention)}."
            yield from _describe_gate(self.method)
        yield from (f"No weight F is shown, since {problem}." for problem in dict.fromkeys(self._problems))

    def make(self, case: str) -> Image | None:
        """Make the weight of a case on the grid of its first source; None where that cannot be done."""
        found = None if self.method is None else self.method.find(case)
        try:
            return None if found is None else self._make(case, found[0])
        except ChiasmError as error:
            self._problems.append(f"for case {case}: {str(error).rstrip('.')}")
            return None

    def _make(self, case: str, folder: PredictionFolder) -> Image:
        key = str(folder.model)
        if key not in self._loaded:
            self._loaded[key] = load(folder.model, engine="torch")
        model, engine = self._loaded[key].model, self._loaded[key].engine
        if self._inputs.are_aligned:
            model = replace(model, plan=replace(model.plan, registration="none"))
        one = next(one for one in self._inputs.cohort.cases if one.id == case)
        volumes = [read_case_image(one, name) for name in model.plan.sources]
        mask = None if one.mask is None else read_case_labels(one, one.mask)
        return weight_map(model, volumes, mask, engine=engine, degrade=folder.manifest.degraded)


def _describe_images(methods: Sequence[ShownMethod]) -> Iterator[str]:
    """Say what the panes of images show."""
    names, seed = " and ".join(method.name for method in methods), methods[0].folders[0].manifest.seed
    yield f"Real and synthetic images share one window; those of {names} are of seed {seed}."
    first, *others = (method.name for method in methods)
    if others:
        yield f"Blue is where {first} is nearer to the real image, red where {' or '.join(others)} is; white is equal."


def _describe_gate(method: ShownMethod) -> Iterator[str]:
    """Say in which share of the steps with attention the health gate kept each fold's weight out of the training."""
    shares = {one.manifest.fold: _closed_share(one) for one in method.folders}
    known = [f"{100 * share:.0f} % (fold {fold})" for fold, share in sorted(shares.items()) if share is not None]
    if known:
        yield f"The health gate kept the weight out of the training in {', '.join(known)} of the steps with attention."


def _closed_share(folder: PredictionFolder) -> float | None:
    """Return the last share that a training logged; None where the log is gone or has none."""
    lines = read_history(folder.model.parent / "log.jsonl")
    return next((line["gate_closed_share"] for line in reversed(lines) if "gate_closed_share" in line), None)


# One case


class _Loaded(NamedTuple):
    """A case with the prediction of a method, and the folder of that prediction."""

    case: EvaluationCase
    folder: PredictionFolder

    @property
    def scale(self) -> np.float32:
        """What images are divided by to be in the unit of reports."""
        return np.float32(reporting_unit(self.folder.plan)[1])

    @property
    def error(self) -> Image:
        """The absolute error in the unit of reports."""
        difference: Image = (self.case.prediction - self.case.target) / self.scale
        return np.abs(difference)


class _Pane(NamedTuple):
    """A column of pictures, and the volume that one case shows there, shape (I, J, K)."""

    look: PictureColumn
    image: NDArray[Any]


def _cut(
    case: str, methods: Sequence[ShownMethod], cohort: Cohort, rows: Sequence[Row], weights: WeightMaker
) -> CutCase:
    """Cut what is shown of a case out of its volumes, so that these can be let go."""
    loaded = _load(case, methods, cohort)
    one = loaded[methods[0].name].case
    panes = [*_panes_of_images(one, loaded), *_pane_of_weight(one, weights.make(case), weights)]
    volumes = {pane.look.label: pane.image for pane in panes} | {MASK: one.mask}
    if one.labels is not None:
        volumes[LESION] = one.labels > 0
    grid = one.grid
    spacing_mm = canonical(Volume(one.mask, grid)).geometry.spacing_mm
    in_order = {name: in_ras(image, grid) for name, image in volumes.items()}
    planes, slices = cut_slices(in_order, spacing_mm, names=("axial",))
    missing = tuple(f"There is no image of {method.name}." for method in methods if method.name not in loaded)
    looks = tuple(pane.look for pane in panes)
    return CutCase(case, "", _quote_errors(case, loaded, rows), looks, planes, None, missing, slices)


def _load(case: str, methods: Sequence[ShownMethod], cohort: Cohort) -> dict[str, _Loaded]:
    """Load a case with the prediction of each method that made one."""
    found = {method.name: method.find(case) for method in methods}
    return {
        name: _Loaded(load_case(*place, cohort, with_labels=True, naive=False), place[0])
        for name, place in found.items()
        if place is not None
    }


def _panes_of_images(one: EvaluationCase, loaded: Mapping[str, _Loaded]) -> Iterator[_Pane]:
    """Show source, real and synthetic images, and the error of the first method minus that of each other one."""
    (assessed, first), *others = loaded.items()
    (low, high), unit = first.folder.plan.target_range, show_unit(reporting_unit(first.folder.plan)[0])
    window = (float(low / first.scale), float(high / first.scale))
    source = one.source.laid_out(one.mask)
    yield _Pane(PictureColumn("source", source_window(source, one.mask), "gray", "own units"), source)
    yield _Pane(PictureColumn("real", window, "gray", unit), one.target / first.scale)
    for name, each in loaded.items():
        yield _Pane(PictureColumn(f"synthetic, {name}", window, "gray", unit), each.case.prediction / each.scale)
    for name, other in others:
        label = f"error of {assessed} minus error of {name}; blue = {assessed} better"
        difference = first.error - other.error
        end = _end(np.abs(difference), one.mask)
        yield _Pane(PictureColumn(label, (-end, end), DIFFERENCE_COLOURS, unit, inside=True), difference)


def _pane_of_weight(one: EvaluationCase, weight: Image | None, weights: WeightMaker) -> Iterator[_Pane]:
    if weight is not None:
        window = (0.0, _end(weight, one.mask))
        yield _Pane(PictureColumn(weights.label, window, WEIGHT_COLOURS, weights.unit, inside=True), weight)


def _end(image: Image, mask: NDArray[np.bool_]) -> float:
    """Return the end of a window that holds nearly all voxels of a mask."""
    return round_up(float(np.quantile(image[mask], COVERED))) if mask.any() else 1.0


def _share_windows(cases: Sequence[CutCase]) -> list[CutCase]:
    """Give differences and weights one window in all cases, so that equal colours are equal values."""
    looks = chain.from_iterable(case.looks for case in cases)
    shared = [look for look in looks if look.colours in (DIFFERENCE_COLOURS, WEIGHT_COLOURS)]
    widest = {look.label: look for look in sorted(shared, key=lambda look: look.window[1] if look.window else 0.0)}
    return [replace(case, looks=tuple(widest.get(look.label, look) for look in case.looks)) for case in cases]


def _quote_errors(case: str, loaded: Mapping[str, _Loaded], rows: Sequence[Row]) -> str:
    """Quote the error of each method in a case, of the seed that is shown."""
    quoted = []
    for name, one in loaded.items():
        seed = one.folder.manifest.seed
        mine = (row for row in rows if (row.case, row.method, row.seed) == (case, name, seed))
        quoted += [f"{name} {with_unit(show_number(row.value), row.unit)}" for row in list(mine)[:1]]
    return f"Mean absolute error in the mask: {', '.join(quoted)}." if quoted else ""
