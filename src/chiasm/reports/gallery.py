"""Cases to look at in a report: slices as pictures, and the expected-error map against the true error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, box_of, grown
from chiasm.cohorts.cases import grouped
from chiasm.reports.drawing import DASHES, INK, MUTED, SERIES, draw_svg, label_with, png_address, show_number, show_unit
from chiasm.volumes import Geometry, Volume, canonical

MARGIN = 4  # voxels around the mask in a picture
MOST_PIXELS = 400  # along a picture's longer side; larger slices are thinned
COVERED = 0.995  # share of the voxels inside the colour range of error and expected error
SOURCE_WINDOW = (0.005, 0.995)  # quantiles inside the mask
BEST_TO_WORST = ("best", "median", "worst")
BINS = 10  # of the calibration curve
SAMPLE = 500_000  # voxels of a case and region that quantiles and bins are taken over
PLACES = {"outside lesions": "Outside lesions", "lesions": "In lesions", "mask": "In the mask"}


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

    def __post_init__(self) -> None:
        check_shapes(self.case, (self.source, self.real, self.synthetic, self.expected_error, self.mask, self.lesion))
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


# The map of expected error beside the true error


class Errors(NamedTuple):
    """Expected and true errors of the same voxels, shape (voxels,) each."""

    expected: NDArray[np.float64]
    true: NDArray[np.float64]


def draw_expected_error(gallery: Sequence[GalleryCase]) -> dict[str, Any] | None:
    """Set the expected-error map against the true error, by tenths of the map and by region."""
    shown = [case for case in gallery if case.expected_error is not None and case.real is not None]
    regions = _pool_errors(shown)
    if not regions:
        return None
    words = [f"{PLACES[region]} {_compare_means(errors)}." for region, errors in regions.items()]
    svg = _draw_tenths(regions, show_unit(shown[0].unit), " ".join(words))
    return {"svg": svg, "words": words, "cases": [case.case for case in shown]}


def _draw_tenths(regions: Mapping[str, Errors], unit: str, words: str) -> str:
    """Draw the true error over the expected one, by tenths of the map; `words` say the same of the means."""
    curves = {region: _tenths(errors) for region, errors in regions.items()}
    labels = {"xlabel": label_with("expected error", unit), "ylabel": label_with("true error", unit)}

    def draw(axes: Any) -> None:
        most = max(curve.max() for curve in curves.values()) * 1.06
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.8)
        for (region, curve), colour, dash in zip(curves.items(), SERIES, DASHES):
            axes.plot(*curve.T, color=colour, linestyle=dash, linewidth=1.7, marker="o", markersize=4, label=region)
        axes.set(xlim=(0, most), ylim=(0, most), **labels)
        axes.grid(axis="x")
        axes.legend(loc="upper left", labelcolor=INK, handlelength=2.6)

    alt = f"True error against the error that the expected-error map expects, by tenths of the map. {words}"
    return draw_svg(draw, alt, (4.8, 4.2), "expected_error")


def _pool_errors(cases: Sequence[GalleryCase]) -> dict[str, Errors]:
    """Collect the errors of all cases outside lesions and in them; in the mask where no lesion is labelled."""
    found = chain.from_iterable(_errors_by_region(case).items() for case in cases)
    pooled = grouped(found, lambda part: part[0])
    if pooled and "lesions" not in pooled:
        pooled = {"mask": pooled["outside lesions"]}  # "outside lesions" would claim too much
    return {region: _joined(errors for _, errors in parts) for region, parts in pooled.items()}


def _errors_by_region(case: GalleryCase) -> dict[str, Errors]:
    """Collect the errors of a case outside lesions and in them, where there are enough voxels."""
    lesion = np.zeros_like(case.mask) if case.lesion is None else case.lesion
    regions = {"outside lesions": case.mask & ~lesion, "lesions": case.mask & lesion}
    return {name: _errors(case, where) for name, where in regions.items() if np.count_nonzero(where) >= BINS}


def _joined(parts: Iterable[Errors]) -> Errors:
    """Put the errors of several cases together."""
    return Errors(*map(np.concatenate, zip(*parts)))


def _errors(case: GalleryCase, where: NDArray[np.bool_]) -> Errors:
    expected, real, synthetic = (_sample(volume, where) for volume in (case.expected_error, case.real, case.synthetic))
    return Errors(expected, np.abs(synthetic - real))


def _tenths(errors: Errors) -> NDArray[np.float64]:
    """Average (expected, true) errors by tenths of the voxels, the least expected error first, shape (tenths, 2)."""
    tenths = np.array_split(np.argsort(errors.expected, kind="stable"), BINS)
    return np.array([(errors.expected[tenth].mean(), errors.true[tenth].mean()) for tenth in tenths])


def _compare_means(errors: Errors) -> str:
    """Say how the expected error lies to the true one, on average."""
    expected, true = errors.expected.mean(), errors.true.mean()
    ratio = true / expected if expected > 0 else math.inf
    manner = "understates" if ratio > 1.1 else "overstates" if ratio < 0.9 else "meets"
    scores = f"{show_number(expected)} expected, {show_number(true)} found ({ratio:.2f} times)"
    return f"the map {manner} the error: {scores}"


def _sample(volume: NDArray[Any] | None, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Take evenly spread voxels of a region, at most `SAMPLE` or a few more."""
    places = np.flatnonzero(where)
    places = places[:: max(1, len(places) // SAMPLE)]
    return np.asarray(np.asarray(volume)[np.unravel_index(places, where.shape)], dtype=np.float64)


# Slices as pictures


def in_ras(array: NDArray[Any], grid: Geometry) -> NDArray[Any]:
    """Reorder an array to RAS."""
    reordered: NDArray[Any] = canonical(Volume(array, grid)).array
    return reordered


class Picture(NamedTuple):
    """One slice as a PNG in the page: label, address, alternative text."""

    label: str
    address: str
    alt: str


class PictureColumn(NamedTuple):
    """A column of pictures: which volume, in which window and colours.

    Attributes:
        label: Above it.
        volume: Shape (I, J, K).
        window: Lowest and highest shown value.
        colours: A colour map of matplotlib.
        unit: Of the window.
        inside: Whether only the mask is shown.
    """

    label: str
    volume: NDArray[Any]
    window: tuple[float, float]
    colours: str
    unit: str
    inside: bool = False


def show_gallery(gallery: Sequence[GalleryCase], ranking: Mapping[str, str] | None) -> dict[str, Any]:
    """Cut slices and colour them: one range for error and expected error in all cases."""
    most = _error_range(gallery)
    cases = [_show_case(case, ranking or {}, most) for case in gallery]
    return {"cases": cases, "has_outline": any(plane["outline"] for case in cases for plane in case["planes"])}


def _show_case(case: GalleryCase, ranking: Mapping[str, str], most: float) -> dict[str, Any]:
    columns = list_columns(case, most)
    return {
        "case": case.case,
        "places": [place for place in BEST_TO_WORST if ranking.get(place) == case.case],
        "caption": case.caption,
        "planes": [_show_plane(case, columns, axis, name) for axis, name in ((2, "axial"), (1, "coronal"))],
        "bars": [_colour_bar(column) for column in columns],
        "missing": _missing(case),
    }


def _show_plane(case: GalleryCase, columns: Sequence[PictureColumn], axis: int, name: str) -> dict[str, Any]:
    box, index = _box(case.mask), _most_instructive(case, axis)
    size = [side.stop - side.start for side in box]
    across, up = 0, 3 - axis  # I runs across, J (axial) or K (coronal) runs up
    mask = _plane(case.mask, axis, index, box)
    pictures = []
    for column in columns:
        values = _plane(column.volume, axis, index, box)
        address = _png(values, column.window, column.colours, mask if column.inside else np.ones_like(mask))
        pictures.append(Picture(column.label, address, f"{column.label}, {name} slice {index + 1} of {case.case}"))
    return {
        "name": name,
        "place": f"{name}, slice {index + 1} of {case.mask.shape[axis]}",
        "pictures": pictures,
        "outline": _outline(case, axis, index, box),
        "size": (size[across], size[up]),
        "ratio": f"{size[across] * case.spacing_mm[across]:.4g} / {size[up] * case.spacing_mm[up]:.4g}",
        "top": "A" if axis == 2 else "S",
    }


def list_columns(case: GalleryCase, most: float) -> list[PictureColumn]:
    """List the columns of pictures that a case has; `most` is the highest shown error."""
    unit = show_unit(case.unit)
    columns = [
        PictureColumn("source", case.source, _source_window(case), "gray", "own units"),
        PictureColumn("synthetic", case.synthetic, case.window, "gray", unit),
    ]
    if case.real is not None:
        columns.insert(1, PictureColumn("real", case.real, case.window, "gray", unit))
        error = np.abs(np.subtract(case.synthetic, case.real, dtype=np.float32))
        columns.append(PictureColumn("|error|", error, (0.0, most), "inferno", unit, inside=True))
    if case.expected_error is not None:
        columns.append(PictureColumn("expected error", case.expected_error, (0.0, most), "viridis", unit, inside=True))
    return columns


def _missing(case: GalleryCase) -> list[str]:
    absent = []
    if case.real is None:
        absent.append("This case has no real image, so no error can be shown.")
    if case.expected_error is None:
        absent.append("This case has no expected-error map.")
    if case.lesion is None or not case.lesion.any():
        absent.append("No lesion is labelled in this case.")
    return absent


def _error_range(gallery: Sequence[GalleryCase]) -> float:
    """Find the highest shown error: nearly all voxels of nearly all cases lie below."""
    shown = chain.from_iterable(_shown_errors(case) for case in gallery if case.mask.any())
    return round_up(max((float(np.quantile(values, COVERED)) for values in shown), default=1.0))


def _shown_errors(case: GalleryCase) -> Iterator[NDArray[np.float64]]:
    """Give what is shown of a case's error: the true one and the expected one, as far as they are known."""
    if case.real is not None:
        yield np.abs(_sample(case.synthetic, case.mask) - _sample(case.real, case.mask))
    if case.expected_error is not None:
        yield _sample(case.expected_error, case.mask)


def round_up(most: float) -> float:
    """Round the end of a range up to two digits; 1 for nothing.

    >>> round_up(0.123), round_up(0.0)
    (0.13, 1.0)
    """
    if not most > 0:
        return 1.0
    digit = 10.0 ** (math.floor(math.log10(most)) - 1)
    return math.ceil(most / digit) * digit


def _box(mask: NDArray[np.bool_]) -> Box:
    """Find the box around the mask, with a margin; the whole grid for an empty mask."""
    filled = mask if mask.any() else np.ones_like(mask)
    return grown(box_of(filled), MARGIN, (1, 1, 1), mask.shape)


def _most_instructive(case: GalleryCase, axis: int) -> int:
    """Choose the slice with most of the lesion inside the mask, else the one in the middle of the mask."""
    others = tuple({0, 1, 2} - {axis})
    if case.lesion is not None and (lesion := case.lesion & case.mask).any():
        return int(np.argmax(np.count_nonzero(lesion, axis=others)))
    below = np.cumsum(np.count_nonzero(case.mask, axis=others))
    return int(np.searchsorted(below, below[-1] / 2)) if below[-1] else int(case.mask.shape[axis]) // 2


def _plane(volume: NDArray[Any], axis: int, index: int, box: Box) -> NDArray[Any]:
    """Cut a slice as a picture, rows from the top: front or head up, the patient's right on the left."""
    cut: NDArray[Any] = volume[box].take(index - box[axis].start, axis=axis)
    return cut[::-1, ::-1].T  # (I, J or K) -> (rows, columns)


def _colour_bar(column: PictureColumn) -> dict[str, str]:
    """Make the colour bar below a column of pictures."""
    ramp = np.linspace(0, 1, 256)[None, :]
    low, high = column.window
    like = max(abs(low), abs(high))
    return {
        "address": _png(ramp, (0, 1), column.colours, np.ones(ramp.shape, bool)),
        "low": show_number(low, like),
        "high": show_number(high, like),
        "unit": column.unit,
    }


def _source_window(case: GalleryCase) -> tuple[float, float]:
    """Show the source between two quantiles inside the mask; it has its own contrast."""
    inside = _sample(case.source, case.mask if case.mask.any() else np.ones_like(case.mask))
    low, high = np.quantile(inside, SOURCE_WINDOW).tolist()
    return rising(low, high)


def rising(low: float, high: float) -> tuple[float, float]:
    """Return a window that rises, of a constant image too."""
    return (low, high) if low < high else (low, low + 1.0)


def _png(values: NDArray[Any], window: tuple[float, float], colours: str, shown: NDArray[np.bool_]) -> str:
    """Colour a slice and return it as an address; what is not `shown` (or not finite) stays transparent."""
    from matplotlib import colormaps

    step = math.ceil(max(values.shape) / MOST_PIXELS)
    values, shown = values[::step, ::step], shown[::step, ::step] & np.isfinite(values[::step, ::step])
    low, high = window
    scaled = np.clip((np.where(shown, values, low) - low) / (high - low), 0, 1)
    pixels = colormaps[colours](scaled, bytes=True)  # (rows, columns, 4)
    pixels[~shown] = 0
    return png_address(pixels)


def _outline(case: GalleryCase, axis: int, index: int, box: Box) -> str:
    """Trace the lesion as an SVG path in voxels of the picture; empty without a lesion in the slice."""
    from matplotlib.figure import Figure

    if case.lesion is None:
        return ""
    inside = np.pad(_plane(case.lesion, axis, index, box), 1).astype(np.float32)
    if not inside.any():
        return ""
    contour = Figure().subplots().contour(inside, levels=[0.5])
    polygons = chain.from_iterable(path.to_polygons(closed_only=False) for path in contour.get_paths())
    return "".join(map(_svg_path, map(np.asarray, polygons)))


def _svg_path(polygon: NDArray[np.float64]) -> str:
    """Write a polygon around padded voxels as an SVG path."""
    return "M" + " ".join(f"{x - 0.5:.1f},{y - 0.5:.1f}" for x, y in polygon)
