"""The one door: every volume enters by `read_volume`, every pair by `check_pair`, and leaves by `write_volume`.

No common reader is safe alone: one reads a truncated file as zeros, another
ignores a wrong checksum or an affine that is no number.  What enters here is
read right or refused with file, reason, found, expected and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Geometry, Volume, same_grid, turned_like, voxels_apart
from chiasm.volumes.metaimage import looks_like_metaimage, read_metaimage, write_metaimage
from chiasm.volumes.nifti import Form, looks_like_nifti, read_nifti, write_nifti
from chiasm.volumes.streams import first_bytes

SPACING_MM = (0.01, 50.0)
SKEW_DEGREES = 0.1
FEWEST_SLICES = 3
MAX_BYTES = 2 * 2**30
MIRROR_VOXELS = 64  # along the longest axis, when two volumes are compared with their mirror images
MIRROR_BINS = 24
MIRROR_GAIN = 1.4  # a mirrored pair shares this many times the information, and
MIRROR_LEAST = 0.03  # nats more


def read_volume(
    path: Path | str,
    labels: bool = False,
    *,
    declared: Collection[int] | None = None,
    prefer: Form | None = None,
    assume_ras: bool = False,
    allow_thin: bool = False,
    allow_constant: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read a NIfTI or MetaImage volume, or refuse it.

    What a file is, its content says, not its name.

    Args:
        path: The file.
        labels: Whether it is a label map or mask: whole numbers, which stay integers.
        declared: The only labels that may occur beside 0; all may where None.
        prefer: Which NIfTI form to believe where sform and qform disagree.
        assume_ras: Whether to take a NIfTI without orientation as RAS.
        allow_thin: Whether fewer than three slices along an axis are right.
        allow_constant: Whether an image may be the same everywhere.
        max_bytes: Most bytes of voxels.

    Returns:
        float32 values for an image; the smallest integer type that holds them for labels.

    Raises:
        VolumeError: If the file is missing, of another format, damaged, hostile
            or odd; `reason` says which rule it breaks.
    """
    path = Path(path)
    if path.is_dir():
        raise VolumeError("is a folder, not a volume", path=path, reason="folder", hint=_DICOM_HINT)
    if path.name.lower().endswith((".img", ".img.gz")):  # voxels without a header: the pair is known by the other
        path = path.with_name(re.sub(r"(?i)\.img(?=(\.gz)?$)", ".hdr", path.name))
    head = first_bytes(path, 256)
    if head[128:132] == b"DICM" or path.name.lower().endswith((".dcm", ".ima")):
        raise VolumeError("is DICOM, which this chiasm does not read yet", path=path, reason="dicom", hint=_DICOM_HINT)
    if looks_like_nifti(head):
        stored, geometry = read_nifti(path, prefer=prefer, assume_ras=assume_ras, max_bytes=max_bytes)
    elif looks_like_metaimage(head):
        stored, geometry = read_metaimage(path, max_bytes=max_bytes)
    else:
        raise VolumeError(
            "is neither NIfTI nor MetaImage",
            path=path,
            reason="format",
            found="an empty file" if not head else f"first bytes {head[:8]!r}",
            expected=".nii, .nii.gz, .mha or .mhd",
        )
    check_affine(geometry, path)
    if min(geometry.shape) < FEWEST_SLICES and not allow_thin:
        raise VolumeError(
            "has too few slices to be a volume",
            path=path,
            reason="thin",
            found="x".join(map(str, geometry.shape)),
            expected=f"at least {FEWEST_SLICES} along each axis",
        )
    if labels:
        return Volume(_labels(stored, path, declared), geometry)
    with np.errstate(over="ignore"):
        array = stored.astype(np.float32)
    if stored.dtype.kind == "f" and not np.isfinite(array).all():
        count = array.size - int(np.isfinite(array).sum())
        raise VolumeError(
            "holds values that are no finite number in float32", path=path, reason="not-finite", found=f"{count} voxels"
        )
    if not allow_constant and array.min() == array.max():
        raise VolumeError("is the same everywhere", path=path, reason="constant", found=f"{array.flat[0]:g}")
    return Volume(array, geometry)


_DICOM_HINT = "Convert the series first, for example with dcm2niix."


