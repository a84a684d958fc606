"""Heads without disease: tissue fractions, and how one head becomes another.

There are two sources.  *Embedded*: the ICBM152 brain maps of the nilearn package, with shells of skull and scalp that
are drawn here.  *Given*: a
folder of label maps of whole heads.  Either way a head is a stack of fractions
of `TISSUES`, channels last, that sum to one in every voxel.

Coordinates are voxels of the head's own grid unless a name says `_mm`; a
deformation says for each voxel of the subject where in the head it comes
from (pull-back), so composing is applying one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import CohortError, VolumeError
from chiasm.simulation.deformation import Array, grid_points, pull, smooth_noise
from chiasm.storage import read_json
from chiasm.volumes import read_volume

VENTRICLE_MM3 = 10_000.0  # a hole of the closed brain that is larger belongs to it
#: Channels of a head, in order; the values of a given label map.
TISSUES = (
    "air",
    "csf",
    "gm",
    "wm",
    "dgm",
    "skin_fat",
    "soft",
    "bone_cort",
    "bone_canc",
    "mucosa",
    "vessel",
    "eye",
)
AIR, CSF, GM, WM, DGM, SKIN_FAT, SOFT, BONE_CORT, BONE_CANC, MUCOSA, VESSEL, EYE = range(len(TISSUES))

#: Other names in a given table of labels, and what they count as.
OTHER_NAMES = {"lesion_wm": "wm"}

#: Name of the embedded head; every subject made of it shares its topology.
TEMPLATE = "icbm152"


@dataclass(frozen=True, eq=False)
class Head:
    """Tissue fractions of one head.

    Attributes:
        name: The head's name: what a split by anatomy goes by.
        fractions: Share of each of `TISSUES`, shape (I, J, K, 12), float32, sums to 1.
        affine: Voxel to world mm, RAS+, (4, 4), isotropic and without rotation.
    """

    name: str
    fractions: Array
    affine: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along I, J and K."""
        i, j, k, _ = self.fractions.shape
        return i, j, k

    @property
    def spacing_mm(self) -> float:
        """Distance between voxel centres."""
        return float(self.affine[0, 0])


# --- fields and interpolation ------------------------------------------------------------------------------------


# --- deformations ------------------------------------------------------------------------------------------------


# --- the embedded head -------------------------------------------------------------------------------------------

_CROP_MM = ((-92, 92), (-130, 98), (-72, 106))  # of the template: brain, scalp and orbits

#: Ellipsoids outside the brain: tissue, centre and radii in MNI mm; both sides where x is not 0.  Design choices.
_SHAPES: Sequence[tuple[int, tuple[float, float, float], tuple[float, float, float]]] = (
    (SKIN_FAT, (32, 58, -34), (17, 22, 16)),  # orbit
    (EYE, (32, 66, -34), (12, 12, 12)),
    (MUCOSA, (0, 55, -45), (11, 24, 17)),  # nose
    (AIR, (0, 57, -45), (6, 22, 13)),
    (MUCOSA, (25, 50, -58), (13, 16, 12)),  # maxillary sinus
    (AIR, (25, 50, -58), (11, 14, 10)),
    (AIR, (9, 80, -8), (8, 4, 8)),  # frontal sinus
    (AIR, (0, 18, -34), (9, 9, 7)),  # sphenoid sinus
    (BONE_CORT, (50, -26, -38), (16, 14, 10)),  # petrous bone
    (AIR, (56, -36, -40), (4, 7, 7)),  # mastoid cells
    (VESSEL, (13, 2, -26), (2.5, 3.0, 9)),  # carotid
)


class _Template(NamedTuple):
    logits: Array  # of csf, gm, wm inside the brain, (I, J, K, 3)
    brain: Array  # fraction of brain
    outside_mm: Array  # distance from the brain
    deep: Array  # how far grey matter counts as deep
    face_mm: Array  # distance from face and neck, negative inside
    shapes: tuple[tuple[int, NDArray[np.intp], Array], ...]  # tissue, flat indices, weights
    affine: NDArray[np.float64]


def _downsampled(
    array: NDArray[np.floating[Any]], spacing_mm: float, origin_mm: Sequence[float], shape: Sequence[int]
) -> Array:
    """Sample a 1 mm template on a grid from `origin_mm` (in template voxels), averaged over its voxels."""
    from scipy import ndimage

    smooth = ndimage.uniform_filter(array, size=round(spacing_mm), mode="constant") if spacing_mm >= 2 else array
    shift = 0.5 if round(spacing_mm) % 2 == 0 and spacing_mm >= 2 else 0.0  # an even box is centred between voxels
    sampled: Array = ndimage.affine_transform(
        smooth,
        np.full(3, spacing_mm),
        np.asarray(origin_mm, dtype=float) + shift,
        output_shape=tuple(shape),
        order=1,
        mode="constant",
    )
    return sampled


