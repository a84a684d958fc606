"""Patches for one step, drawn from memory-mapped cases.

Every step draws from a generator seeded by (seed, step, rank), so a resumed
run sees what the uninterrupted one would have seen, and all arms of a seed
see the same batches.  Where patches lie and how they are augmented is drawn
first (`draw_places`), then applied (`take_batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from chiasm.prediction.tiling import slice_stack
from chiasm.preparation.arrays import PreparedCase
from chiasm.training.classes import CLASSES, TissueClasses

TRIES = 16  # draws before a patch centre outside the mask is accepted
CLASS_SHIFT = 0.4  # SD of a class's shift, normalised units
RIM_VOXELS = 1.5  # sigma of a transplanted lesion's soft rim

Voxel = tuple[int, int, int]


class Batch(NamedTuple):
    """Patches of one step; 2D and 2.5D drop the K axis of `spatial`.

    Attributes:
        source: Normalised source, with its ranks where the plan says so, shape (N, C, *spatial), zero outside the mask.
        target: Normalised target, shape (N, 1, *spatial), zero outside the mask.
        mask: Valid voxels, bool, shape (N, 1, *spatial).
        lesion: Labelled voxels, bool, shape (N, 1, *spatial); none where the case has no labels.
    """

    source: Tensor
    target: Tensor
    mask: Tensor
    lesion: Tensor


@dataclass(frozen=True)
class Place:
    """Where a patch lies and how it is augmented.

    Attributes:
        case: Index of the case.
        centre: Voxel in its middle (I, J, K).
        flip: Whether left and right change places.
        gain: Factor on each source, shape (C,); ranks are left alone, which no gain would move.
        offset: Summand on each source in normalised units, shape (C,); likewise.
        donor: Case and voxel of a lesion that is transplanted into the middle of the patch, or None.
        shifts: Of each source's classes of tissue, normalised units, shape (C, CLASSES), or None.
    """

    case: int
    centre: Voxel
    flip: bool
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    donor: tuple[int, Voxel] | None = None
    shifts: tuple[tuple[float, ...], ...] | None = None


def lesion_voxels(cases: Sequence[PreparedCase], most: int = 20_000) -> list[NDArray[np.int32]]:
    """Return up to `most` labelled voxels (n, 3) of each case, evenly thinned; none without labels."""
    found = []
    for case in cases:
        voxels = np.empty((0, 3), np.int32) if case.labels is None else np.argwhere(np.asarray(case.labels) > 0)
        found.append(voxels[:: max(1, -(-len(voxels) // most))].astype(np.int32))
    return found


@dataclass(frozen=True)
class Sampling:
    """How patches are drawn.

    Attributes:
        body_share: Probability that a centre lies in the mask.
        lesion_share: Probability that it lies on a lesion, of a case that has
            one; without any lesion these fall to the mask.
        augment: Whether to flip left and right and to jitter the source.
        intensity_jitter: SD of the source's log gain and of its offset.
        transplant_share: Probability that a patch is given a lesion of another case.
        class_share: Probability that each class of tissue of a patch is shifted in the source.
    """

    body_share: float
    lesion_share: float
    augment: bool
    intensity_jitter: float
    transplant_share: float = 0.0
    class_share: float = 0.0


def draw_places(
    cases: Sequence[PreparedCase],
    lesions: Sequence[NDArray[np.int32]],
    sampling: Sampling,
    *,
    count: int,
    rng: np.random.Generator,
    difficulty: Sequence[float] | None = None,
) -> list[Place]:
    """Draw `count` patches: some centred in the mask, some on a lesion, the rest anywhere.

    Args:
        cases: Training cases.
        lesions: Labelled voxels of each case, from `lesion_voxels`.
        sampling: Shares and augmentation.
        count: Patches to draw.
        rng: Source of all randomness.
        difficulty: How hard each case's lesions are, positive: theirs are given
            in proportion.  None gives all cases' alike.
    """
    with_lesion = [index for index, voxels in enumerate(lesions) if len(voxels)]
    places = [_draw_place(cases, lesions, with_lesion, sampling, rng) for _ in range(count)]
    # drawn last, so that arms with and without these see the same patches
    if sampling.transplant_share:
        places = [
            replace(place, donor=_draw_donor(place.case, with_lesion, lesions, rng, difficulty))
            if rng.random() < sampling.transplant_share
            else place
            for place in places
        ]
    if sampling.class_share:
        places = [
            replace(place, shifts=_draw_shifts(len(place.gain), rng)) if rng.random() < sampling.class_share else place
            for place in places
        ]
    return places


def _draw_shifts(sources: int, rng: np.random.Generator) -> tuple[tuple[float, ...], ...]:
    drawn = rng.normal(size=(sources, CLASSES)) * CLASS_SHIFT
    return tuple(map(tuple, drawn.tolist()))


def _draw_place(
    cases: Sequence[PreparedCase],
    lesions: Sequence[NDArray[np.int32]],
    with_lesion: Sequence[int],
    sampling: Sampling,
    rng: np.random.Generator,
) -> Place:
    kind = rng.random()
    if kind < sampling.lesion_share and with_lesion:
        index = int(rng.choice(with_lesion))
        centre = _draw_voxel(lesions[index], rng)
    else:
        index = int(rng.integers(len(cases)))
        is_anywhere = kind >= sampling.body_share + sampling.lesion_share
        centre = _draw_centre(cases[index].mask, rng, tries=1 if is_anywhere else TRIES)
    jitter = rng.normal(size=(2, cases[index].intensities)) * (sampling.intensity_jitter if sampling.augment else 0.0)
    return Place(
        case=index,
        centre=centre,
        flip=bool(rng.random() < 0.5) and sampling.augment,
        gain=tuple(np.exp(jitter[0]).tolist()),
        offset=tuple(jitter[1].tolist()),
    )


def _draw_voxel(voxels: NDArray[np.int32], rng: np.random.Generator) -> Voxel:
    i, j, k = voxels[rng.integers(len(voxels))].tolist()
    return i, j, k


def _draw_centre(mask: NDArray[np.bool_], rng: np.random.Generator, *, tries: int) -> Voxel:
    """Draw a voxel, again while it lies outside the mask; the last of the tries stands."""
    for _ in range(tries):
        i, j, k = rng.integers(mask.shape).tolist()
        if mask[i, j, k]:
            break
    return i, j, k


def _draw_donor(
    case: int,
    with_lesion: Sequence[int],
    lesions: Sequence[NDArray[np.int32]],
    rng: np.random.Generator,
    difficulty: Sequence[float] | None,
) -> tuple[int, Voxel] | None:
    """Draw a lesion voxel of another case, or None where no other has one."""
    others = [index for index in with_lesion if index != case]
    if not others:
        return None
    if difficulty is None:
        index = int(rng.choice(others))
    else:
        hard = np.array([difficulty[other] for other in others])
        index = int(rng.choice(others, p=hard / hard.sum()))
    return index, _draw_voxel(lesions[index], rng)


def take_batch(
    cases: Sequence[PreparedCase],
    places: Sequence[Place],
    *,
    patch: Sequence[int],
    slices: int,
    classes: TissueClasses | None = None,
) -> Batch:
    """Cut and augment the patches at `places`.

    Args:
        cases: The cases that `places` index.
        places: From `draw_places`.
        patch: Size in voxels: two numbers for 2D and 2.5D (I, J), three for 3D.
        slices: Neighbouring axial slices that make the channels of 2.5D; 1 for 2D; ignored in 3D.
        classes: Of the cases, where places shift them.
    """
    parts = [_transplanted(cases, place, tuple(patch), slices, classes) for place in places]
    source, target, mask, lesion = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
    return Batch(source, target, mask, lesion)


def crop_batch(batch: Batch, size: Sequence[int]) -> Batch:
    """Keep the middle of a batch, where a network of valid convolutions made an image of `size`."""
    margins = [(have - kept) // 2 for have, kept in zip(batch.target.shape[2:], size)]
    if not any(margins):
        return batch
    middle = (slice(None), slice(None), *(slice(m, m + kept) for m, kept in zip(margins, size)))
    return Batch(*(part[middle] for part in batch))


def _transplanted(
    cases: Sequence[PreparedCase],
    place: Place,
    patch: tuple[int, ...],
    slices: int,
    classes: TissueClasses | None,
) -> tuple[NDArray[Any], ...]:
    """Cut a patch; where it has a donor, blend the donor's lesion in: both contrasts, its label, a soft rim."""
    own = _take(cases[place.case], place, patch, slices, classes)
    if place.donor is None:
        return own
    index, centre = place.donor
    source, target, mask, lesion = own
    new_source, new_target, new_mask, new_lesion = _take(
        cases[index], replace(place, case=index, centre=centre), patch, slices, classes
    )
    inside = mask & new_mask
    share = gaussian_filter((new_lesion & inside)[0].astype(np.float32), RIM_VOXELS)[None]
    share = np.clip(1.5 * share, 0, 1) * inside
    blended = (a + share * (b - a) for a, b in ((source, new_source), (target, new_target)))
    return *blended, mask, lesion | (share > 0.5)


