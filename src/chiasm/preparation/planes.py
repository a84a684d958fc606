"""Images and training cases with their axes in the order in which networks see them.

A network in 2D sees slices of one plane.  Prepared cases are in RAS order whatever it is, as predictions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.on_demand import OnDemand
from chiasm.preparation.arrays import MOST_OPEN, PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.volumes import Volume
from chiasm.volumes.geometry import reordered

Scalar = TypeVar("Scalar", bound=np.generic)


def with_axes(image: NDArray[Scalar], axes: Sequence[int]) -> NDArray[Scalar]:
    """Give the last three axes of an image another order, as a view.

    Args:
        image: Shape (..., I, J, K).
        axes: Which of the three comes first, second and third.
    """
    first = image.ndim - 3
    return image.transpose(*range(first), *(first + axis for axis in axes))


def seen_by_networks(cases: Sequence[PreparedCase], plan: Plan) -> Sequence[PreparedCase]:
    """Return cases with two axes of a slice and then the one across slices, as the plan's plane has them.

    Args:
        cases: In RAS order.
        plan: Says which plane.
    """
    if plan.plane == "axial":
        return cases
    return OnDemand({str(place): partial(_seen, cases, place, plan.axes) for place in range(len(cases))}, MOST_OPEN)


def _seen(cases: Sequence[PreparedCase], place: int, axes: tuple[int, int, int]) -> PreparedCase:
    """Open a case and give it another order of axes; its arrays are views."""
    case = cases[place]
    mask = reordered(Volume(case.mask, case.grid), axes, (False, False, False))
    return replace(
        case,
        source=with_axes(case.source, axes),
        target=with_axes(case.target, axes),
        mask=mask.array,
        labels=None if case.labels is None else with_axes(case.labels, axes),
        grid=mask.geometry,
        sideways=axes.index(0),
    )
