"""Cases to look at in a report: slices cut out of volumes, and those slices as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, box_of, grown
from chiasm.reports.drawing import png_address, show_number, show_unit
from chiasm.reports.slices import as_seen
from chiasm.volumes import Geometry, Volume, canonical

MARGIN = 4  # voxels around the mask in a picture
MOST_PIXELS = 400  # along a picture's longer side; larger slices are thinned
COVERED = 0.995  # share of the voxels inside the colour range of error and expected error
SOURCE_WINDOW = (0.005, 0.995)  # quantiles inside the mask
BEST_TO_WORST = ("best", "median", "worst")
FEWEST = 10  # voxels of a region that an error is said of
SAMPLE = 500_000  # voxels of a case and region that quantiles and bins are taken over
PLANES = {"axial": 2, "coronal": 1}  # name and axis
COUNTED_FROM = {"axial": "below", "coronal": "behind"}  # where slice 1 is, in whichever order the file has them
MASK, LESION = "mask", "lesion"
SPREAD = "spread of the models"
EXPECTED, TRUE = "expected", "true"  # errors of a region


@dataclass(frozen=True, eq=False)
class GalleryCase:
    """One case to look at: volumes on one grid in RAS order, shape (I, J, K) each.

    Attributes:
        case: Its name.
        source: The image that was given.
        real: The image that was to be made, or None where there is none.
        synthetic: The image that was made.
        expected_error: Expected absolute error in `unit`, or None.
        mask: Valid voxels; error and expected error are shown inside only.
        lesion: Labelled voxels, or None.
        spacing_mm: Distance between voxel centres along I, J and K.
        unit: Of `real`, `synthetic` and `expected_error`.
        window: Lowest and highest shown value, the same for real and synthetic.
        caption: Why this case is shown, such as "median of 6 cases".
        spread: Standard deviation of the images of several models in `unit`, or None.

    Raises:
        ValueError: If the volumes' shapes differ, or the window does not rise.
    """

    case: str
    source: NDArray[Any]
    real: NDArray[Any] | None
    synthetic: NDArray[Any]
    expected_error: NDArray[Any] | None
    mask: NDArray[np.bool_]
    lesion: NDArray[np.bool_] | None
    spacing_mm: tuple[float, float, float]
    unit: str
    window: tuple[float, float]
    caption: str = ""
    spread: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        shown = (self.source, self.real, self.synthetic, self.expected_error, self.spread, self.mask, self.lesion)
        check_shapes(self.case, shown)
        check_window(self.case, self.window)


def check_shapes(case: str, volumes: Iterable[NDArray[Any] | None]) -> None:
    """Check that the volumes of a case, those that there are, can be shown on one grid.

    Raises:
        ValueError: If their shapes differ, or are not of three axes.
    """
    shapes = {volume.shape for volume in volumes if volume is not None}
    if len(shapes) != 1 or len(shapes.pop()) != 3:
        raise ValueError(f"the volumes of case {case} must share one shape (I, J, K)")


def check_window(case: str, window: tuple[float, float]) -> None:
    """Check the lowest and the highest shown value of a case.

    Raises:
        ValueError: If the window does not rise.
    """
    if not window[0] < window[1]:
        raise ValueError(f"the window of case {case} must rise, found {window}")


# Slices out of volumes


class PictureColumn(NamedTuple):
    """How the pictures of a column are shown.

    Attributes:
        label: Above it.
        window: Lowest and highest shown value; None for the range of errors.
        colours: A colour map of matplotlib.
        unit: Of the window.
        inside: Whether only the mask is shown.
    """

    label: str
    window: tuple[float, float] | None
    colours: str
    unit: str
    inside: bool = False


class CutPlane(NamedTuple):
    """Where a slice was cut.

    Attributes:
        name: "axial" or "coronal".
        place: Index of the slice.
        depth: How many slices there are.
        size: Voxels across and up.
        spacing_mm: Between voxels across and up.
    """

    name: str
    place: int
    depth: int
    size: tuple[int, int]
    spacing_mm: tuple[float, float]


@dataclass(frozen=True, eq=False)
class CutCase:
    """What a gallery shows of a case: a few slices of its volumes, and errors of some of its voxels.

    Attributes:
        case: Its name.
        unit: Of real and synthetic images and of errors.
        caption: Why this case is shown.
        looks: The columns of pictures.
        planes: The rows.
        error_range: Highest error that is shown, of this case alone; None where its mask is empty.
        missing: Sentences on what the case lacks.
        slices: "axial real" and so on to a slice as a picture lies, shape (rows, columns); also of "mask" and "lesion".
        errors: "lesions expected", "lesions true" and so on to errors of the same voxels, shape (voxels,).
    """

    case: str
    unit: str
    caption: str
    looks: tuple[PictureColumn, ...]
    planes: tuple[CutPlane, ...]
    error_range: float | None
    missing: tuple[str, ...]
    slices: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    errors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def cut_case(case: GalleryCase, starts: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None) -> CutCase:
    """Cut out of a case's volumes what a gallery shows, so that the volumes can be let go.

    Args:
        case: Its volumes, or the part of them around the mask.
        starts: Where that part begins in the whole volume, in voxels.
        shape: Of the whole volume; None where it is not a part.
    """
    volumes, looks = _columns(case)
    planes, slices = cut_slices(volumes, case.spacing_mm, starts=starts, shape=shape)
    if case.real is not None:
        for plane in planes:
            made, real = (slices[f"{plane.name} {label}"] for label in ("synthetic", "real"))
            slices[f"{plane.name} |error|"] = np.abs(np.subtract(made, real, dtype=np.float32))
    return CutCase(
        case.case,
        case.unit,
        case.caption,
        looks,
        planes,
        _error_range(case),
        tuple(_missing(case)),
        slices,
        _errors_by_region(case),
    )


def cut_slices(
    volumes: Mapping[str, NDArray[Any]],
    spacing_mm: tuple[float, float, float],
    *,
    names: Iterable[str] = PLANES,
    starts: Sequence[int] = (0, 0, 0),
    shape: Sequence[int] | None = None,
) -> tuple[tuple[CutPlane, ...], dict[str, NDArray[Any]]]:
    """Cut the slices that show most of the lesion inside the mask, or the middle of the mask, around its box.

    Args:
        volumes: By name, on one grid in RAS order, shape (I, J, K) each; "mask" is among them, "lesion" may be.
        spacing_mm: Between voxel centres along I, J and K.
        names: Of the planes.
        starts: Where the volumes begin in the whole ones, in voxels.
        shape: Of the whole ones; None where these are no part.

    Returns:
        The planes, and "axial real" and so on to a slice as a picture lies, shape (rows, columns).
    """
    mask, lesion = volumes[MASK], volumes.get(LESION)
    box = _box(mask)
    size = [side.stop - side.start for side in box]
    planes: list[CutPlane] = []
    slices: dict[str, NDArray[Any]] = {}
    for name in names:
        axis = PLANES[name]
        index, up = _most_instructive(mask, lesion, axis), 3 - axis  # I runs across, J (axial) or K (coronal) runs up
        place, depth = index + starts[axis], (shape or mask.shape)[axis]
        planes.append(CutPlane(name, place, depth, (size[0], size[up]), (spacing_mm[0], spacing_mm[up])))
        slices |= {f"{name} {label}": _slice(volume, axis, index, box) for label, volume in volumes.items()}
    return tuple(planes), slices


def _columns(case: GalleryCase) -> tuple[dict[str, NDArray[Any]], tuple[PictureColumn, ...]]:
    """Return the volumes of a case by name, those that there are, and the columns of pictures."""
    unit = show_unit(case.unit)
    named = {
        "source": case.source,
        "real": case.real,
        "synthetic": case.synthetic,
        "expected error": case.expected_error,
        SPREAD: case.spread,
        MASK: case.mask,
        LESION: case.lesion,
    }
    volumes = {name: volume for name, volume in named.items() if volume is not None}
    looks = [
        PictureColumn("source", source_window(case.source, case.mask), "gray", "own units"),
        PictureColumn("real", case.window, "gray", unit),
        PictureColumn("synthetic", case.window, "gray", unit),
        PictureColumn("|error|", None, "inferno", unit, inside=True),
        PictureColumn("expected error", None, "viridis", unit, inside=True),
        PictureColumn(SPREAD, spread_window(case.spread, case.mask), "viridis", unit, inside=True),
    ]
    needs = {"|error|": "real"}
    return volumes, tuple(look for look in looks if needs.get(look.label, look.label) in volumes)


def _missing(case: GalleryCase) -> Iterator[str]:
    if case.real is None:
        yield "This case has no real image, so no error can be shown."
    if case.expected_error is None:
        yield "This case has no expected-error map."
    if case.lesion is None or not case.lesion.any():
        yield "No lesion is labelled in this case."


def _error_range(case: GalleryCase) -> float | None:
    """Find the highest shown error: nearly all voxels lie below, of the true error and of the expected one."""
    if not case.mask.any():
        return None
    shown = [] if case.expected_error is None else [_sample(case.expected_error, case.mask)]
    if case.real is not None:
        shown.append(np.abs(_sample(case.synthetic, case.mask) - _sample(case.real, case.mask)))
    return max((float(np.quantile(values, COVERED)) for values in shown), default=None)


def _errors_by_region(case: GalleryCase) -> dict[str, NDArray[np.float32]]:
    """Collect expected and true errors outside lesions and in them, where there are enough voxels."""
    if case.expected_error is None or case.real is None:
        return {}
    lesion = np.zeros_like(case.mask) if case.lesion is None else case.lesion
    regions = {"outside lesions": case.mask & ~lesion, "lesions": case.mask & lesion}
    found: dict[str, NDArray[np.float32]] = {}
    for name, where in regions.items():
        if np.count_nonzero(where) >= FEWEST:
            expected, real, synthetic = (
                _sample(volume, where) for volume in (case.expected_error, case.real, case.synthetic)
            )
            found[f"{name} {EXPECTED}"] = expected.astype(np.float32)
            found[f"{name} {TRUE}"] = np.abs(synthetic - real).astype(np.float32)
    return found


def _sample(volume: NDArray[Any], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Take evenly spread voxels of a region, at most `SAMPLE` or a few more, in the order in which the region lies."""
    values = volume[where] if where.flags.c_contiguous else volume.T[where.T]
    return np.asarray(values[:: max(1, len(values) // SAMPLE)], dtype=np.float64)


def _box(mask: NDArray[np.bool_]) -> Box:
    """Find the box around the mask, with a margin; the whole grid for an empty mask."""
    filled = mask if mask.any() else np.ones_like(mask)
    return grown(box_of(filled), MARGIN, (1, 1, 1), mask.shape)


def _most_instructive(mask: NDArray[np.bool_], lesion: NDArray[np.bool_] | None, axis: int) -> int:
    """Choose the slice with most of the lesion inside the mask, else the one in the middle of the mask."""
    others = tuple({0, 1, 2} - {axis})
    if lesion is not None and (labelled := lesion & mask).any():
        return int(np.argmax(np.count_nonzero(labelled, axis=others)))
    below = np.cumsum(np.count_nonzero(mask, axis=others))
    return int(np.searchsorted(below, below[-1] / 2)) if below[-1] else int(mask.shape[axis]) // 2


def _slice(volume: NDArray[Any], axis: int, index: int, box: Box) -> NDArray[Any]:
    """Cut a slice as a picture, rows from the top: front or head up, the patient's right on the left."""
    place = tuple(index if along == axis else side for along, side in enumerate(box))
    return np.ascontiguousarray(as_seen(volume[place]))


def source_window(source: NDArray[Any], mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Show the source between two quantiles inside the mask; it has its own contrast."""
    inside = _sample(source, mask if mask.any() else np.ones_like(mask))
    low, high = np.quantile(inside, SOURCE_WINDOW).tolist()
    return rising(low, high)


def spread_window(spread: NDArray[Any] | None, mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the shown range of a spread over models: it is mostly smaller than the error, so it has its own."""
    if spread is None or not mask.any():
        return 0.0, 1.0
    return 0.0, round_up(float(np.quantile(_sample(spread, mask), COVERED)))


def rising(low: float, high: float) -> tuple[float, float]:
    """Return a window that rises, of a constant image too."""
    return (low, high) if low < high else (low, low + 1.0)


def round_up(most: float) -> float:
    """Round the end of a range up to two digits; 1 for nothing.

    >>> round_up(0.123), round_up(0.0)
    (0.13, 1.0)
    """
    if not most > 0:
        return 1.0
    digit = 10.0 ** (math.floor(math.log10(most)) - 1)
    return math.ceil(most / digit) * digit


def in_ras(array: NDArray[Any], grid: Geometry) -> NDArray[Any]:
    """Reorder an array to RAS."""
    reordered: NDArray[Any] = canonical(Volume(array, grid)).array
    return reordered


# Slices as pictures


class Picture(NamedTuple):
    """One slice as a PNG in the page: label, address, alternative text."""

    label: str
    address: str
    alt: str


def show_gallery(gallery: Sequence[CutCase], ranking: Mapping[str, str] | None) -> dict[str, Any]:
    """Colour slices: one range for error and expected error in all cases."""
    most = round_up(max((case.error_range for case in gallery if case.error_range is not None), default=1.0))
    cases = [_show_case(case, ranking or {}, most) for case in gallery]
    return {
        "cases": cases,
        "has_outline": any(plane["outline"] for case in cases for plane in case["planes"]),
        "has_spread": any(look.label == SPREAD for case in gallery for look in case.looks),
    }


def _show_case(case: CutCase, ranking: Mapping[str, str], most: float) -> dict[str, Any]:
    columns = [look if look.window else look._replace(window=(0.0, most)) for look in case.looks]
    return {
        "case": case.case,
        "places": [place for place in BEST_TO_WORST if ranking.get(place) == case.case and ranking.get("n") != "1"],
        "caption": case.caption,
        "planes": [_show_plane(case, columns, plane) for plane in case.planes],
        "bars": [_colour_bar(column) for column in columns],
        "missing": case.missing,
    }


def _show_plane(case: CutCase, columns: Sequence[PictureColumn], plane: CutPlane) -> dict[str, Any]:
    across, up = plane.size
    mask = case.slices[f"{plane.name} {MASK}"]
    pictures = []
    for column in columns:
        shown = mask if column.inside else np.ones_like(mask)
        address = _png(case.slices[f"{plane.name} {column.label}"], column, shown)
        alt = f"{column.label}, {plane.name} slice {plane.place + 1} of {case.case}"
        pictures.append(Picture(column.label, address, alt))
    return {
        "name": plane.name,
        "place": f"{plane.name}, slice {plane.place + 1} of {plane.depth} from {COUNTED_FROM[plane.name]}",
        "pictures": pictures,
        "outline": _outline(case.slices.get(f"{plane.name} {LESION}")),
        "size": plane.size,
        "ratio": f"{across * plane.spacing_mm[0]:.4g} / {up * plane.spacing_mm[1]:.4g}",
        "top": "A" if plane.name == "axial" else "S",
    }


def _colour_bar(column: PictureColumn) -> dict[str, str]:
    """Make the colour bar below a column of pictures."""
    assert column.window is not None
    ramp = np.linspace(*column.window, 256)[None, :]
    low, high = column.window
    like = max(abs(low), abs(high))
    return {
        "address": _png(ramp, column, np.ones(ramp.shape, bool)),
        "low": show_number(low, like),
        "high": show_number(high, like),
        "unit": column.unit,
    }


def colour_slice(values: NDArray[Any], window: tuple[float, float], colours: str) -> str:
    """Colour a whole slice, shape (rows, columns), and return it as an address for a page.

    Args:
        values: From the top row on; slices that are larger than a page needs are thinned.
        window: Lowest and highest shown value.
        colours: A colour map of matplotlib.
    """
    return _png(values, PictureColumn("", window, colours, ""), np.ones(values.shape, np.bool_))


def _png(values: NDArray[Any], look: PictureColumn, shown: NDArray[np.bool_]) -> str:
    """Colour a slice and return it as an address; what is not `shown` (or not finite) stays transparent."""
    from matplotlib import colormaps

    assert look.window is not None
    step = math.ceil(max(values.shape) / MOST_PIXELS)
    values, shown = values[::step, ::step], shown[::step, ::step] & np.isfinite(values[::step, ::step])
    low, high = look.window
    scaled = np.clip((np.where(shown, values, low) - low) / (high - low), 0, 1)
    pixels = colormaps[look.colours](scaled, bytes=True)  # (rows, columns, 4)
    pixels[~shown] = 0
    return png_address(pixels)


def _outline(lesion: NDArray[np.bool_] | None) -> str:
    """Trace a lesion as an SVG path in voxels of the picture; empty without a lesion in the slice."""
    from contourpy import contour_generator

    if lesion is None or not lesion.any():
        return ""
    # the lines of matplotlib's own contours
    lines = contour_generator(z=np.pad(lesion, 1).astype(np.float32), name="mpl2014", corner_mask=True).lines(0.5)
    polygons = lines[0] if isinstance(lines, tuple) else lines
    return "".join(map(_svg_path, map(np.asarray, polygons)))


def _svg_path(polygon: NDArray[np.float64]) -> str:
    """Write a polygon around padded voxels as an SVG path."""
    return "M" + " ".join(f"{x - 0.5:.1f},{y - 0.5:.1f}" for x, y in polygon)