def check_affine(geometry: Geometry, path: Path | None = None) -> None:
    """Refuse a grid that no scanner makes.

    Raises:
        VolumeError: If the affine is not finite or singular, a spacing lies
            outside 0.01 to 50 mm, or axes are skewed by more than 0.1 degrees.
    """
    affine = geometry.affine
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e30:
        raise VolumeError("has an affine that is not finite", path=path, reason="affine")
    if np.abs(affine[:3, 3]).max() > 1e6:
        raise VolumeError("lies more than a kilometre away", path=path, reason="affine", found=affine[:3, 3].tolist())
    spacing = geometry.spacing_mm
    if not all(SPACING_MM[0] <= step <= SPACING_MM[1] for step in spacing):
        raise VolumeError(
            "has an impossible spacing",
            path=path,
            reason="spacing",
            found=" x ".join(f"{step:.4g}" for step in spacing) + " mm",
            expected=f"{SPACING_MM[0]} to {SPACING_MM[1]} mm",
            hint="Is its unit right?",
        )
    axes = affine[:3, :3] / spacing
    lean = max(abs(float(axes[:, a] @ axes[:, b])) for a, b in ((0, 1), (0, 2), (1, 2)))
    skew = float(np.degrees(np.arcsin(min(1.0, lean))))
    if skew > SKEW_DEGREES:
        singular = abs(np.linalg.det(axes)) < 1e-3
        raise VolumeError(
            "has axes that do not span a space" if singular else "has axes that are not square to one another",
            path=path,
            reason="singular" if singular else "skew",
            found=f"{skew:.3g} degrees",
            expected=f"at most {SKEW_DEGREES}",
            hint="Resample it to a straight grid first.",
        )


