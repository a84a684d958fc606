"""Movements between images of different contrast: Gauss-Newton steps and Demons (Vercauteren 2009) on descriptors.

Demons compare intensities, but T1 and T2, or CT and MR, have different intensities.  The
bridge is a descriptor of each voxel's neighbourhood that both have in common
(Heinrich et al., Medical Image Analysis 2012): how different its six neighbours
are to one another, relative to how different neighbours are there on average.
All of a voxel's descriptors push together: either the six or twelve numbers
of a linear movement, or a field, whose updates are small, smooth and
composed, so that it stays one to one.

`docs/registration.md` has what was measured beside other bridges.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chiasm.progress import Progress

SQUARINGS = 3  # of an update: at most `MOST_STEP` voxels become eighths of them
MOST_STEP = 1.0  # voxels that one update may move anything
NEIGHBOURS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))


class Level(NamedTuple):
    """One pass: its shrink factor and its number of updates."""

    shrink: int
    updates: int


#: What measured best on simulated patients that no number in the documents comes from (docs/log.md).
LEVELS = (Level(2, 30), Level(1, 25))
FIELD_SIGMA = 2.5  # voxels: smoothness of the field after each update
PATCH_SIGMA = 1.0  # voxels: how large a neighbourhood a descriptor sees

ROUNDS = 15  # of Gauss and Newton, at most
SETTLED = 1e-3  # voxels: a step that no longer matters


def descriptors(image: Tensor, sigma: float = PATCH_SIGMA) -> Tensor:
    """Describe each voxel by the likeness of its neighbours (MIND, self-similarity context).

    Args:
        image: Shape (1, 1, I, J, K).
        sigma: Standard deviation of the Gaussian patch, voxels.

    Returns:
        exp(-D / V) for each of the twelve pairs of neighbours that lie a
        quarter turn apart, D their squared difference over the patch less the
        least of the twelve, V the mean of D; shape (1, 12, I, J, K), 0 to 1.
        It does not change where intensities are scaled, shifted or inverted.
    """
    padded = functional.pad(image, (1,) * 6, mode="replicate")
    i, j, k = image.shape[2:]
    shifted = [padded[..., 1 + a : 1 + a + i, 1 + b : 1 + b + j, 1 + c : 1 + c + k] for a, b, c in NEIGHBOURS]
    distances = torch.cat(
        [
            smooth((shifted[one] - shifted[other]) ** 2, sigma)
            for one, other in combinations(range(6), 2)
            if sum(a * b for a, b in zip(NEIGHBOURS[one], NEIGHBOURS[other])) == 0
        ],
        dim=1,
    )
    distances = distances - distances.amin(1, keepdim=True)
    variance = distances.mean(1, keepdim=True)
    typical = float(variance.mean())
    if typical == 0:  # a constant image: nothing to describe
        return torch.ones_like(distances)
    return torch.exp(-distances / variance.clamp(1e-3 * typical, 1e3 * typical))


def linear(fixed: Tensor, moving: Tensor, *, freedoms: Literal[6, 12], shrink: int, weight: Tensor) -> Tensor:
    """Find the rigid or affine movement under which the descriptors of two images differ least.

    Gauss and Newton's steps on the squared differences, inversely composed
    (Baker and Matthews 2004): slopes are those of the fixed image, so that the
    normal equations are the same in every round.

    Args:
        fixed: Shape (1, 1, I, J, K), as finely sampled along each axis.
        moving: On the same grid, already within about two patches.
        freedoms: 6 (rotation and shift) or 12 (affine).
        shrink: How much coarser than the grid to look.
        weight: How much each voxel's descriptors are believed, 0 to 1, shape (1, 1, I, J, K).

    Returns:
        Matrix (4, 4), float64: what lies at voxel x in the fixed image lies at ``matrix @ x`` in the moving one.
    """
    one, other = (descriptors(_shrunk(image, shrink)) for image in (fixed, moving))
    belief = _sized(weight, one.shape[2:])[0, 0]
    seen = belief > 0
    belief, slopes, wanted = belief[seen], _slopes(one)[0][..., seen], one[0][:, seen]
    points = functional.pad(_indices(one)[:, seen], (0, 0, 0, 1), value=1.0)  # (4, n)
    finer = torch.eye(4, dtype=torch.float64)  # coarse voxels to voxels, as `_sized` has it
    finer[[0, 1, 2], [0, 1, 2]] = torch.tensor([of / to for of, to in zip(fixed.shape[2:], one.shape[2:])]).double()
    finer[:3, 3] = (finer.diagonal()[:3] - 1) / 2
    middle, radius = points.double().mean(1), float(points[:3].std())
    ways = finer.inverse() @ _generators(freedoms, (finer @ middle)[:3], radius * shrink) @ finer
    pushes = ways[:, :3].float() @ points  # (freedoms, 3, n)
    stiffness = torch.einsum("can,cbn,n->abn", slopes, slopes, belief)
    normal = torch.einsum("pan,qan->pq", pushes, torch.einsum("abn,qbn->qan", stiffness, pushes)).double()
    matrix = torch.eye(4, dtype=torch.float64)
    for _ in range(ROUNDS):
        there = (matrix[:3].float() @ points)[None, :, :, None, None]
        difference = looked_up(other, there)[0, :, :, 0, 0] - wanted
        force = torch.einsum("can,cn,n->an", slopes, difference, belief)
        step = torch.linalg.solve(normal, torch.einsum("pan,an->p", pushes, force).double())
        matrix = matrix @ torch.linalg.matrix_exp(-torch.einsum("p,pab->ab", step, ways))
        if float(step.abs().max()) < SETTLED:
            break
    return finer @ matrix @ finer.inverse()


def demons(
    fixed: Tensor,
    moving: Tensor,
    *,
    levels: Sequence[Level] = LEVELS,
    sigma: float = FIELD_SIGMA,
    weight: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Find the place of each voxel of one image in another, from coarse to fine.

    Args:
        fixed: Shape (1, 1, I, J, K).
        moving: On the same grid.
        levels: Shrink factors and numbers of updates.
        sigma: Smoothness of the field, voxels of each level.
        weight: How much each voxel's descriptors are believed, 0 to 1, shape (1, 1, I, J, K).
        progress: Called with updates done, all updates, and what is done.

    Returns:
        Displacement u in voxels, shape (1, 3, I, J, K): what lies at x in the
        fixed image lies at x + u(x) in the moving one.
    """
    shape = fixed.shape[2:]
    field = fixed.new_zeros((1, 3, *shape))
    done, all_updates = 0, sum(level.updates for level in levels)
    for level in levels:
        one, other = (descriptors(_shrunk(image, level.shrink)) for image in (fixed, moving))
        scale = field.new_tensor([to / of for to, of in zip(one.shape[2:], shape)]).view(1, 3, 1, 1, 1)
        coarse = _sized(field, one.shape[2:]) * scale
        slopes = _slopes(one)
        belief = 1.0 if weight is None else _sized(weight, one.shape[2:])
        for _ in range(level.updates):
            update = belief * _update(one, slopes, warped(other, coarse))
            coarse = smooth(composed(coarse, _exponential(update)), sigma)
            done += 1
            if progress is not None:
                progress(done, all_updates, "deforming")
        field = _sized(coarse, shape) / scale
    return unfolded(field)


