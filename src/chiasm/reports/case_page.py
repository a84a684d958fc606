"""One case as one page to look through: linked panes, values under the cursor, places to jump to.

The page is one file that needs no network.  Its volumes are cut to the mask's
box and rounded to a step that the page states, so that it stays below ten
megabytes.  Where the browser cannot draw volumes, or the viewer's script was
not there when the page was written, still slices are shown and the page says
why.  The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, box_of
from chiasm.reports.case_scores import CaseScore, show_score
from chiasm.reports.drawing import label_with, show_unit
from chiasm.reports.gallery import (
    COVERED,
    SOURCE_WINDOW,
    GalleryCase,
    check_shapes,
    check_window,
    rising,
    round_up,
    show_gallery,
)
from chiasm.reports.jumps import IN_LESION, IN_MASK, Jump, list_jumps
from chiasm.reports.pages import render_page, script_data
from chiasm.storage import write_text
from chiasm.volumes import Geometry, Volume, canonical, crop

MARGIN_MM = 6.0  # around the mask's box
MOST_BYTES = 9_600_000  # of a page that is not `whole`
LEVELS = (4096, 2048, 1024, 512, 256)  # steps inside the window, the finest that fits is taken
MOST_HALVINGS = 9  # of the number of voxels
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
        source_name: What the source is, such as "t1".
        target_name: What real and synthetic are, such as "t2" or "ct".
        scores: This case against the cohort, see `against_cohort`.
        warnings: Sentences that a reader must see first.
        report: Relative address of the report, or None.
        previous: Relative address and name of the case before, or None.
        following: The same of the case after.
        whole: Keep the volumes uncut and as fine as 16 bits allow, however large the page becomes.

    Raises:
        ValueError: If the volumes' shapes differ, the affine is no 4 x 4 or the window does not rise.
    """

    case: str
    title: str
    source: NDArray[Any]
    real: NDArray[Any] | None
    synthetic: NDArray[Any]
    expected_error: NDArray[Any] | None
    mask: NDArray[np.bool_]
    lesion: NDArray[np.bool_] | None
    affine: NDArray[np.float64]
    unit: str
    window: tuple[float, float]
    source_name: str = ""
    target_name: str = ""
    scores: Sequence[CaseScore] = ()
    warnings: Sequence[str] = ()
    report: str | None = None
    previous: tuple[str, str] | None = None
    following: tuple[str, str] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        check_shapes(self.case, (self.source, self.real, self.synthetic, self.expected_error, self.mask, self.lesion))
        if np.shape(self.affine) != (4, 4):
            raise ValueError(f"the affine of case {self.case} must be 4 x 4, not {np.shape(self.affine)}")
        check_window(self.case, self.window)


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
    in_ras = _canonical(page)
    still = show_gallery([_still(page, in_ras)], None)
    script, licences = viewer_script()
    content: dict[str, Any] = {
        "kind": "case",
        "title": page.title,
        "asked": "",
        "case": page.case,
        "warnings": page.warnings,
        "report": page.report,
        "previous": page.previous,
        "following": page.following,
        "scores": [show_score(score) for score in page.scores],
        "still": still,
        "unit": show_unit(page.unit),
        "presets": HU_PRESETS if page.unit == "HU" else (),
        "names": _names(page),
        "has_lesion": page.lesion is not None and bool(page.lesion.any()),
        "script": script,
        "licences": licences,
        "volumes": {},
        "settings": "",
    }
    if script:
        content |= _viewer_content(page, in_ras, len(render_page("case.html", content).encode()))
    return render_page("case.html", content)


def _viewer_content(page: CasePage, in_ras: Mapping[str, Volume], without: int) -> dict[str, Any]:
    """Pack volumes and settings for the viewer; `without` them the page has so many bytes."""
    packed = _pack(page, in_ras, math.inf if page.whole else MOST_BYTES - without)
    return {"volumes": packed.volumes, "settings": script_data(_settings(page, in_ras, packed))}


def viewer_script() -> tuple[str, str]:
    """Read the viewer's script, compressed and as base64, and its licences; empty where it is absent."""
    script = files("chiasm") / SCRIPT
    if not script.is_file():
        return "", ""
    return _packed(SCRIPT), (files("chiasm") / LICENCES).read_text(encoding="utf-8")


