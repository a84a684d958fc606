"""Patches for one step, drawn from memory-mapped cases.

Every step draws from a generator seeded by (seed, step, rank).  So a resumed run gets the same batches as an
uninterrupted one, and all arms of a seed get the same batches.  Where patches lie and how they are augmented is drawn
first (`draw_places`), then applied (`take_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from chiasm.preparation.arrays import PreparedCase
from chiasm.training.classes import CLASSES, TissueClasses
from chiasm.training.grown_lesions import GrownLesion
from chiasm.training.painted_lesions import Block, LesionPainter, paint
from chiasm.training.simulated_patches import simulate

TRIES = 16  # draws before a patch centre outside the mask is accepted
CLASS_SHIFT = 0.4  # SD of a class's shift, normalised units
SHADING = 0.4  # SD of the strengths of shadings, normalised units: 8 % of the intensity in the mean
ON_TUMOUR = 0.7  # of the patches of simulated patients
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


class Variation(NamedTuple):
    """How the images of training cases can be varied.

    Attributes:
        classes: Of tissue, to be shifted in the source, or None.
        painter: Of lesions, in source and target, or None.
        grown: Tumours of simulated patients, of each case; none without such patients.
    """

    classes: TissueClasses | None = None
    painter: LesionPainter | None = None
    grown: Sequence[Sequence[GrownLesion]] = ()


NO_VARIATION = Variation()


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
        painted: Seed of a simulated lesion that is painted into the patch, or None.
        simulated: Which tumour of the case a simulated patient has, and the seed of all else of him; or None.
        shading: Of each source: strength, then slopes and bends along I, J, K and twists between them, shape (C, 10);
            or None.
    """

    case: int
    centre: Voxel
    flip: bool
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    donor: tuple[int, Voxel] | None = None
    shifts: tuple[tuple[float, ...], ...] | None = None
    painted: int | None = None
    simulated: tuple[int, int] | None = None
    shading: tuple[tuple[float, ...], ...] | None = None


