"""Whether a CT is in Hounsfield units, and how far its stored values are from them.

CT has a unit: air is -1000 HU, water 0.  Files that lost it look right: stored
values with an offset of 1024 left in, windows of 8 bits, images that were
normalised.  A network learns from such a case, and predicts of it, nonsense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.masks import PARTLY_PADDED, face_value

AIR_HU = (-1100.0, -200.0)  # air, lung, and what noise and partial volume make of them
SOFT_HU = (-200.0, 300.0)
FEWEST = 1e-3  # share of the voxels that must be soft tissue, and likewise air, or darker than water
OFFSETS = (-1024.0, -1000.0)  # that files are stored without
MUCH = 0.05  # share of soft tissue of which no other unit has as much beside air of one value
MIDDLE_HU = (-300.0, 500.0)  # where the median of a body lies, its air aside
NOT_AIR = -500.0
NARROWEST_HU = 20.0  # of a brain alone, 1 to 99 %
BRAIN_HU = (10.0, 55.0)  # where the median of a brain alone lies, which holds no fat
BONE_HU = (850.0, 1250.0)  # where tissue lies that was stored with an offset of 1024 left in
MOST_BONE = 0.15  # share of a head without air that is so dense
CUT_SHARE = 0.02  # of the body at one end of the intensities: cut by a window
WIDE_HU = (-500.0, 500.0)  # a window that ends beyond keeps what matters
SAMPLED = 64  # voxels along each axis


class Content(NamedTuple):
    """Intensities that are not padding, and the value of the padding, or None."""

    values: NDArray[np.float32]
    padding: float | None


def check_hu(array: NDArray[Any]) -> None:
    """Refuse intensities that cannot be Hounsfield units of a body, whole or cut out on a constant background.

    Args:
        array: Of a CT, shape (I, J, K).

    Raises:
        VolumeError: If they are normalised, cut by a window, or stored with an offset left in.
    """
    content = _content(array)
    if not content.values.size or (fault := _fault(content)) is None:
        return
    offset = find_offset(content)
    raise VolumeError(
        f"is not in Hounsfield units: {fault}",
        reason="not-hu",
        found=f"intensities from {float(array.min()):.4g} to {float(array.max()):.4g}",
        expected="air near -1000 HU, water near 0",
        hint="Give the CT as it was reconstructed, with its rescale slope and intercept applied."
        if offset is None
        else f"Its values seem to be HU + {-offset:g}: add {offset:g} to all of them, "
        f"as the setting data.ct_offset={offset:g} of plan and train does.",
    )


def find_offset(content: Content) -> float | None:
    """Return what must be added to make Hounsfield units of intensities, or None where that is not certain.

    Certain is an offset under which tissue lies where it must, and nothing else is wrong.
    """
    values = content.values
    low = values[values < -NOT_AIR]
    air = float(np.median(low)) if low.size > 0.1 * values.size else None  # where it was scanned, and is no padding
    nearest = sorted(OFFSETS, key=lambda offset: 0.0 if air is None else abs(air + offset + 1000))
    for offset in nearest:
        padding = None if content.padding is None else content.padding + offset
        if _fault(Content(values + np.float32(offset), padding)) is None:
            return offset
    return None


def _content(array: NDArray[Any]) -> Content:
    padding = face_value(array, PARTLY_PADDED)
    coarse = array[tuple(slice(None, None, -(-size // SAMPLED)) for size in array.shape)].astype(np.float32)
    return Content(coarse.ravel() if padding is None else coarse[coarse != np.float32(padding)], padding)


def _fault(content: Content) -> str | None:
    """Say what Hounsfield units of a body would not show."""
    values, padding = content
    soft = _share(values, SOFT_HU)
    if soft < FEWEST:
        return "it holds no soft tissue"
    body = values[values > NOT_AIR]
    low, middle, high = np.percentile(body, (1, 50, 99)).tolist()
    if high - low < NARROWEST_HU:
        return "its intensities are all nearly the same, as in an image that was normalised"
    all_air_alike = padding is not None and AIR_HU[0] <= padding <= AIR_HU[1]
    if _share(values, AIR_HU) >= FEWEST or (all_air_alike and soft >= MUCH):
        return None
    return _fault_without_air(values, body, middle)


def _fault_without_air(values: NDArray[np.float32], body: NDArray[np.float32], middle: float) -> str | None:
    bone = _share(values, BONE_HU)
    if bone > MOST_BONE:
        return f"it holds no air, and {100 * bone:.0f} % of it is as dense as bone"
    if not MIDDLE_HU[0] <= middle <= MIDDLE_HU[1]:
        return f"it holds no air, and half of the rest lies above {middle:.4g}"
    if float(np.mean(values < 0)) < FEWEST and not BRAIN_HU[0] <= middle <= BRAIN_HU[1]:
        return "nothing in it is darker than water"
    return _window(body)


def _window(body: NDArray[np.float32]) -> str | None:
    """Say whether a body without air was cut by a window, so that fat or bone is lost."""
    low, high = float(body.min()), float(body.max())
    at_low, at_high = float(np.mean(body == low)), float(np.mean(body == high))
    if (at_low > CUT_SHARE and low > WIDE_HU[0]) or (at_high > CUT_SHARE and high < WIDE_HU[1]):
        return f"it is cut to a window of {low:.4g} to {high:.4g}"
    return None


def _share(values: NDArray[np.float32], bounds: tuple[float, float]) -> float:
    return float(np.mean((values >= bounds[0]) & (values <= bounds[1])))