@lru_cache(maxsize=1)
def _template(spacing_mm: float) -> _Template:
    import nibabel
    import nilearn
    from scipy import ndimage

    folder = Path(nilearn.__file__).parent / "datasets" / "data"
    images = {
        name: nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
        for name in ("t1", "gm", "wm")
    }
    origin = np.asarray(images["t1"].affine[:3, 3], dtype=float)
    low, high = (np.array(side, dtype=float) for side in zip(*_CROP_MM))
    shape = tuple(int(n) for n in np.floor((high - low) / spacing_mm) + 1)
    maps = {
        name: _downsampled(np.asarray(image.dataobj, dtype=np.float32) / 255, spacing_mm, low - origin, shape)
        for name, image in images.items()
    }
    brain = _downsampled(np.asarray(np.asarray(images["t1"].dataobj) > 0, np.float32), spacing_mm, low - origin, shape)
    grey, white = maps["gm"] * (brain > 0), maps["wm"] * (brain > 0)
    fluid = np.clip(np.maximum(brain, 1e-3) - grey - white, 0.002, 1)
    logits = np.log(np.stack([fluid, grey + 0.002, white + 0.002], axis=-1)).astype(np.float32)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = low
    x, y, z = np.moveaxis(
        grid_points(shape).reshape(*shape, 3) * np.float32(spacing_mm) + low.astype(np.float32), -1, 0
    )
    outside = ndimage.distance_transform_edt(brain < 0.5) * spacing_mm - spacing_mm / 2
    deep = np.clip(3 - 2.6 * np.sqrt((x / 36) ** 2 + ((y + 5) / 36) ** 2 + ((z - 5) / 22) ** 2), 0, 1)
    face = _from_ellipsoid((x, y, z), (0, 34, -42), (52, 50, 48))
    neck = _from_ellipsoid((x, y, z), (0, -28, -90), (52, 54, 70))
    shapes = []
    for tissue, centre, radii in _SHAPES:
        for side in (1, -1) if centre[0] else (1,):
            away = _from_ellipsoid((x, y, z), (side * centre[0], *centre[1:]), radii)
            shapes.append(_sparse(tissue, _ramp(-away, spacing_mm) * (outside > 3)))
    sinus = _ramp(4 - np.abs(x), spacing_mm) * _ramp(outside - 1, spacing_mm) * _ramp(6 - outside, spacing_mm)
    shapes.append(_sparse(VESSEL, sinus * ((z > 30) | (y < -70))))
    return _Template(logits, brain, outside.astype(np.float32), deep, np.minimum(face, neck), tuple(shapes), affine)