@cache
def _packed(script: str) -> str:
    return _base64((files("chiasm") / script).read_bytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


# Volumes


def _canonical(page: CasePage) -> dict[str, Volume]:
    """Turn every volume to RAS order; boxes are not cut yet."""
    grid = Geometry(page.mask.shape, np.asarray(page.affine, np.float64))
    named = {
        "source": page.source,
        "real": page.real,
        "synthetic": page.synthetic,
        "expected_error": page.expected_error,
    }
    found = {
        name: canonical(Volume(_finite(array.astype(np.float32, copy=False)), grid))
        for name, array in named.items()
        if array is not None
    }
    lesion = np.zeros_like(page.mask) if page.lesion is None else page.lesion
    regions = (page.mask > 0) * np.uint8(IN_MASK) + (lesion > 0) * np.uint8(IN_LESION)
    return found | {"regions": canonical(Volume(regions.astype(np.uint8), grid))}


def _finite(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an image with 0 for what is no finite number; itself where all are."""
    if np.isfinite(array).all():
        return array
    cleaned: NDArray[np.float32] = np.nan_to_num(array, posinf=0, neginf=0)
    return cleaned


class Packed(NamedTuple):
    """The volumes as they stand in the page: names to base64, the grid, and what rounding and thinning did."""

    volumes: dict[str, str]
    geometry: Geometry
    starts: tuple[int, int, int]
    stride: tuple[int, int, int]
    steps: dict[str, float]


def _pack(page: CasePage, in_ras: Mapping[str, Volume], room: float) -> Packed:
    """Cut, round and compress: as fine as fits into `room` bytes, the coarsest where nothing does."""
    regions = in_ras["regions"]
    box = _box(np.ones_like(regions.array) if page.whole else regions.array, regions.geometry.spacing_mm)
    inside = {name: crop(volume, box) for name, volume in in_ras.items()}
    tries = list(_fineness(regions.geometry.spacing_mm, room))
    rooms = (*repeat(room, len(tries) - 1), math.inf)  # the coarsest is taken however large it is
    for (stride, levels), most in zip(tries, rooms, strict=True):
        steps = _steps(page, inside, levels)
        thin = {name: _thinned(volume, stride) for name, volume in inside.items()}
        volumes = _encode(thin, steps, most)
        if len(volumes) == len(thin):
            break
    i, j, k = (side.start for side in box)
    return Packed(volumes, thin["regions"].geometry, (i, j, k), stride, steps)


def _encode(volumes: Mapping[str, Volume], steps: Mapping[str, float], room: float) -> dict[str, str]:
    """Write volumes as base64, all of them unless they are larger than `room` bytes together."""
    encoded: dict[str, str] = {}
    for name, volume in volumes.items():
        encoded[name] = _nifti(volume, steps.get(name))
        room -= len(encoded[name])
        if room < 0:
            return {}
    return encoded


def _steps(page: CasePage, volumes: Mapping[str, Volume], levels: int) -> dict[str, float]:
    """Choose what the values of each image are rounded to."""
    steps = {name: _step(page, name, volume.array, levels) for name, volume in volumes.items() if name != "regions"}
    if "real" in steps:  # one step, so that their difference is exact
        steps["real"] = steps["synthetic"] = max(steps["real"], steps["synthetic"])
    return steps


def _fineness(spacing_mm: Sequence[float], room: float) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Give what is tried, the finest first: rounding, then leaving out every second voxel where they lie closest."""
    if not math.isfinite(room):
        yield (1, 1, 1), LEVELS[0]
        return
    yield from zip(repeat((1, 1, 1)), LEVELS)
    stride = [1, 1, 1]
    for _ in range(MOST_HALVINGS):
        apart = [space * by for space, by in zip(spacing_mm, stride)]
        stride[min(range(3), key=lambda axis: (round(apart[axis], 3), -axis))] *= 2
        yield (stride[0], stride[1], stride[2]), LEVELS[-1]


def _box(regions: NDArray[Any], spacing_mm: Sequence[float]) -> Box:
    """Find the box around the mask and the lesions, with a margin; the whole grid where both are empty."""
    box = box_of(regions > 0) if regions.any() else box_of(np.ones_like(regions, bool))
    margins = [round(MARGIN_MM / space) for space in spacing_mm]
    i, j, k = (
        slice(max(0, side.start - margin), min(last, side.stop + margin))
        for side, margin, last in zip(box, margins, regions.shape)
    )
    return i, j, k


def _thinned(volume: Volume, stride: tuple[int, int, int]) -> Volume:
    """Keep every so many voxels along each axis, the first among them; none is interpolated."""
    if stride == (1, 1, 1):
        return volume
    affine = volume.geometry.affine.copy()
    affine[:3, :3] *= stride
    array = volume.array[:: stride[0], :: stride[1], :: stride[2]]
    return Volume(array, Geometry(array.shape, affine))


def _step(page: CasePage, name: str, array: NDArray[Any], levels: int) -> float:
    """Choose what values are rounded to: 1, 2 or 5 times a power of ten, or 1 for whole numbers."""
    low, high = _value_range(page, name)
    largest = float(np.abs(array).max())
    wanted = max((high - low) / levels, largest / 32000, 1e-30)
    if wanted < 1 and largest / 32000 < 1 and np.array_equal(array, np.rint(array)):
        return 1.0
    power = 10.0 ** math.floor(math.log10(wanted))
    return float(f"{next(power * digit for digit in (1, 2, 5, 10) if power * digit >= wanted * (1 - 1e-9)):.3g}")


def _value_range(page: CasePage, name: str) -> tuple[float, float]:
    """Return the range of an image that its levels are spread over."""
    if name == "source":
        return _source_window(page)
    if name == "expected_error":
        return 0.0, 2 * _range(page)  # an expectation: half the levels are fine enough
    return page.window


def _nifti(volume: Volume, step: float | None) -> str:
    """Write a NIfTI file as base64: 16 bits with a slope for images, bytes as they are without a step."""
    import nibabel as nib

    array = volume.array if step is None else np.rint(volume.array / step).astype(np.int16)
    image = nib.Nifti1Image(np.asfortranarray(array), volume.geometry.affine)
    header = image.header
    header.set_xyzt_units("mm")
    header.set_sform(volume.geometry.affine, code=1)
    header.set_qform(None, code=0)
    header["pixdim"][1:4] = volume.geometry.spacing_mm
    header.set_data_offset(352)
    header["scl_slope"], header["scl_inter"] = (1.0 if step is None else step), 0.0
    header["magic"] = b"n+1"
    return _base64(header.binaryblock + bytes(4) + array.tobytes(order="F"))


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
    return names


def _settings(page: CasePage, in_ras: Mapping[str, Volume], packed: Packed) -> dict[str, Any]:
    return {
        "unit": show_unit(page.unit),
        "names": _names(page),
        "window": list(page.window),
        "sourceWindow": list(_source_window(page)),
        "range": _range(page),
        "steps": packed.steps,
        "jumps": [_place_jump(jump, packed) for jump in list_jumps(in_ras, page.unit)],
        "packing": _describe_packing(page, packed),
        "hasLesion": bool((in_ras["regions"].array & IN_LESION).any()),
    }


def _place_jump(jump: Jump, packed: Packed) -> dict[str, Any]:
    """Find the voxel of the packed volumes that is nearest to a place worth a look."""
    place = [(at - start) / by for at, start, by in zip(jump.voxel, packed.starts, packed.stride)]
    kept = [min(max(round(at), 0), side - 1) for at, side in zip(place, packed.geometry.shape)]
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


def _still(page: CasePage, in_ras: Mapping[str, Volume]) -> GalleryCase:
    regions = in_ras["regions"]
    return GalleryCase(
        case=page.case,
        source=in_ras["source"].array,
        real=in_ras["real"].array if "real" in in_ras else None,
        synthetic=in_ras["synthetic"].array,
        expected_error=in_ras["expected_error"].array if "expected_error" in in_ras else None,
        mask=(regions.array & IN_MASK) > 0,
        lesion=None if page.lesion is None else (regions.array & IN_LESION) > 0,
        spacing_mm=regions.geometry.spacing_mm,
        unit=page.unit,
        window=page.window,
    )


def _source_window(page: CasePage) -> tuple[float, float]:
    values = page.source[page.mask > 0] if page.mask.any() else page.source.ravel()
    low, high = np.nanquantile(values, SOURCE_WINDOW).tolist()
    return rising(low, high)


def _range(page: CasePage) -> float:
    """Find the highest shown difference and expected error, one for both: equal brightness means equal size."""
    inside = page.mask > 0
    shown = [] if page.expected_error is None else [page.expected_error[inside]]
    if page.real is not None:
        shown.append(np.abs(np.subtract(page.synthetic, page.real, dtype=np.float32)[inside]))
    most = max((float(np.nanquantile(values, COVERED)) for values in shown if values.size), default=0.0)
    return float(f"{round_up(most):.3g}")