def unfolded(field: Tensor) -> Tensor:
    """Smooth a field until it does not fold; most fields are returned unchanged."""
    while float(jacobian(field).min()) <= 0:
        field = smooth(field, 1.0)
    return field


def jacobian(field: Tensor) -> Tensor:
    """Return the determinant of the derivative of x + u(x), by central differences, shape (I, J, K)."""
    rows = [torch.stack(torch.gradient(field[0, axis])) for axis in range(3)]
    derivative = torch.stack(rows) + torch.eye(3).view(3, 3, 1, 1, 1)
    determinant: Tensor = torch.linalg.det(derivative.permute(2, 3, 4, 0, 1))
    return determinant


def warped(image: Tensor, field: Tensor) -> Tensor:
    """Sample an image of any number of channels at x + u(x), linearly; the border is repeated outside."""
    return looked_up(image, _indices(field) + field)


def looked_up(image: Tensor, places: Tensor) -> Tensor:
    """Sample an image at fractional voxels, shape (1, 3, A, B, C), linearly; the border is repeated outside."""
    most = places.new_tensor([max(side - 1, 1) for side in image.shape[2:]]).view(1, 3, 1, 1, 1)
    grid = (2 * places / most - 1).permute(0, 2, 3, 4, 1).flip(-1)  # torch counts axes from the last
    found: Tensor = functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the field of first `inner`, then `outer`: inner(x) + outer(x + inner(x))."""
    return inner + warped(outer, inner)


def smooth(image: Tensor, sigma: float) -> Tensor:
    """Convolve each channel with a Gaussian; the border is repeated outside."""
    radius = max(1, round(3 * sigma))
    falling = torch.exp(-(torch.arange(radius + 1) ** 2) / (2 * sigma**2))
    weights = (falling / (2 * falling.sum() - 1)).tolist()
    for axis in (2, 3, 4):
        around = [0] * 6
        around[8 - 2 * axis : 10 - 2 * axis] = [radius, radius]
        padded, side = functional.pad(image, around, mode="replicate"), image.shape[axis]
        image = padded.narrow(axis, radius, side) * weights[0]
        for step in range(1, radius + 1):  # a third of what a convolution takes, which copies all it sees
            for start in (radius - step, radius + step):
                image.add_(padded.narrow(axis, start, side), alpha=weights[step])
    return image


def _indices(image: Tensor) -> Tensor:
    """Number the voxels of an image, shape (3, I, J, K)."""
    axes = [torch.arange(side, dtype=image.dtype) for side in image.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _generators(freedoms: Literal[6, 12], middle: Tensor, radius: float) -> Tensor:
    """Return the small movements of which linear movements consist, shape (freedoms, 4, 4).

    Each moves voxels at the radius by about one voxel: shifts along each axis,
    then turns about `middle`, or with 12 freedoms whatever nine numbers can do.
    """
    made = torch.zeros((freedoms, 4, 4), dtype=torch.float64)
    made[[0, 1, 2], [0, 1, 2], 3] = 1.0
    if freedoms == 6:
        for way, (a, b) in enumerate(combinations(range(3), 2), 3):
            made[way, a, b], made[way, b, a] = -1 / radius, 1 / radius
    else:
        made[3:, :3, :3] = torch.eye(9, dtype=torch.float64).view(9, 3, 3) / radius
    made[3:, :3, 3] = -made[3:, :3, :3] @ middle
    return made


def _update(fixed: Tensor, slopes: Tensor, moved: Tensor) -> Tensor:
    """Return the step of the Demons: a Gauss-Newton step, shortened by large differences (Vercauteren, equation 5).

    `slopes` are those of the fixed descriptors, halved with those of the moved ones.
    """
    force, steep = torch.zeros_like(slopes[:, 0]), torch.zeros_like(fixed[:, 0])
    for channel in range(fixed.shape[1]):  # one at a time: all at once take twice as long, in fetching memory
        difference = fixed[:, channel] - moved[:, channel]
        both = (slopes[:, channel] + _slopes(moved[:, channel : channel + 1])[:, 0]) / 2
        force += difference[:, None] * both
        steep += (both**2).sum(1) + difference**2 / (4 * MOST_STEP**2)
    step: Tensor = force / steep[:, None].clamp_min(1e-9)
    return step


def _slopes(image: Tensor) -> Tensor:
    """Differentiate each channel along each axis: (1, C, I, J, K) to (1, C, 3, I, J, K)."""
    return torch.stack(torch.gradient(image, dim=(2, 3, 4)), dim=2)


def _exponential(velocity: Tensor) -> Tensor:
    """Follow a stationary velocity for one unit of time, by squaring."""
    field: Tensor = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        field = composed(field, field)
    return field


def _shrunk(image: Tensor, by: int) -> Tensor:
    if by == 1:
        return image
    return _sized(smooth(image, by / 2), [max(4, round(side / by)) for side in image.shape[2:]])


def _sized(image: Tensor, shape: Sequence[int]) -> Tensor:
    sized: Tensor = functional.interpolate(image, size=list(shape), mode="trilinear", align_corners=False)
    return sized
