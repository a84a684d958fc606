"""Whether a CT is in Hounsfield units, and how far its stored values are from them.

CT has a unit: air is -1000 HU, water 0.  Files that lost it look right: stored values with an offset of 1024 left in or
taken off twice, windows of 8 bits, images that were normalised, MR that is called CT.  A network learns nonsense from
such a case, and predicts nonsense for it.

The test is where most voxels that are not air lie: fat, muscle, brain and organs lie within 150 HU of water, and few
voxels lie between fat and lung.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.masks import PADDED, PARTLY_PADDED, face_value

AIR_HU = (-1100.0, -850.0)
SOFT_HU = (-200.0, 300.0)
CORE_HU = (-150.0, 150.0)  # fat, muscle, brain, organs, most blood
BETWEEN_HU = (-500.0, -200.0)  # between lung and fat: partial volume
NOT_AIR = -500.0
FEWEST = 1e-3  # share of the voxels that must be air; without air, likewise darker than water
LEAST_SOFT = 0.02  # share of the voxels that must be soft tissue; a head fills more of a wide field of view
LEAST_CORE = 0.25  # share of what is not air that must lie in CORE_HU; 0.31 in the top of a skull in voxels of 4 mm
MOST_BETWEEN = 0.25  # largest share of what is not air in BETWEEN_HU; 0.12 in the top of a skull in voxels of 4 mm
LEAST_ENCLOSED = 0.2  # share of soft tissue in what tissue and bone enclose, lungs and sinuses included
DEEP_HU, MOST_DEEP = -1250.0, 0.25  # nothing is darker but noise, and rims of padding
DENSE_HU, MOST_DENSE = 700.0, 0.5  # as dense as bone, and how much of what is not air may be
DARK_HU, MUCH_DARK = -300.0, 0.1  # what is darker is air or lung where it is so much, and then
SCANNED_AIR_HU = -700.0  # above lies no air that was scanned
AIR_ENDS_HU = -550.0  # its darkest tenth lies below
LUNG_HU = (-950.0, -500.0)  # where the median of lungs lies that were cut out alone
ODD_PADDING_HU = (-850.0, 2000.0)  # a background in between was chosen by a person, so it is
ROUND_HU = 50.0  # a multiple of this, or next to 0, but not as dense as bone
OFFSETS = (-1024.0, -1000.0, 1024.0, 1000.0)  # that files are stored without, or with twice
MIDDLE_HU = (-200.0, 400.0)  # where the median of a body lies, its air aside
NARROWEST_HU = 20.0  # of a brain alone, 1 to 99 %
BRAIN_HU, BRAIN_SPREAD_HU = (10.0, 55.0), 90.0  # median, and 5 to 95 %, of a brain alone, which holds no fat
BONE_HU, MOST_BONE = (850.0, 1250.0), 0.15  # where tissue lies that was stored with an offset of 1024 left in
CUT_SHARE = 0.02  # of the body at one end of the intensities: cut by a window
FEWEST_GREYS = 16  # a drawing has fewer, and no window
WIDE_HU = (-500.0, 500.0)  # a window that ends beyond keeps what matters
PEAKS_HU = ((-125.0, -75.0), (10.0, 90.0))  # the most frequent tissue: fat, or brain and muscle
FAT_HU, LEAST_FAT_AND_BONE = (-140.0, -50.0), 0.01
MOST_AMISS_HU = 30.0  # of the median of air, for an offset to be certain
CERTAIN_CORE = 0.4  # of what is not air, for an offset to be certain
LEAST_TISSUE_HU = 5.0  # uniform faces that are brighter may be brain
UNIFORM_FACES = 0.05  # of the range of intensities lie the quartiles of faces apart that show air
SAMPLED = 64  # voxels along each axis


class Content(NamedTuple):
    """Intensities of a volume.

    Attributes:
        coarse: On a coarse grid.
        values: Of these, what is not padding.
        padding: Its value, or None.
        is_cut_out: Whether it fills at least half of the faces.
        faces: Intensities on the six faces.
    """

    coarse: NDArray[np.float32]
    values: NDArray[np.float32]
    padding: float | None
    is_cut_out: bool
    faces: NDArray[np.float32]

    def plus(self, offset: float) -> Content:
        """Return the same with an offset added to all intensities."""
        padding = None if self.padding is None else self.padding + offset
        added = np.float32(offset)
        return Content(self.coarse + added, self.values + added, padding, self.is_cut_out, self.faces + added)

    @property
    def tissue(self) -> NDArray[np.float32]:
        """The voxels of tissue, if intensities are Hounsfield units: no padding, no air, no lung."""
        return self.values[self.values > NOT_AIR]

    @property
    def has_air(self) -> bool:
        """Whether the image holds scanned air or lung, or a background filled with air."""
        filled = self.padding is not None and AIR_HU[0] <= self.padding <= AIR_HU[1]
        return filled or float(np.mean(self.values < SCANNED_AIR_HU)) >= FEWEST


def check_hu(array: NDArray[Any]) -> None:
    """Refuse intensities that cannot be Hounsfield units of a body, whole or cut out on a constant background.

    Args:
        array: Of a CT, shape (I, J, K).

    Raises:
        VolumeError: If they are normalised, scaled, cut by a window, or stored with an offset left in.
    """
    content = _content(array)
    if (fault := _fault(content)) is not None:
        raise _refusal(content, f"is not in Hounsfield units: {fault}")


def with_offset(array: NDArray[Any], offset: float) -> NDArray[Any]:
    """Return the Hounsfield units of a CT of a cohort in which some files are stored with an offset.

    The offset is added if the sum is in Hounsfield units.  A file stays as it is if it is right without the offset and
    wrong with it.

    Args:
        array: Stored values, shape (I, J, K).
        offset: In HU.

    Raises:
        VolumeError: If the values are in Hounsfield units neither as they are nor with the offset.
    """
    content = _content(array)
    if _fault(content.plus(offset)) is None:
        return array + np.float32(offset)
    if (fault := _fault(content)) is None:
        return array
    raise _refusal(
        content, f"is not in Hounsfield units: {fault}; data.ct_offset={offset:g}, which was asked for, does not help"
    )


def find_offset(content: Content) -> float | None:
    """Return the offset that turns intensities into Hounsfield units, or None if it is not certain.

    An offset is certain if the result passes all checks, scanned air lies near -1000 HU, and the most frequent tissue
    is brain, muscle or fat.
    """
    certain = [offset for offset in OFFSETS if _is_certain(content.plus(offset))]
    return min(certain, key=lambda offset: _air_amiss(content, offset), default=None)


def _air_amiss(content: Content, offset: float) -> float:
    """Return how far from -1000 HU the air lies with an offset; 0 if no air was scanned."""
    values = content.values + np.float32(offset)
    air = values[values < SCANNED_AIR_HU]
    if air.size > MUCH_DARK * values.size:
        return abs(float(np.median(air)) + 1000)
    return abs(content.padding + offset + 1000) if content.padding else 0.0


def _refusal(content: Content, what: str) -> VolumeError:
    offset = find_offset(content)
    hint = (
        "It does not look like CT. Give the CT as it was reconstructed, with its rescale slope and intercept applied "
        "once; if it is not a CT, give it the name of its modality."
        if offset is None
        else f"Its values seem to be HU {'-' if offset > 0 else '+'} {abs(offset):g}: add {offset:g}, as the setting "
        f"data.ct_offset={offset:g} of plan and train does for every CT that it makes right."
    )
    low, high = float(content.coarse.min()), float(content.coarse.max())
    return VolumeError(
        what,
        reason="not-hu",
        found=f"intensities from {low:.4g} to {high:.4g}",
        expected="air near -1000 HU, water near 0, most of the rest within 150 HU of water",
        hint=hint,
    )


def _content(array: NDArray[Any]) -> Content:
    padding = face_value(array, PARTLY_PADDED)
    coarse = array[tuple(slice(None, None, -(-size // SAMPLED)) for size in array.shape)].astype(np.float32)
    faces = np.concatenate([np.take(coarse, (0, -1), axis=axis).ravel() for axis in range(3)])
    values = coarse.ravel() if padding is None else coarse[coarse != np.float32(padding)]
    return Content(coarse, values, padding, face_value(array, PADDED) is not None, faces)


def _is_certain(content: Content) -> bool:
    if _fault(content) is not None or not content.tissue.size:
        return False
    tissue = content.tissue
    counts, edges = np.histogram(tissue, bins=np.arange(NOT_AIR, 1000, 20))
    peak = float(edges[counts.argmax()]) + 10
    peaks = any(low <= peak <= high for low, high in PEAKS_HU)
    right_air = _air_amiss(content._replace(padding=None), 0.0) <= MOST_AMISS_HU
    whole = min(_share(tissue, FAT_HU), float(np.mean(tissue > SOFT_HU[1]))) >= LEAST_FAT_AND_BONE
    return peaks and right_air and whole and _share(tissue, CORE_HU) >= CERTAIN_CORE


def _fault(content: Content) -> str | None:
    """Describe the first property that Hounsfield units of a body would not have."""
    if not content.values.size or _is_lung(content):
        return None
    return next((fault for check in CHECKS if (fault := check(content)) is not None), None)


def _is_lung(content: Content) -> bool:
    """Return whether the image shows only cut-out lungs, which hold hardly any soft tissue."""
    if content.padding is None or not float(np.mean(content.values < NOT_AIR)) > 1 - MUCH_DARK:
        return False
    return LUNG_HU[0] <= float(np.median(content.values)) <= LUNG_HU[1] and float(content.values.min()) > AIR_HU[0]


def _about_soft_tissue(content: Content) -> str | None:
    if not content.tissue.size or _share(content.values, SOFT_HU) < LEAST_SOFT:
        return "it holds no soft tissue"
    low, middle, high = np.percentile(content.tissue, (1, 50, 99)).tolist()
    if high - low < NARROWEST_HU:
        return "its intensities are all nearly the same, as in an image that was normalised"
    if not MIDDLE_HU[0] <= middle <= MIDDLE_HU[1]:
        return f"half of what is not air lies above {middle:.4g}"
    core = _share(content.tissue, CORE_HU)
    if core < LEAST_CORE:
        return f"only {100 * core:.0f} % of what is not air lies within 150 of water, as soft tissue does"
    return None


def _about_density(content: Content) -> str | None:
    dense = float(np.mean(content.tissue > DENSE_HU))
    if dense > MOST_DENSE:
        return f"{100 * dense:.0f} % of what is not air is as dense as bone"
    bone = _share(content.values, BONE_HU)
    if not content.has_air and bone > MOST_BONE:
        return f"it holds no air, and {100 * bone:.0f} % of it is as dense as bone"
    between = _share(content.tissue, BETWEEN_HU)
    if between > MOST_BETWEEN:
        return f"{100 * between:.0f} % of what is not air lies between lung and fat, where no tissue does"
    return None


def _about_air(content: Content) -> str | None:
    values, padding = content.values, content.padding
    if padding is not None and content.is_cut_out and _is_odd(padding):
        return f"its background is {padding:.4g} everywhere, where air is -1000"
    deep = values[values < DEEP_HU]
    if len(deep) > MOST_DEEP * len(values) and not _is_padding(deep):
        return f"{100 * len(deep) / len(values):.0f} % of it is darker than air"
    dark = values[values < DARK_HU]
    if len(dark) > MUCH_DARK * len(values) and (level := float(np.percentile(dark, 10))) > AIR_ENDS_HU:
        return f"its air lies near {level:.4g}"
    return None


def _is_odd(padding: float) -> bool:
    low, high = ODD_PADDING_HU
    chosen = padding < DENSE_HU and (abs(padding) < 5 or padding % ROUND_HU == 0)
    return low < padding < high and not chosen


def _is_padding(deep: NDArray[np.float32]) -> bool:
    """Return whether more than half of the voxels darker than air have one value: a second padding, not air."""
    return int(np.unique(deep, return_counts=True)[1].max()) > deep.size / 2


def _about_what_is_enclosed(content: Content) -> str | None:
    """Look inside the outline of tissue and bone: HU - 1024 cut at -1024 leaves a skull around what seems air."""
    from scipy import ndimage

    padding = np.nan if content.padding is None else np.float32(content.padding)
    outline, count = ndimage.label(ndimage.binary_closing((content.coarse > NOT_AIR) & (content.coarse != padding)))
    if not count:
        return None
    sizes = np.bincount(outline.ravel())
    body = outline == sizes[1:].argmax() + 1
    for axis in (2, 1, 0):
        for plane in np.moveaxis(body, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    soft = _share(content.coarse[body & (content.coarse != padding)], SOFT_HU)
    return f"only {100 * soft:.0f} % of what bone and skin enclose is soft tissue" if soft < LEAST_ENCLOSED else None


def _about_missing_air(content: Content) -> str | None:
    if content.has_air:
        return None
    low, middle, high = np.percentile(content.tissue, (5, 50, 95)).tolist()
    brain = BRAIN_HU[0] <= middle <= BRAIN_HU[1] and high - low <= BRAIN_SPREAD_HU
    if float(np.mean(content.values < 0)) < FEWEST and not brain:
        return "nothing in it is darker than water"
    first, middle, last = np.percentile(content.faces, (25, 50, 75)).tolist()
    uniform = last - first < UNIFORM_FACES * float(np.ptp(np.percentile(content.values, (1, 99))))
    if uniform and not content.is_cut_out and AIR_HU[1] < middle < LEAST_TISSUE_HU:
        return f"it is surrounded by {middle:.4g}, where air is -1000"
    return None


def _about_windows(content: Content) -> str | None:
    """Describe a window that cut the intensities, so that fat or bone is lost."""
    body = content.tissue
    if len(np.unique(body)) < FEWEST_GREYS:
        return None
    low, high = float(body.min()), float(body.max())
    at_low = float(np.mean(body == low)) > CUT_SHARE and low > WIDE_HU[0]
    at_high = float(np.mean(body == high)) > CUT_SHARE and high < WIDE_HU[1]
    cut = at_low and at_high if content.has_air else at_low or at_high
    if cut:
        return f"it is cut to a window of {low:.4g} to {high:.4g}"
    return None


CHECKS = (
    _about_soft_tissue,
    _about_density,
    _about_air,
    _about_missing_air,
    _about_windows,
    _about_what_is_enclosed,
)


def _share(values: NDArray[np.float32], bounds: tuple[float, float]) -> float:
    return float(np.mean((values >= bounds[0]) & (values <= bounds[1]))) if values.size else 0.0
