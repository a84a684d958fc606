"""One case as one page to look through: linked panes, values under the cursor, places to jump to.

The page is one file that needs no network.  Its volumes are cut to the mask's
box and rounded to a step that the page states, so that it stays below ten
megabytes.  Where the browser cannot draw volumes, or the viewer's script was
not there when the page was written, still slices are shown and the page says
why.  The same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, box_of, grown
from chiasm.evaluation.kept import KeptImage
from chiasm.heap import give_back
from chiasm.reports.case_scores import CaseScore, show_score
from chiasm.reports.case_volumes import MARGIN_MM, REGIONS, Packed, pack_volumes, to_text
from chiasm.reports.drawing import label_with, show_unit
from chiasm.reports.gallery import (
    MARGIN,
    SPREAD,
    CutCase,
    GalleryCase,
    check_shapes,
    check_window,
    cut_case,
    round_up,
    show_gallery,
)
from chiasm.reports.jumps import IN_LESION, IN_MASK, Jump, list_jumps
from chiasm.reports.pages import render_page, script_data
from chiasm.storage import write_text
from chiasm.volumes import Geometry, Volume, canonical, crop
from chiasm.volumes.geometry import storage_axis

MOST_BYTES = 9_600_000  # of a page that is not `whole`, beside its scores
SCRIPT = "reports/static/niivue.umd.js"  # put there by hatch_build.py
LICENCES = "reports/licences/niivue.txt"

#: Name, level and width, HU.
HU_PRESETS = (
    ("Brain", 40, 80),
    ("Stroke", 35, 40),
    ("Subdural", 75, 215),
    ("Soft tissue", 50, 400),
    ("Bone", 600, 2800),
    ("Lung", -600, 1500),
)


Address = tuple[str, str]  # of a case's page, beside the others, and the case's name


@dataclass(frozen=True, eq=False)
class CasePage:
    """What a page shows; the volumes lie on one grid, shape (I, J, K) each, in any axis order.

    Attributes:
        case: The case's id.
        title: Of the page.
        source: The image that was given, in its own units.
        real: The image that was to be made, or None.
        synthetic: The image that was made.
        expected_error: Expected absolute error in `unit`, or None.
        mask: Voxels that were scored.
        lesion: Labelled voxels, or None.
        affine: Voxel index to world mm, RAS+, shape (4, 4).
        unit: Of `real`, `synthetic` and `expected_error`; "HU" adds presets of the window.
        window: Lowest and highest shown value, the same for real and synthetic.
        scale: What one `unit` is in the numbers of `real`, `synthetic` and `expected_error`.
        source_name: What the source is, such as "t1".
        target_name: What real and synthetic are, such as "t2" or "ct".
        made_by: Which training made the synthetic image, in words.
        scores: This case against the cohort, see `against_cohort`.
        warnings: Sentences that a reader must see first.
        report: Relative address of the report, or None.
        previous: Relative address and name of the case before, or None.
        following: The same of the case after.
        whole: Keep the volumes uncut and as fine as 16 bits allow, however large the page becomes.
        spread: Standard deviation of the images of several models in `unit`, or None.
        part: The box in larger volumes, and their shape, of which these are a part; None where they are whole.

    Raises:
        ValueError: If the volumes' shapes differ, the affine is no 4 x 4 or the window does not rise.
    """

    case: str
    title: str
    source: NDArray[Any] | KeptImage
    real: NDArray[Any] | KeptImage | None
    synthetic: NDArray[Any] | KeptImage
    expected_error: NDArray[Any] | KeptImage | None
    mask: NDArray[np.bool_]
    lesion: NDArray[np.bool_] | None
    affine: NDArray[np.float64]
    unit: str
    window: tuple[float, float]
    scale: float = 1.0
    source_name: str = ""
    target_name: str = ""
    made_by: str = ""
    scores: Sequence[CaseScore] = ()
    warnings: Sequence[str] = ()
    report: str | None = None
    previous: Address | None = None
    following: Address | None = None
    whole: bool = False
    spread: NDArray[Any] | KeptImage | None = None
    part: tuple[Box, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        images = (self.source, self.real, self.synthetic, self.expected_error, self.spread)
        whole = [image for image in images if not isinstance(image, KeptImage)]
        check_shapes(self.case, (*whole, self.mask, self.lesion))
        if np.shape(self.affine) != (4, 4):
            raise ValueError(f"the affine of case {self.case} must be 4 x 4, not {np.shape(self.affine)}")
        check_window(self.case, self.window)


class PackedPage(NamedTuple):
    """What a case's page shows but for its scores and its neighbours: small enough to be kept until those are known.

    Attributes:
        facts: Words and numbers of the page, as they go into JSON.
        volumes: Names to files of the viewer; none without its script.
        cut: Slices and errors, for the page and for a report's gallery.
    """

    facts: dict[str, Any]
    volumes: Mapping[str, bytes]
    cut: CutCase


def write_case_page(path: Path, page: CasePage) -> Path:
    """Write a case's page as one HTML file that needs nothing else.

    Args:
        path: Where it will stand, such as `RUN/cases/CASE.html`.
        page: What it shows.

    Returns:
        `path`.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    write_text(path, render_case_page(page))
    return path


