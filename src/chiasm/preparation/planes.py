"""Training cases with their axes in the order in which networks see them.

A network in 2D sees slices of one plane.  Prepared cases are in RAS order whatever it is, as predictions are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chiasm.on_demand import Changed
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.volumes import Geometry


def seen_by_networks(cases: Sequence[PreparedCase], plan: Plan) -> Sequence[PreparedCase]:
    """Return cases with two axes of a slice and then the one across slices, as the plan's plane has them.

    Args:
        cases: In RAS order.
        plan: Says which plane.
    """
    return cases if plan.plane == "axial" else Changed(cases, lambda case: _reordered(case, plan.axes))


def _reordered(case: PreparedCase, axes: tuple[int, int, int]) -> PreparedCase:
    """Give a case another order of axes; its arrays are views."""
    i, j, k = (case.grid.shape[axis] for axis in axes)
    return replace(
        case,
        source=case.source.transpose(0, *(1 + axis for axis in axes)),
        target=case.target.transpose(axes),
        mask=case.mask.transpose(axes),
        labels=None if case.labels is None else case.labels.transpose(axes),
        grid=Geometry((i, j, k), case.grid.affine[:, [*axes, 3]]),
        sideways=axes.index(0),
    )
