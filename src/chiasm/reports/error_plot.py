"""The expected-error map of a report's cases against the true error, by tenths of the map and by region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.metrics.voxelwise import mean_or_nan
from chiasm.reports.drawing import DASHES, INK, MUTED, SERIES, draw_svg, label_with, show_number, show_unit
from chiasm.reports.gallery import EXPECTED, TRUE, CutCase

BINS = 10  # of the calibration curve
PLACES = {"outside lesions": "Outside lesions", "lesions": "In lesions", "mask": "In the mask"}


class Errors(NamedTuple):
    """Expected and true errors of the same voxels, shape (voxels,) each."""

    expected: NDArray[np.float32]
    true: NDArray[np.float32]


def draw_expected_error(gallery: Sequence[CutCase]) -> dict[str, Any] | None:
    """Set the expected-error map against the true error, by tenths of the map and by region."""
    shown = [case for case in gallery if case.errors]
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
        most = max(curve.max() for curve in curves.values()) * 1.06 or 1.0  # where all errors are 0
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.8)
        for (region, curve), colour, dash in zip(curves.items(), SERIES, DASHES):
            axes.plot(*curve.T, color=colour, linestyle=dash, linewidth=1.7, marker="o", markersize=4, label=region)
        axes.set(xlim=(0, most), ylim=(0, most), **labels)
        axes.grid(axis="x")
        axes.legend(loc="best", labelcolor=INK, handlelength=2.6)

    alt = f"True error against the error that the expected-error map expects, by tenths of the map. {words}"
    return draw_svg(draw, alt, (4.8, 4.2), "expected_error")


def _pool_errors(cases: Sequence[CutCase]) -> dict[str, Errors]:
    """Collect the errors of all cases outside lesions and in them; in the mask where no lesion is labelled."""
    pooled = {region: _joined(cases, region) for region in ("outside lesions", "lesions")}
    if not pooled["lesions"].true.size:
        pooled = {"mask": pooled["outside lesions"]}  # "outside lesions" would claim too much
    return {region: errors for region, errors in pooled.items() if errors.true.size}


def _joined(cases: Sequence[CutCase], region: str) -> Errors:
    """Put the errors of several cases in a region together."""
    nothing = np.zeros(0, np.float32)
    kinds = (f"{region} {kind}" for kind in (EXPECTED, TRUE))
    return Errors(*(np.concatenate([nothing, *(case.errors.get(kind, nothing) for case in cases)]) for kind in kinds))


def _tenths(errors: Errors) -> NDArray[np.float64]:
    """Average (expected, true) errors by tenths of the voxels, the least expected error first, shape (tenths, 2)."""
    tenths = np.array_split(np.argsort(errors.expected, kind="stable"), BINS)
    return np.array([[mean_or_nan(values[tenth]) for values in errors] for tenth in tenths])


def _compare_means(errors: Errors) -> str:
    """Say how the expected error lies to the true one, on average."""
    expected, true = map(mean_or_nan, errors)
    manner = "understates" if true > 1.1 * expected else "overstates" if true < 0.9 * expected else "meets"
    ratio = f", so it expects {expected / true:.2f} times the true error" if true > 0 else ""
    return f"the map {manner} the error: {show_number(expected)} expected, {show_number(true)} found{ratio}"