def render_case_page(page: CasePage) -> str:
    """Return a case's page as HTML that needs nothing else."""
    return finish_page(pack_page(page), page.scores, page.previous, page.following)


def finish_page(
    packed: PackedPage, scores: Sequence[CaseScore], previous: Address | None, following: Address | None
) -> str:
    """Return a packed page as HTML, with the case's scores beside the cohort's, and links to the pages beside it."""
    script, licences = viewer_script()
    return render_page(
        "case.html",
        {
            **packed.facts,
            "previous": previous,
            "following": following,
            "scores": [show_score(score) for score in scores],
            "still": show_gallery([packed.cut], None),
            "script": script,
            "licences": licences,
            "volumes": {name: to_text(file) for name, file in packed.volumes.items()},
            "settings": script_data(packed.facts["settings"]) if packed.volumes else "",
        },
    )


def pack_page(page: CasePage) -> PackedPage:
    """Pack what a case's page shows, so that its volumes can be let go."""
    near = _near(page)
    give_back()  # what laying images out took
    cut = cut_case(_still(page, near.volumes), near.starts, near.shape)
    give_back()
    facts: dict[str, Any] = {
        "kind": "case",
        "title": page.title,
        "asked": page.made_by,
        "case": page.case,
        "warnings": list(page.warnings),
        "report": page.report,
        "unit": show_unit(page.unit),
        "presets": HU_PRESETS if page.unit == "HU" else (),
        "names": _names(page),
        "has_lesion": page.lesion is not None and bool(page.lesion.any()),
        "settings": {},
    }
    bare = PackedPage(facts, {}, replace(cut, errors={}))
    if not viewer_script()[0]:
        return PackedPage(facts, {}, cut)
    room = math.inf if page.whole else MOST_BYTES - len(finish_page(bare, (), None, None).encode())
    packed = pack_volumes(near.volumes, _widths(page, cut), room)
    give_back()
    facts["settings"] = _settings(page, near, cut, packed)
    return PackedPage(facts, packed.volumes, cut)


def viewer_script() -> tuple[str, str]:
    """Read the viewer's script, compressed and as base64, and its licences; empty where it is absent."""
    script = files("chiasm") / SCRIPT
    if not script.is_file():
        return "", ""
    return _script_text(SCRIPT), (files("chiasm") / LICENCES).read_text(encoding="utf-8")


@cache
def _script_text(script: str) -> str:
    return to_text(gzip.compress((files("chiasm") / script).read_bytes(), 6, mtime=0))


# Volumes


class _Near(NamedTuple):
    """The volumes of a case in RAS order, cut to what is shown of them, and where that lies in the whole grid."""

    volumes: dict[str, Volume]
    starts: tuple[int, ...]
    shape: tuple[int, ...]


def _near(page: CasePage) -> _Near:
    """Turn every volume to RAS order and cut it around mask and lesions; the whole grid where both are empty."""
    grid = Geometry(page.mask.shape, np.asarray(page.affine, np.float64))
    lesion = np.zeros((1, 1, 1), bool) if page.lesion is None else page.lesion
    bits = (page.mask > 0) * np.uint8(IN_MASK) + (lesion > 0) * np.uint8(IN_LESION)
    regions = canonical(Volume(bits.astype(np.uint8, copy=False), grid))
    shape = regions.array.shape
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    if regions.array.any() and not page.whole:
        reach = max(MARGIN_MM, (MARGIN + 1) * max(regions.geometry.spacing_mm))
        box = grown(box_of(regions.array > 0), reach, regions.geometry.spacing_mm, shape)
    named = {
        "source": page.source,
        "real": page.real,
        "synthetic": page.synthetic,
        "expected_error": page.expected_error,
        "spread": page.spread,
    }
    scales = dict.fromkeys(("real", "synthetic", "expected_error", "spread"), page.scale)
    near = {REGIONS: Volume(np.asfortranarray(crop(regions, box).array), crop(regions, box).geometry)}
    for name, image in named.items():
        if image is not None:
            array = image.laid_out(page.mask) if isinstance(image, KeptImage) else image
            one = crop(canonical(Volume(array, grid)), box)
            near[name] = Volume(_clean(one.array, scales.get(name, 1.0)), one.geometry)
            del array, one
    near[REGIONS] = near.pop(REGIONS)  # the last: so they stand in the page
    starts = tuple(side.start for side in box)
    return _Near(near, starts, shape) if page.part is None else _Near(near, *_in_whole(starts, grid, *page.part))


