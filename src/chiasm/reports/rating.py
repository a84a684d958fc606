"""A reader study: one page of shuffled slices, real and synthetic, and a key that names each of them.

The page holds no names of cases or methods and no answers.  A slice is shown once as scanned and once from each method:
cut to one box, in one window, and black outside the voxels that all methods filled.  So only the inside can show which
is which.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product, repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Cohort, Problem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.errors import ChiasmError, CohortError, RecipeError, RunError, unknown
from chiasm.evaluation.loading import EvaluationCase, PredictionFolder, load_case
from chiasm.evaluation.paired_tests import FEWEST
from chiasm.evaluation.predictions import open_predictions, open_reference
from chiasm.evaluation.rating import RESULTS
from chiasm.evaluation.reader_files import KEY, LEVELS, PAGE, REAL, Planes, StudyItem, is_key, write_key
from chiasm.locks import locked
from chiasm.methods import key_of
from chiasm.names import amount
from chiasm.outputs import refuse_data_folder, refuse_foreign, refuse_inputs, refuse_links, remove_files
from chiasm.prediction.manifest import Entry, folders_of, warn_of_seen
from chiasm.preparation.plan import Plan
from chiasm.progress import Progress, counted
from chiasm.recipe import Registration
from chiasm.registration.cohort import AlignedCohort, remove_registered
from chiasm.reports.evaluation_cases import no_cases
from chiasm.reports.evaluation_folder import REGISTERED
from chiasm.reports.gallery import in_ras
from chiasm.reports.pages import render_page, script_data
from chiasm.reports.slices import choose_slices, cut_slice, grey_address
from chiasm.storage import write_text
from chiasm.volumes import Volume, canonical

AXES: Mapping[Planes, int] = {"sagittal": 0, "coronal": 1, "axial": 2}  # that a plane's slices are counted along
MOST_REPEATED = 0.5  # share of the images
LETTERS = str.maketrans("0123456789abcdef", "bcdfghjklmnpqrst")  # tokens are no words, and no numbers to a spreadsheet
TOKEN = 10  # letters
FILES = (PAGE, KEY, *RESULTS)  # that stand in a reader study's folder

T = TypeVar("T")
Predicted = Mapping[str, tuple[PredictionFolder, Entry]]  # of one case: method to its prediction


@dataclass(frozen=True)
class StudyDesign:
    """The settings of a reader study.

    Attributes:
        slices: Of each case, at least 1.
        repeat: Share of the images that are shown a second time, 0 to 0.5.
        seed: Of the order.
        plane: In which slices are cut.
        window: Level and width in the target's unit; None takes the range of the model's plan.
        methods: Which of those that predicted, by name or code; empty takes all.
    """

    slices: int = 1
    repeat: float = 0.2
    seed: int = 0
    plane: Planes = "axial"
    window: tuple[float, float] | None = None
    methods: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse settings that are out of range.

        Raises:
            RecipeError: If a number or the plane is.
        """
        if self.plane not in AXES:
            raise unknown("plane", self.plane, list(AXES))
        if self.slices < 1:
            raise RecipeError("chiasm rate --slices must be at least 1", reason="slices", found=self.slices)
        if not 0 <= self.repeat <= MOST_REPEATED:
            raise RecipeError(
                f"chiasm rate --repeat must be from 0 to {MOST_REPEATED}", reason="repeat", found=self.repeat
            )
        if self.window is not None and not self.window[1] > 0:
            raise RecipeError("chiasm rate --window is a level and a width above 0", reason="window", found=self.window)


@dataclass(frozen=True)
class RealImages:
    """The place of the real images, and how they are read.

    Attributes:
        folder: The cohort.
        layout: By name, where the folder fits several.
        register: As in `open_reference`.
        selection: Which files are taken.
    """

    folder: Path
    layout: str | None = None
    register: Registration | None = None
    selection: Selection = field(default_factory=Selection)