def _from_ellipsoid(axes: Sequence[Array], centre: Sequence[float], radii: Sequence[float]) -> Array:
    """Return about the distance from an ellipsoid, negative inside."""
    squares = [((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii)]
    return np.asarray((np.sqrt(np.sum(squares, axis=0)) - 1) * min(radii), dtype=np.float32)


def _sparse(tissue: int, weight: Array) -> tuple[int, NDArray[np.intp], Array]:
    where = np.flatnonzero(weight > 0)
    return tissue, where, weight.ravel()[where].astype(np.float32)


def _ramp(signed_mm: NDArray[Any], width_mm: float) -> Array:
    """Turn a signed distance into a share of a voxel: 0 below, 1 above, linear over `width_mm` between."""
    return np.asarray(np.clip(signed_mm / np.float32(width_mm) + np.float32(0.5), 0, 1), dtype=np.float32)


def embedded_head(rng: np.random.Generator, spacing_mm: float) -> Head:
    """Draw a head around the ICBM152 brain.

    The template is the average of 152 brains and knows tissue as
    probabilities; the draw shifts their balance (atrophy, cortical thickness)
    and adds folds of its own, so that no two cortices agree.  Skull and scalp
    are shells of smoothly varying thickness; eyes, nose, sinuses, carotids and
    the sagittal sinus are simple shapes.  All thicknesses are design choices.

    Args:
        rng: Where the head comes from.
        spacing_mm: Voxel size.
    """
    template = _template(spacing_mm)
    shape = template.brain.shape
    logits = template.logits * np.float32(1.8)
    balance = rng.normal(0, (0.5, 0.2, 0.2))
    for channel in range(3):
        logits[..., channel] += np.float32(balance[channel])
        logits[..., channel] += smooth_noise(rng, shape, 25 / spacing_mm) * np.float32(0.3)
        logits[..., channel] += smooth_noise(rng, shape, 3.5 / spacing_mm) * np.float32(0.7)
    logits -= logits.max(axis=-1, keepdims=True)
    within = np.exp(logits)
    within *= (template.brain / within.sum(axis=-1))[..., None]
    fractions = np.zeros((*shape, len(TISSUES)), dtype=np.float32)
    fractions[..., CSF] = within[..., 0]
    fractions[..., GM] = within[..., 1] * (1 - template.deep)
    fractions[..., DGM] = within[..., 1] * template.deep
    fractions[..., WM] = within[..., 2]
    _add_shells(fractions, template, rng, spacing_mm)
    _add_vessels(fractions, template, rng, spacing_mm)
    flat = fractions.reshape(-1, len(TISSUES))
    for tissue, where, weight in template.shapes:
        weight = weight * (1 - template.brain.ravel()[where])
        flat[where] *= (1 - weight)[:, None]
        flat[where, tissue] += weight
    flat /= flat.sum(axis=1, keepdims=True)
    return Head(TEMPLATE, fractions, template.affine)


def _add_shells(fractions: Array, template: _Template, rng: np.random.Generator, spacing_mm: float) -> None:
    """Fill the head around the brain: fluid, dura, inner table, diploe, outer table, muscle, scalp, air."""
    shells = (
        (CSF, 2.2),
        (SOFT, 0.7),
        (BONE_CORT, 1.8),
        (BONE_CANC, 2.8),
        (BONE_CORT, 1.8),
        (SOFT, 1.5),
        (SKIN_FAT, 5.0),
    )
    around = 1 - template.brain
    inner = np.ones_like(around)  # share of the voxel outside the surface reached so far
    outside = template.outside_mm
    for tissue, mean_mm in shells:
        thickness = np.float32(mean_mm * rng.lognormal(0, 0.15))
        outside = outside - thickness * np.exp(smooth_noise(rng, around.shape, 22 / spacing_mm) * np.float32(0.2))
        if tissue == SOFT and mean_mm > 1:
            outside = np.minimum(outside, template.face_mm)
        beyond = np.minimum(_ramp(outside, spacing_mm), inner)
        fractions[..., tissue] += around * (inner - beyond)
        inner = beyond
    fractions[..., AIR] += around * inner


def _add_vessels(fractions: Array, template: _Template, rng: np.random.Generator, spacing_mm: float) -> None:
    """Draw vessels in the fluid around the brain: the curves on which two smooth fields are both 0."""
    fields = [smooth_noise(rng, template.brain.shape, 9 / spacing_mm) for _ in range(2)]
    from_curve_mm = 9 * np.hypot(*fields)  # a field of width s changes by one over about s mm
    share = _ramp(rng.uniform(1.0, 1.8) - from_curve_mm, spacing_mm) * fractions[..., CSF] * (template.outside_mm < 4)
    fractions[..., VESSEL] += share
    fractions[..., CSF] -= share


# --- given heads -------------------------------------------------------------------------------------------------


def find_heads(folder: Path, spacing_mm: float) -> Mapping[str, Path]:
    """Find label maps of heads: for each name the file whose spacing comes nearest from below.

    Files are called ``NAME_tissue_2mm.nii.gz`` or alike: what follows the
    first underscore is no part of the name.  `tissue_labels.json` beside them
    names the labels.

    Args:
        folder: Of label maps.
        spacing_mm: Voxel size wanted.

    Raises:
        CohortError: If there are none, or a label's name is unknown.
    """
    folder = Path(folder)
    files = sorted([*folder.glob("*.nii.gz"), *folder.glob("*.nii")])
    if not files or not (folder / "tissue_labels.json").is_file():
        raise CohortError(
            "holds no label maps of heads", path=folder, reason="no-heads", expected="*.nii.gz and tissue_labels.json"
        )
    heads: dict[str, tuple[float, Path]] = {}
    for path in files:
        name = path.name.split(".")[0].split("_")[0]
        stated = re.search(r"_([\d.]+)mm\.nii", path.name)
        mm = float(stated[1]) if stated else 1.0
        miss = abs(mm - spacing_mm) + (100 if mm > spacing_mm else 0)
        if name not in heads or miss < heads[name][0]:
            heads[name] = (miss, path)
    return {name: path for name, (_, path) in sorted(heads.items())}


@lru_cache(maxsize=2)
def given_head(name: str, path: Path, spacing_mm: float) -> Head:
    """Read a label map of a head as fractions, down to a hand's breadth below the brain.

    Args:
        name: Name of the head.
        path: Label map whose values `tissue_labels.json` beside it names.
        spacing_mm: Voxel size wanted.

    Raises:
        CohortError: If a label has no name, or an unknown one.
        VolumeError: If the file cannot be read.
    """
    from scipy import ndimage

    try:
        volume = read_volume(path, labels=True)
    except VolumeError as error:  # a label map of tissues is made by a program, which can make it anew
        raise VolumeError(
            error.what, path=error.path, reason=error.reason, found=error.found, expected=error.expected
        ) from error
    channels = _channels(path.parent / "tissue_labels.json")
    if strange := sorted(set(np.unique(volume.array).tolist()) - set(channels)):
        raise CohortError("has labels without a name", path=path, reason="labels", found=strange[:5])
    table = np.array([channels.get(value, 0) for value in range(max(channels) + 1)])
    labels = table[volume.array]
    old = np.array(volume.geometry.spacing_mm)
    lowest = np.flatnonzero(np.isin(labels, (GM, DGM)).any(axis=(0, 1)))[0]
    cut = max(0, int(lowest - 25 / old[2]))
    labels = labels[:, :, cut:]
    affine = volume.geometry.affine.copy()
    affine[:3, 3] += affine[:3, 2] * cut
    blur = 0.35 if spacing_mm <= old[0] * 1.01 else 0.5 * spacing_mm / old[0]
    stack = np.stack(
        [ndimage.gaussian_filter((labels == k).astype(np.float32), blur, mode="nearest") for k in range(len(TISSUES))],
        axis=-1,
    )
    if not np.allclose(old, spacing_mm, rtol=0.01):
        shape = tuple(int(n) for n in np.floor((np.array(labels.shape) - 1) * old / spacing_mm) + 1)
        stack = pull(stack, grid_points(shape) * (spacing_mm / old).astype(np.float32)).reshape(*shape, -1)
        affine[:3, :3] = np.diag([spacing_mm] * 3)
    stack /= stack.sum(axis=-1, keepdims=True)
    return Head(name, stack, affine)


def _channels(path: Path) -> dict[int, int]:
    named = {int(value): OTHER_NAMES.get(name, name) for value, name in read_json(path).items()}
    if strange := [name for name in named.values() if name not in TISSUES]:
        raise CohortError(
            "names unknown tissues", path=path, reason="tissues", found=strange[:5], expected=", ".join(TISSUES)
        )
    return {value: TISSUES.index(name) for value, name in named.items()}


def brain_mask(fractions: Array, spacing_mm: float) -> NDArray[np.bool_]:
    """Find the brain in a stack of fractions as a skull-stripper does: tissue, and the fluid in furrows and ventricles.

    Args:
        fractions: Shape (I, J, K, C); channels beyond `TISSUES` are lesions and count as brain.
        spacing_mm: Of the grid.
    """
    from scipy import ndimage

    share = fractions[..., [GM, WM, DGM]].sum(axis=-1) + fractions[..., len(TISSUES) :].sum(axis=-1)
    parts, count = ndimage.label(ndimage.binary_opening(share > 0.5))
    if not count:
        return np.zeros(share.shape, bool)
    largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    closed = ndimage.binary_closing(np.pad(largest, 4), iterations=max(1, round(6 / spacing_mm)))[4:-4, 4:-4, 4:-4]
    filled = ndimage.binary_fill_holes(closed | largest)
    return np.asarray(filled | _wide_ventricles(filled, spacing_mm))


def _wide_ventricles(brain: NDArray[np.bool_], spacing_mm: float) -> NDArray[np.bool_]:
    """Find large holes of axial slices: wide ventricles, which are open towards the cisterns in other slices."""
    from scipy import ndimage

    holes = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(brain, 2, 0)], axis=2) & ~brain
    parts, _ = ndimage.label(holes)
    large = np.bincount(parts.ravel()) * spacing_mm**3 > VENTRICLE_MM3
    large[0] = False
    return np.asarray(large[parts])


def stripped_mask(brain: NDArray[np.bool_], rng: np.random.Generator, spacing_mm: float) -> NDArray[np.bool_]:
    """Add the errors of skull-strippers to a brain mask: too tight or too loose by a millimetre or two."""
    from scipy import ndimage

    width, farthest = 4.0, 0.02  # of the smoothed brain: some 8 mm outside; below 0 all that is far away would belong
    smooth = ndimage.gaussian_filter(brain.astype(np.float32), width / spacing_mm)
    beyond_mm = rng.normal(0.6, 1.1) + 1.2 * smooth_noise(rng, brain.shape, 10 / spacing_mm)
    return np.asarray(smooth > np.maximum(0.5 - beyond_mm / (np.sqrt(2 * np.pi) * width), farthest))


def head_mask(fractions: Array) -> NDArray[np.bool_]:
    """Find the head in a stack of fractions: all voxels except the air around it; sinuses are inside."""
    from scipy import ndimage

    return np.asarray(ndimage.binary_fill_holes(ndimage.binary_closing(fractions[..., AIR] < 0.5, iterations=2)))