def _in_whole(
    starts: Sequence[int], grid: Geometry, box: Box, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where voxels of a part lie in the whole volume in RAS order, and its shape."""
    places, sides = [], []
    axes: tuple[Literal["I", "J", "K"], ...] = ("I", "J", "K")
    for start, name in zip(starts, axes):
        axis, is_backwards = storage_axis(grid, name)
        places.append(start + (shape[axis] - box[axis].stop if is_backwards else box[axis].start))
        sides.append(shape[axis])
    return tuple(places), tuple(sides)


def _clean(array: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """Return an image by its scale, in the order of its axes, with 0 for what is no number; itself if it is so."""
    if scale == 1 and array.dtype == np.float32 and array.flags.f_contiguous and np.isfinite(array).all():
        return array
    found = np.array(array, np.float32, order="F")  # as the viewer's files hold it
    if scale != 1:
        found /= np.float32(scale)
    if not np.isfinite(found).all():
        np.nan_to_num(found, copy=False, posinf=0, neginf=0)
    return found


def _widths(page: CasePage, cut: CutCase) -> dict[str, float]:
    """Return the width of the range of each image that its levels are spread over."""
    given = {"real": page.real, "expected_error": page.expected_error, "spread": page.spread}
    widths = {"source": np.ptp(_window_of(cut, "source")), **dict.fromkeys(("real", "synthetic"), np.ptp(page.window))}
    widths["expected_error"] = 2 * _range(cut)  # an expectation: half the levels are fine enough
    widths["spread"] = 2 * _window_of(cut, SPREAD)[1]
    return {name: float(width) for name, width in widths.items() if given.get(name, page.source) is not None}


# What the page's script is given


def _names(page: CasePage) -> dict[str, str]:
    """Say which panes there are, in order, and what each shows."""
    names = {"source": label_with("Source", page.source_name)}
    if page.real is not None:
        names["real"] = label_with("Real", page.target_name)
    names["synthetic"] = label_with("Synthetic", page.target_name)
    if page.real is not None:
        names["difference"] = "Synthetic − real"
    if page.expected_error is not None:
        names["expected_error"] = "Expected error"
    if page.spread is not None:
        names["spread"] = "Spread of the models"
    return names


def _settings(page: CasePage, near: _Near, cut: CutCase, packed: Packed) -> dict[str, Any]:
    return {
        "unit": show_unit(page.unit),
        "names": _names(page),
        "window": list(page.window),
        "sourceWindow": list(_window_of(cut, "source")),
        "range": _range(cut),
        "spreadRange": _window_of(cut, SPREAD)[1],
        "steps": packed.steps,
        "jumps": [_place_jump(jump, packed) for jump in list_jumps(near.volumes, page.unit)],
        "packing": _describe_packing(page, packed),
        "hasLesion": bool((near.volumes[REGIONS].array & IN_LESION).any()),
    }


def _place_jump(jump: Jump, packed: Packed) -> dict[str, Any]:
    """Find the voxel of the packed volumes that is nearest to a place worth a look."""
    place = [(at - start) / by for at, start, by in zip(jump.voxel, packed.starts, packed.stride)]
    kept = [min(max(round(at), 0), side - 1) for at, side in zip(place, packed.shape)]
    return {"label": jump.label, "detail": jump.detail, "voxel": kept}


def _describe_packing(page: CasePage, packed: Packed) -> str:
    """Say what rounding, thinning and cutting did to the volumes."""
    steps = ", ".join(f"{name} {step:g}" for name, step in packed.steps.items())
    sentences = [f"Values in this page are rounded: {steps}."]
    if packed.stride != (1, 1, 1):
        sentences.append(f"To keep the page small, one voxel in {' × '.join(map(str, packed.stride))} is kept.")
    if not page.whole:
        sentences.append("The volumes are cut to the mask.")
    return " ".join(sentences)


def _still(page: CasePage, volumes: Mapping[str, Volume]) -> GalleryCase:
    regions = volumes[REGIONS]
    return GalleryCase(
        case=page.case,
        source=volumes["source"].array,
        real=volumes["real"].array if "real" in volumes else None,
        synthetic=volumes["synthetic"].array,
        expected_error=volumes["expected_error"].array if "expected_error" in volumes else None,
        spread=volumes["spread"].array if "spread" in volumes else None,
        mask=(regions.array & IN_MASK) > 0,
        lesion=None if page.lesion is None else (regions.array & IN_LESION) > 0,
        spacing_mm=regions.geometry.spacing_mm,
        unit=page.unit,
        window=page.window,
    )


def _window_of(cut: CutCase, label: str) -> tuple[float, float]:
    """Return the shown range of a column of pictures; that from 0 to 1 where there is none."""
    return next((look.window for look in cut.looks if look.label == label and look.window), (0.0, 1.0))


def _range(cut: CutCase) -> float:
    """Find the highest shown difference and expected error, one for both: equal brightness means equal size."""
    return float(f"{round_up(cut.error_range or 0.0):.3g}")