class ReaderStudy(NamedTuple):
    """What was written.

    Attributes:
        page: For the raters; they need nothing else.
        key: The case and method of each image; keep it from raters.
        items: Every showing, in the order of the page.
        problems: Cases that are not shown.
        notes: What a reader of the results must know, one sentence each.
    """

    page: Path
    key: Path
    items: tuple[StudyItem, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


class _Picture(NamedTuple):
    """One image: what it is, its address on the page, and its size in mm."""

    case: str
    subject: str
    method: str
    slice: int
    address: str
    size_mm: tuple[float, float]


def write_reader_study(
    predictions: Sequence[Path],
    real: RealImages,
    out: Path,
    design: StudyDesign,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReaderStudy:
    """Write `rate.html` for raters, and `key.csv`, which names the case and method of each image.

    Args:
        predictions: Folders written by `chiasm predict`, of one or more methods; one method may have several,
            such as one for each fold, or a folder with those of several models.
        real: The cohort with the real targets.
        out: Where both files go.
        design: What is shown.
        overwrite: Whether to replace another study in `out`.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        ChiasmError: If a folder is not what it should be, the methods' images cannot stand in one window, no case
            was predicted by all methods, or `out` holds another study or files of somebody else and `overwrite`
            is False.
    """
    design.check()
    assessed = _chosen([open_predictions(folder) for folder in folders_of(predictions)], design.methods)
    _check_alike(assessed)
    by_case = _by_case(assessed)
    refuse_data_folder(out, [real.folder])
    with locked(out):
        read = [real.folder, *chain.from_iterable((one.folder, one.model) for one in assessed)]
        _make_room(out, read, overwrite=overwrite)
        aligned = open_reference(
            real.folder,
            assessed,
            out / REGISTERED,
            register=real.register,
            layout=real.layout,
            selection=real.selection,
            progress=progress,
        )
        pictures, problems = _show_cases(by_case, aligned, design, progress)
        if not pictures:
            raise no_cases("no case can be shown", problems, real.folder)
        items, addresses = _shuffled(pictures, design)
        key = write_key(out, items)  # before the page, which nobody should rate without it
        page = out / PAGE
        write_text(page, render_page(PAGE, _content(items, addresses, assessed[0].plan.target)))
    return ReaderStudy(page, key, items, tuple(problems), tuple(_notes(items, by_case)))


def _notes(items: Sequence[StudyItem], by_case: Mapping[str, Predicted]) -> Iterator[str]:
    """Note the cases that a model was trained on, and whether there are too few subjects for a test."""
    shown = sorted({item.case for item in items})
    seen = [case for case in shown if any(entry.was_seen for _, entry in by_case[case].values())]
    yield from warn_of_seen(seen, len(shown))
    if (subjects := len({item.subject for item in items})) < FEWEST:
        yield f"only {amount(subjects, 'subject')}: no difference in quality will be tested (at least {FEWEST})"


def _make_room(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse to replace other files, or a study, because its ratings could not be read any more."""
    refuse_inputs(map(out.joinpath, (*FILES, REGISTERED)), inputs, what="the study")
    refuse_links(out, FILES)
    if overwrite:
        remove_files(out, FILES)
        remove_registered(out / REGISTERED)
    elif not is_key(out / KEY):
        refuse_foreign(out, FILES, way_out="To replace them: chiasm rate --overwrite.")
    elif (out / PAGE).exists():  # a killed command may have written the key alone
        raise RunError(
            "holds a reader study; without it, its ratings cannot be read",
            path=out,
            reason="occupied",
            hint="Give another folder with -o, or replace it: chiasm rate --overwrite.",
        )


def _chosen(assessed: Sequence[PredictionFolder], methods: Sequence[str]) -> list[PredictionFolder]:
    """Keep the predictions of some methods.

    Raises:
        RecipeError: If one of them predicted nothing.
    """
    known = {one.manifest.method for one in assessed}
    for name in methods:
        if key_of(name) not in known:
            raise unknown("prediction of the method", name, sorted(known))
    wanted = set(map(key_of, methods)) or known
    return [one for one in assessed if one.manifest.method in wanted]


def _check_alike(assessed: Sequence[PredictionFolder]) -> None:
    """Refuse predictions whose images cannot be compared.

    Raises:
        RunError: If they differ in target, its unit, first source, registration or thick slices, or a method is
            called "real".
    """
    for one in assessed[1:]:
        if differing := _differing_terms(assessed[0].plan, one.plan):
            raise RunError(
                f"differs from the first folder in {' and '.join(differing)}, so their images cannot be compared",
                path=one.folder,
                reason="other-target",
            )
    if named := next((one for one in assessed if one.manifest.method == REAL), None):
        raise RunError(f"is of a method with the name {REAL}", path=named.folder, reason="name")


def _differing_terms(first: Plan, other: Plan) -> list[str]:
    """Name the properties in which the images of two models differ."""
    terms = _terms(first)
    return [name for name, value in _terms(other).items() if value != terms[name]]


def _terms(plan: Plan) -> dict[str, object]:
    return {
        "the target": plan.target,
        "the target's unit": (plan.target_unit, plan.target_kind),
        "the first source": plan.sources[0],
        "the registration": plan.registration,
        "the thick slices": plan.degradation,
    }


def _by_case(assessed: Sequence[PredictionFolder]) -> dict[str, Predicted]:
    """Collect the predictions of each case by method.

    Raises:
        RunError: If a method predicted a case twice.
    """
    found: dict[str, dict[str, tuple[PredictionFolder, Entry]]] = {}
    for one in assessed:
        for entry in one.manifest.cases:
            methods = found.setdefault(entry.case, {})
            if (before := methods.get(one.manifest.method)) is not None:
                raise RunError(
                    f"holds case {entry.case} of method {one.manifest.method}, as {before[0].folder} does",
                    path=one.folder,
                    reason="double",
                    hint="Give each method one prediction of each case.",
                )
            methods[one.manifest.method] = (one, entry)
    return {case: found[case] for case in sorted(found)}


# From volumes to pictures


def _show_cases(
    by_case: Mapping[str, Predicted], aligned: AlignedCohort, design: StudyDesign, progress: Progress | None
) -> tuple[list[_Picture], list[Problem]]:
    """Cut the pictures of every case that all methods predicted; name the others."""
    methods = sorted(set(chain.from_iterable(by_case.values())))
    lost = {problem.case for problem in aligned.problems}
    pictures: list[_Picture] = []
    problems = list(aligned.problems)
    for case in counted([case for case in by_case if case not in lost], str, progress):
        try:
            _check_complete(by_case[case], methods)
            pictures += _show_case(case, by_case[case], aligned.cohort, design)
        except ChiasmError as error:
            one, entry = next(iter(by_case[case].values()))
            path = error.path or one.folder / entry.image
            problems.append(Problem(path, error.reason, f"case {case}: {error}", case))
    return pictures, problems


def _check_complete(predicted: Predicted, methods: Sequence[str]) -> None:
    """Refuse a case that some method did not predict."""
    if lacking := [method for method in methods if method not in predicted]:
        raise CohortError(f"was not predicted by {', '.join(lacking)}", reason="unpaired")


def _show_case(case: str, predicted: Predicted, cohort: Cohort, design: StudyDesign) -> Iterator[_Picture]:
    """Cut the pictures of a case: each slice as it was scanned, and as each method made it."""
    loaded = _load_all(predicted, cohort)
    mask = np.logical_and.reduce([one.mask for one in loaded.values()])
    if not mask.any():
        raise CohortError("the methods filled no voxel in common", reason="empty-mask")
    main, plan = next(iter(loaded.values())), next(iter(predicted.values()))[0].plan
    grid, axis = main.grid, AXES[design.plane]
    shown, labels = in_ras(mask, grid), None if main.labels is None else in_ras(main.labels > 0, grid)
    low, high = _window(plan, design)
    spacing = canonical(Volume(mask, grid)).geometry.spacing_mm
    images = _in_one_unit(loaded, predicted)
    for index, (method, image) in product(choose_slices(shown, labels, axis, design.slices), images.items()):
        grey = np.where(shown, np.clip((in_ras(image, grid) - low) / (high - low), 0, 1), 0)
        pixels, size_mm = cut_slice(grey, shown, axis, index, spacing)
        yield _Picture(case, main.case.subject, method, index, grey_address(pixels), size_mm)


def _load_all(predicted: Predicted, cohort: Cohort) -> dict[str, EvaluationCase]:
    """Load what each method made of a case, with the real image."""
    return {
        method: load_case(one, entry, cohort, with_labels=True, naive=False)
        for method, (one, entry) in predicted.items()
    }


def _in_one_unit(loaded: Mapping[str, EvaluationCase], predicted: Predicted) -> dict[str, NDArray[np.float32]]:
    """Return the real image and what each method made, in the target unit of the first method's model."""
    plans = {method: one.plan for method, (one, _) in predicted.items()}
    first = next(iter(loaded))
    made = {method: _in_units_of(plans[first], plans[method], one.prediction) for method, one in loaded.items()}
    return {REAL: loaded[first].target} | made


def _window(plan: Plan, design: StudyDesign) -> tuple[float, float]:
    if design.window is None:
        return plan.target_range
    level, width = design.window
    return level - width / 2, level + width / 2


def _in_units_of(plan: Plan, other: Plan, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Convert an image from the target units of one model to those of another: training cases set them."""
    if plan.target_unit == "HU" or plan.target_reference == other.target_reference:
        return image
    return plan.target_reference.invert(other.target_reference.apply(image))


# From pictures to the page


def _shuffled(pictures: Sequence[_Picture], design: StudyDesign) -> tuple[tuple[StudyItem, ...], list[_Picture]]:
    """Put the pictures in an order that the seed sets, repeats far from their first showing, under new names.

    Order and tokens depend on what the pictures show too: the seed alone does not give them away.

    Returns:
        Every showing in the order of the page, and its picture.
    """
    known = json.dumps([design.seed, design.repeat, pictures])
    digest = hashlib.sha256(known.encode()).hexdigest()
    rng = np.random.default_rng(int(digest, 16))
    order = _permuted(pictures, rng)
    repeated = round(design.repeat * len(order))
    middle = (len(order) + repeated) // 2  # the first ones come again behind it
    later = [*zip(order[middle:], repeat(1)), *zip(order[:repeated], repeat(2))]
    shown = [*zip(order[:middle], repeat(1)), *_permuted(later, rng)]
    study = _letters(f"{digest} study")
    items = tuple(
        StudyItem(
            study,
            _letters(f"{digest} {position}"),
            position,
            one.case,
            one.subject,
            one.method,
            design.plane,
            one.slice,
            showing,
        )
        for position, (one, showing) in enumerate(shown, 1)
    )
    return items, [one for one, _ in shown]


def _permuted(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [items[index] for index in rng.permutation(len(items))]


def _letters(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:TOKEN].translate(LETTERS)


def _content(items: Sequence[StudyItem], pictures: Sequence[_Picture], target: str) -> dict[str, object]:
    """Return what the page shows; of an image no more than its token, picture and proportions."""
    shown = [
        {"token": item.token, "image": picture.address, "size": picture.size_mm}
        for item, picture in zip(items, pictures)
    ]
    study = {"study": items[0].study, "images": shown}
    return {
        "title": f"Rating {target.upper()} images",
        "kind": "reader study",
        "asked": None,
        "images": len(items),
        "levels": LEVELS,
        "study": script_data(study),
    }


def count_images(items: Sequence[StudyItem]) -> str:
    """Say how many images of what are shown, and how many come twice.

    >>> count_images([StudyItem("s", t, 1, "a", "a", m, "axial", 3, n) for t, m, n in
    ...               (("x", "real", 1), ("y", "A7", 1), ("z", "A7", 2))])
    '2 images (1 of A7, 1 of real), 1 of them twice'
    """
    counts = Counter(item.method for item in items if item.showing == 1)
    counted = ", ".join(f"{count} of {method}" for method, count in sorted(counts.items()))
    return f"{counts.total()} images ({counted}), {sum(item.showing == 2 for item in items)} of them twice"