def lesion_voxels(cases: Sequence[PreparedCase], most: int = 20_000, in_all: int = 2**24) -> list[NDArray[np.int32]]:
    """Return up to `most` labelled voxels (n, 3) of each case, evenly thinned; none without labels.

    Args:
        cases: Any number.
        most: Voxels of a case.
        in_all: Voxels of all cases together, about.
    """
    found, most = [], max(1, min(most, in_all // max(1, len(cases))))
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
        painted_share: Probability that a simulated lesion is painted into a patch.
        simulated_share: Probability that a patch is of a simulated patient.
        shaded_share: Probability that a patch's sources are shaded, as by a coil.
        varied: 1 for each source that is jittered and shaded, 0 for one with a unit; one number stands for all.
    """

    body_share: float
    lesion_share: float
    augment: bool
    intensity_jitter: float
    transplant_share: float = 0.0
    class_share: float = 0.0
    painted_share: float = 0.0
    simulated_share: float = 0.0
    shaded_share: float = 0.0
    varied: tuple[float, ...] = (1.0,)


def draw_places(
    cases: Sequence[PreparedCase],
    lesions: Sequence[NDArray[np.int32]],
    sampling: Sampling,
    *,
    count: int,
    rng: np.random.Generator,
    difficulty: Sequence[float] | None = None,
    grown: Sequence[Sequence[GrownLesion]] = (),
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
        grown: Tumours of simulated patients in each case's anatomy.
    """
    with_lesion = [index for index, voxels in enumerate(lesions) if len(voxels)]
    places = [_draw_place(cases, lesions, with_lesion, sampling, rng) for _ in range(count)]
    # drawn last, so that arms with and without these see the same patches
    places = _change_some(
        places,
        sampling.transplant_share,
        rng,
        lambda place: replace(place, donor=_draw_donor(place.case, with_lesion, lesions, rng, difficulty)),
    )
    places = _change_some(
        places, sampling.class_share, rng, lambda place: replace(place, shifts=_draw_shifts(len(place.gain), rng))
    )
    places = _change_some(
        places, sampling.painted_share, rng, lambda place: replace(place, painted=int(rng.integers(2**31)))
    )
    places = _change_some(places, sampling.simulated_share, rng, lambda place: _draw_patient(place, grown, rng))
    return _change_some(
        places,
        sampling.shaded_share,
        rng,
        lambda place: replace(place, shading=_draw_shading(len(place.gain), sampling.varied, rng)),
    )


def _change_some(
    places: Sequence[Place], share: float, rng: np.random.Generator, change: Callable[[Place], Place]
) -> list[Place]:
    """Change each place with a probability; a share of 0 draws nothing."""
    return [change(place) if share and rng.random() < share else place for place in places]


def _draw_patient(place: Place, grown: Sequence[Sequence[GrownLesion]], rng: np.random.Generator) -> Place:
    """Make a patch one of a simulated patient: most patches lie on the tumour, and each patient has a contrast."""
    case = place.case if grown[place.case] else int(rng.choice([n for n, some in enumerate(grown) if some]))
    lesions = grown[case]
    index, seed = int(rng.integers(len(lesions))), int(rng.integers(2**31))
    centre = _draw_voxel(lesions[index].centres, rng)
    return replace(
        place,
        case=case,
        centre=centre if case != place.case or rng.random() < ON_TUMOUR else place.centre,
        donor=None,
        shifts=_draw_shifts(len(place.gain), rng),
        painted=None,
        simulated=(index, seed),
    )


def _draw_shifts(sources: int, rng: np.random.Generator) -> tuple[tuple[float, ...], ...]:
    drawn = rng.normal(size=(sources, CLASSES)) * CLASS_SHIFT
    return tuple(map(tuple, drawn.tolist()))


def _draw_shading(sources: int, varied: Sequence[float], rng: np.random.Generator) -> tuple[tuple[float, ...], ...]:
    drawn = rng.normal(size=(sources, 10)) * (SHADING, *[1.0] * 3, *[0.7] * 6)
    drawn[:, 0] *= varied
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
    jitter *= sampling.varied
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
    """Draw a voxel, and draw again while it lies outside the mask; keep the last draw."""
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
    """Draw a lesion voxel of another case; None if no other case has a lesion."""
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
    variation: Variation = NO_VARIATION,
) -> Batch:
    """Cut and augment the patches at `places`.

    Args:
        cases: The cases that `places` index.
        places: From `draw_places`.
        patch: Size in voxels: two numbers for 2D and 2.5D (I, J), three for 3D.
        slices: Neighbouring slices that make the channels of 2.5D; 1 for 2D; ignored in 3D.
        variation: What places need that shift classes or paint lesions.
    """
    channels = cases[0].source.shape[0] * (slices if len(patch) == 2 else 1)
    kinds = ((channels, np.float32), (1, np.float32), (1, np.bool_), (1, np.bool_))
    parts = [np.empty((len(places), count, *patch), kind) for count, kind in kinds]
    for index, place in enumerate(places):
        _transplanted(cases, place, slices, variation, [part[index] for part in parts])
    return Batch(*map(torch.from_numpy, parts))


def crop_batch(batch: Batch, size: Sequence[int]) -> Batch:
    """Keep the middle of a batch, of the `size` that a network of valid convolutions made."""
    margins = [(have - kept) // 2 for have, kept in zip(batch.target.shape[2:], size)]
    if not any(margins):
        return batch
    middle = (slice(None), slice(None), *(slice(m, m + kept) for m, kept in zip(margins, size)))
    return Batch(*(part[middle] for part in batch))


def _transplanted(
    cases: Sequence[PreparedCase], place: Place, slices: int, variation: Variation, out: Sequence[NDArray[Any]]
) -> None:
    """Cut a patch into `out`; blend a donor's lesion in, if it has one: both contrasts, its label, a soft rim."""
    _take(cases[place.case], place, slices, variation, out)
    if place.donor is None:
        return
    index, centre = place.donor
    others = [np.empty_like(part) for part in out]
    _take(cases[index], replace(place, case=index, centre=centre), slices, variation, others)
    source, target, mask, lesion = out
    new_source, new_target, new_mask, new_lesion = others
    inside = mask & new_mask
    share = gaussian_filter((new_lesion & inside)[0].astype(np.float32), RIM_VOXELS)[None]
    share = np.clip(1.5 * share, 0, 1) * inside
    for image, other in ((source, new_source), (target, new_target)):
        image += share * (other - image)
    lesion |= share > 0.5


def _take(case: PreparedCase, place: Place, slices: int, variation: Variation, out: Sequence[NDArray[Any]]) -> None:
    """Cut a patch out of one case into source, target, mask and lesion, with intensities and sides as `place` says."""
    patch = out[0].shape[1:]
    block = _vary(_cut(case, place, patch, slices), place, variation, len(patch))
    if place.simulated is not None and variation.painter is not None:
        index, seed = place.simulated
        shares = _tumour(case, place, variation.grown[place.case][index], patch, slices)
        block = simulate(variation.painter, place.case, block, shares, _axes_mm(variation.painter, len(patch)), seed)
    size = block.mask.shape[-len(patch) :]
    block, flip = _across(block, place, case, len(patch))
    source, *others = (_room(part, size, flip) for part in out)
    source = source.reshape(block.source.shape)
    _jitter(block.source, block.mask, _jitter_of(case, place), source)
    for drawn, image in zip(place.shading or (), source):
        image += _shading(drawn, size) * block.mask
    target: NDArray[Any]
    target, mask, lesion = block[1:] if len(patch) == 3 else (image[len(image) // 2] for image in block[1:])
    if case.own is not None:  # one scale for both: else no network could keep the scan's
        target = target * place.gain[case.own] + place.offset[case.own] * mask
    for room, image in zip(others, (target, mask, lesion), strict=True):
        room[0] = image


def _across(block: Block, place: Place, case: PreparedCase, dims: int) -> tuple[Block, bool]:
    """Let left and right change places where they lie across slices; return whether they still must within one."""
    if dims == 3 or case.sideways < 2 or not place.flip:
        return block, place.flip
    return Block._make(part[..., ::-1, :, :] for part in block), False


def _room(part: NDArray[Any], size: tuple[int, ...], flip: bool) -> NDArray[Any]:
    """Return the place of a patch of `size` in one of (C, *patch); voxels around a smaller patch are invalid."""
    if size != part.shape[1:]:
        part[...] = 0
        part = part[(slice(None), *map(slice, size))]
    return part[:, ::-1] if flip else part


def _cut(case: PreparedCase, place: Place, patch: tuple[int, ...], slices: int) -> Block:
    """Cut a patch, smaller at a small case: (I, J, K) in 3D, else slices first, (slices, I, J).

    Where nothing is to be varied, the target and the lesion of the middle slice are enough: (1, I, J).
    """
    start = _start(case, place, patch)
    i, j, k = (slice(a, a + s) for a, s in zip(start, (*patch, 1)))

    def cut(image: NDArray[Any], slices: int) -> NDArray[Any]:
        image = np.asarray(image)[..., i, j, :]
        if len(patch) == 3:
            return image[..., k]
        near = _near(image, start[2], slices)
        return near.transpose(*range(near.ndim - 3), -1, -3, -2)

    is_varied = any(change is not None for change in (place.shifts, place.painted, place.simulated))
    enough = slices if is_varied else 1
    target, mask = cut(case.target, enough), cut(case.mask, slices)
    lesion = np.zeros(target.shape, np.bool_) if case.labels is None else cut(case.labels, enough) > 0
    return Block(cut(case.source, slices), target, mask, lesion)


def _start(case: PreparedCase, place: Place, patch: tuple[int, ...]) -> list[int]:
    """Return the first voxel of a patch along I, J, K."""
    return [min(max(c - s // 2, 0), max(n - s, 0)) for c, s, n in zip(place.centre, (*patch, 1), case.mask.shape)]


def _near(image: NDArray[Any], place: int, slices: int) -> NDArray[Any]:
    """Cut slices around one, shape (..., I, J, slices); beyond the first and the last, that slice is repeated."""
    first, depth = place - slices // 2, image.shape[-1]
    if first >= 0 and first + slices <= depth:
        return image[..., first : first + slices]  # a view: nothing is copied
    return image[..., np.clip(np.arange(first, first + slices), 0, depth - 1)]


def _vary(block: Block, place: Place, variation: Variation, dims: int) -> Block:
    """Shift classes of tissue in the source, and paint a lesion into source and target, as `place` says."""
    classes, painter = variation.classes, variation.painter
    if place.shifts is not None and classes is not None:
        moved = len(place.shifts)  # an earlier stage's context stays
        added = classes.shift(place.shifts, block.source[:moved], block.target) * block.mask
        block = block._replace(source=np.concatenate([block.source[:moved] + added, block.source[moved:]]))
    if place.painted is not None and painter is not None:
        block = paint(painter, place.case, block, _axes_mm(painter, dims), place.painted)
    return block


def _axes_mm(painter: LesionPainter, dims: int) -> tuple[float, float, float]:
    """Return the spacing along each axis of a block."""
    i, j, k = painter.spacing_mm
    return (i, j, k) if dims == 3 else (k, i, j)


def _tumour(
    case: PreparedCase, place: Place, lesion: GrownLesion, patch: tuple[int, ...], slices: int
) -> NDArray[np.float32]:
    """Return a tumour's share of each voxel of a patch, shape (compartments, *block)."""
    i, j, k = (np.arange(a, min(a + s, n)) for a, s, n in zip(_start(case, place, patch), (*patch, 1), case.mask.shape))
    if len(patch) == 3:
        return lesion.at((i, j, k))
    near = k[0] + np.arange(slices) - slices // 2
    return lesion.at((i, j, near.clip(0, case.mask.shape[2] - 1)), (2, 0, 1))


def _jitter(
    source: NDArray[np.floating[Any]],
    mask: NDArray[np.bool_],
    changes: tuple[NDArray[np.float32], NDArray[np.float32]],
    out: NDArray[np.float32],
) -> None:
    """Write ``gain * source + offset`` inside the mask; shapes (C, ...), and one gain and offset for each channel."""
    gain, offset = (change.reshape(-1, *[1] * mask.ndim) for change in changes)
    np.multiply(source, gain, out=out)
    out += offset * mask


def _shading(drawn: Sequence[float], size: Sequence[int]) -> NDArray[np.float32]:
    """Return a smooth field of a strength over a patch: a polynomial of second degree, of mean 0.

    What a coil multiplies is, in units from which the median was taken, nearly a summand: most of a brain's voxels lie
    several ranges between quartiles above 0.
    """
    strength, *terms = drawn
    slopes, bends, twists = terms[:3], terms[3:6], terms[6:]
    axes = np.meshgrid(*(np.linspace(-1, 1, count, dtype=np.float32) for count in size), indexing="ij", sparse=True)
    field = np.zeros(size, np.float32)
    for axis, slope, bend in zip(axes, slopes, bends):
        field += slope * axis + bend * axis**2
    for (one, other), twist in zip(combinations(axes, 2), twists):
        field += twist * one * other
    field -= field.mean()
    return field * np.float32(abs(strength) / max(float(field.std()), 1e-6))


def _jitter_of(case: PreparedCase, place: Place) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return gain and offset of each channel, shape (C,); those of ranks change nothing."""
    still = case.source.shape[0] - len(place.gain)
    return np.array([*place.gain, *[1.0] * still], np.float32), np.array([*place.offset, *[0.0] * still], np.float32)