def _take(
    case: PreparedCase, place: Place, patch: tuple[int, ...], slices: int, classes: TissueClasses | None
) -> tuple[NDArray[Any], ...]:
    """Cut a patch out of one case, change its intensities and flip it as `place` says."""
    source, valid, target, mask, lesion = _cut(case, place.centre, patch, slices)
    if place.shifts is not None and classes is not None:
        source = source + _class_shift(case, place, patch, slices, classes) * valid
    gain, offset = _jitter_of(case, place, len(source) // case.source.shape[0], len(patch))
    source = source * gain + offset * valid
    if case.own is not None:  # one scale for both: else no network could keep the scan's
        target = (target * place.gain[case.own] + place.offset[case.own] * mask).astype(np.float32)
    arrays = [source.astype(np.float32), target[None].astype(np.float32), mask[None], lesion[None]]
    if place.flip:
        arrays = [array[:, ::-1] for array in arrays]
    return tuple(_padded(array, patch) for array in arrays)


def _cut(case: PreparedCase, centre: Voxel, patch: tuple[int, ...], slices: int) -> tuple[NDArray[Any], ...]:
    """Cut source and its valid voxels (C, *patch), target, mask and lesion (*patch); all smaller at a small case."""
    box = _box_of(case, centre, patch)
    mask = np.asarray(case.mask[box])
    target = np.asarray(case.target[box])
    lesion = np.zeros_like(mask) if case.labels is None else np.asarray(case.labels[box]) > 0
    if len(patch) == 3:
        source = np.asarray(case.source[(slice(None), *box)])
        return source, np.broadcast_to(mask, source.shape), target, mask, lesion
    source = slice_stack(case.source, box[2].start, slices)[:, box[0], box[1]]  # (modalities * slices, I, J)
    valid = slice_stack(np.asarray(case.mask)[None], box[2].start, slices)[:, box[0], box[1]]
    valid = np.tile(valid, (case.source.shape[0], 1, 1))
    return source, valid, target[..., 0], mask[..., 0], lesion[..., 0]


def _box_of(case: PreparedCase, centre: Voxel, patch: tuple[int, ...]) -> tuple[slice, slice, slice]:
    """Return where a patch lies in its case, moved inwards at the border; one slice thick in 2D and 2.5D."""
    size = (*patch, 1)[:3]
    start = [min(max(c - s // 2, 0), max(n - s, 0)) for c, s, n in zip(centre, size, case.mask.shape)]
    i, j, k = (slice(a, a + s) for a, s in zip(start, size))
    return i, j, k


def _class_shift(
    case: PreparedCase, place: Place, patch: tuple[int, ...], slices: int, classes: TissueClasses
) -> NDArray[np.float32]:
    """Return what shifts each class in the channels of a patch, shape (C, *patch)."""
    assert place.shifts is not None
    box, moved = _box_of(case, place.centre, patch), len(place.shifts)
    if len(patch) == 3:
        source, target = case.source[(slice(None), *box)], case.target[box]
    else:
        source, target = (
            slice_stack(image, box[2].start, slices)[:, box[0], box[1]] for image in (case.source, case.target[None])
        )
        source = source.reshape(-1, *target.shape)  # (modalities, slices, I, J)
    added = np.zeros_like(source)  # an earlier stage's context stays
    added[:moved] = classes.shift(place.shifts, source[:moved], target)
    return added if len(patch) == 3 else added.reshape(-1, *target.shape[1:])


def _jitter_of(case: PreparedCase, place: Place, repeat: int, dims: int) -> Iterator[NDArray[np.float32]]:
    """Give gain and offset of each channel, shape (C, 1, ...); ranks stand still."""
    ranks = case.source.shape[0] - len(place.gain)
    for drawn, still in ((place.gain, 1.0), (place.offset, 0.0)):
        numbers = np.array([*drawn, *[still] * ranks], np.float32)
        yield np.repeat(numbers, repeat).reshape(-1, *[1] * dims)


def _padded(array: NDArray[np.generic], patch: tuple[int, ...]) -> NDArray[np.generic]:
    """Fill up a patch that is larger than its case with invalid voxels."""
    missing = [size - have for size, have in zip(patch, array.shape[1:])]
    if not any(missing):
        return np.ascontiguousarray(array)
    return np.pad(array, [(0, 0), *((0, more) for more in missing)])