def _labels(stored: NDArray[Any], path: Path, declared: Collection[int] | None) -> NDArray[Any]:
    low, high = stored.min(), stored.max()
    if not (np.isfinite(low) and np.isfinite(high)) or abs(float(low)) > 2**31 or abs(float(high)) > 2**31:
        raise VolumeError("holds labels out of range", path=path, reason="labels", found=f"{low:g} to {high:g}")
    if stored.dtype.kind == "f" and not (stored == np.rint(stored)).all():
        odd = float(stored[stored != np.rint(stored)].flat[0])
        raise VolumeError(
            "holds labels that are not whole numbers",
            path=path,
            reason="labels",
            found=odd,
            hint="Labels must be resampled by nearest neighbour.",
        )
    kinds = (np.uint8, np.int8, np.int16, np.int32)
    kind = next(k for k in (*kinds, np.int64) if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    array: NDArray[Any] = stored.astype(kind)
    if declared is not None and (others := sorted(set(np.unique(array).tolist()) - {0, *declared})):
        raise VolumeError(
            "holds labels that are not declared",
            path=path,
            reason="labels",
            found=", ".join(map(str, others[:8])),
            expected=", ".join(map(str, sorted(declared))),
        )
    return array


def write_volume(path: Path | str, array: NDArray[Any], geometry: Geometry, labels: bool = False) -> int:
    """Write a volume, whole or not at all, on the geometry of its source bit for bit.

    Args:
        path: Ends in .nii, .nii.gz or .mha.
        array: Shape of the grid; images become float32, labels int16, or int32 where they need it.
        geometry: The grid.
        labels: Whether it is a label map or mask.

    Returns:
        How many values were too large for the type and were cut to its ends.

    Raises:
        VolumeError: If the name ends in something else.
        ValueError: If shapes differ, or labels are not whole numbers.
        ChiasmError: If the file cannot be written.
    """
    path = Path(path)
    if array.shape != tuple(geometry.shape):
        raise ValueError(f"an array of {array.shape} does not fit a grid of {geometry.shape}")
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz", ".mha")):
        raise VolumeError("cannot be written", path=path, reason="format", expected=".nii, .nii.gz or .mha")
    values, cut = _storable(array, labels)
    (write_metaimage if name.endswith(".mha") else write_nifti)(path, values, geometry)
    return cut


def _storable(array: NDArray[Any], labels: bool) -> tuple[NDArray[Any], int]:
    if not labels:
        limits = np.finfo(np.float32)
        cut = int(np.count_nonzero(np.abs(array) > limits.max)) if array.dtype == np.float64 else 0
        return np.clip(array, limits.min, limits.max).astype(np.float32) if cut else array.astype(np.float32), cut
    if array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise ValueError("labels must be whole numbers")
    if array.dtype.kind == "b" or array.dtype in (np.uint8, np.int16):
        return array.astype(np.uint8) if array.dtype.kind == "b" else array, 0
    small = np.iinfo(np.int16)
    needs_more = array.size and (array.min() < small.min or array.max() > small.max)
    limits_32 = np.iinfo(np.int32)
    cut = int(np.count_nonzero((array < limits_32.min) | (array > limits_32.max)))
    fitting = np.clip(array, limits_32.min, limits_32.max)
    return fitting.astype(np.int32 if needs_more else np.int16), cut


def check_pair(a: Volume, b: Volume, *, a_name: str = "source", b_name: str = "target", labels: bool = False) -> Volume:
    """Return `b` on the grid of `a`, or refuse the pair.

    The same space stored in another axis order is brought together; nothing
    is ever interpolated here.

    Args:
        a: Sets the grid.
        b: What should lie on it.
        a_name: What to call it in errors.
        b_name: Likewise.
        labels: Whether `b` is a label map or mask, whose content cannot be compared with an image.

    Raises:
        VolumeError: If grids differ, the volumes do not overlap in the world,
            or `b` fits `a` clearly better when it is mirrored.
    """
    fitting = turned_like(b, a.geometry)
    if not same_grid(a.geometry, fitting.geometry):
        raise _unlike_grids(a.geometry, b.geometry, a_name, b_name)
    fitting = Volume(fitting.array, a.geometry)
    if not labels and (axis := mirrored_axis(a.array, fitting.array)) is not None:
        raise VolumeError(
            f"the {b_name} fits the {a_name} better when it is mirrored along axis {'IJK'[axis]}",
            reason="mirrored",
            hint="One of the two was flipped without its header being told; convert both again from the scans.",
        )
    return fitting


def _unlike_grids(a: Geometry, b: Geometry, a_name: str, b_name: str) -> VolumeError:
    low_a, high_a, low_b, high_b = a.corners.min(0), a.corners.max(0), b.corners.min(0), b.corners.max(0)
    if (low_a > high_b).any() or (low_b > high_a).any():
        return VolumeError(
            f"the {b_name} and the {a_name} do not overlap in space",
            reason="no-overlap",
            hint="Do they belong to one scan session? Register them first.",
        )
    if a.shape != b.shape:
        found, expected = "x".join(map(str, b.shape)), "x".join(map(str, a.shape))
    else:
        found, expected = f"corners up to {voxels_apart(a, b):.3g} voxels apart", "at most 0.01"
    return VolumeError(
        f"the {b_name}'s grid differs from the {a_name}'s",
        reason="grid",
        found=found,
        expected=expected,
        hint=f"Register or resample the {b_name} to the {a_name} first.",
    )


def mirrored_axis(a: NDArray[Any], b: NDArray[Any]) -> int | None:
    """Return the axis along which `b` must be mirrored to share clearly more information with `a`, or None.

    Mutual information, in nats, of a thinned grid; the margin is wide, since
    heads are nearly symmetric and true pairs are not perfectly registered.
    """
    step = max(1, -(-max(a.shape) // MIRROR_VOXELS))
    thin = (slice(step // 2, None, step),) * 3
    thin_a, thin_b = a[thin], b[thin]
    content = thin_a != np.percentile(thin_a, 1)  # background around a cut-out brain tells nothing
    if np.count_nonzero(content) < MIRROR_BINS**2:
        return None
    binned_a = _binned(thin_a[content])
    plain, *mirrored = (
        _information(binned_a, _binned(other[content]))
        for other in (thin_b, *(np.flip(thin_b, axis) for axis in range(3)))
    )
    best = int(np.argmax(mirrored))
    clearly = mirrored[best] > MIRROR_GAIN * plain and mirrored[best] - plain > MIRROR_LEAST
    return best if clearly else None


def _binned(values: NDArray[Any]) -> NDArray[np.intp]:
    """Sort intensities into bins of equal width between 1 and 99 %."""
    low, high = np.percentile(values, (1, 99)).tolist()
    scaled = (values.ravel() - low) * (MIRROR_BINS / max(high - low, 1e-12))
    bins: NDArray[np.intp] = np.clip(scaled, 0, MIRROR_BINS - 1).astype(np.intp)
    return bins


def _information(a: NDArray[np.intp], b: NDArray[np.intp]) -> float:
    joint = np.bincount(a * MIRROR_BINS + b, minlength=MIRROR_BINS**2).reshape(MIRROR_BINS, MIRROR_BINS) / len(a)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / product[seen])).sum())
