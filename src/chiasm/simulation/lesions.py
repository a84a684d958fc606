"""Disease in a head: tumours that grow, multiple-sclerosis-like lesions, cysts.

Lesions are grown in the undeformed head, so that the deformation that makes a
subject of it carries tissue and lesion alike and pushes tissue aside.  What
is drawn is a share of each of `COMPARTMENTS` in every voxel, to be mixed with
the tissue of the host: edges are soft where infiltration is.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.simulation.anatomy import CSF, DGM, GM, WM
from chiasm.simulation.deformation import Array, control_grid, grid_points, pull, smooth_noise

Disease = Literal["none", "high", "low", "ms", "cyst"]

#: Channels of a lesion, in order.
COMPARTMENTS = ("oedema", "core", "rim", "fluid", "plaque")
OEDEMA, CORE, RIM, FLUID, PLAQUE = range(len(COMPARTMENTS))

#: Label values, as BraTS had them until 2021: 1 core, necrosis or fluid; 2 oedema or plaque; 4 enhancing.
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}

GROWTH_MM = 2.0  # tumours grow on a grid of about this spacing
DIFFUSION, PROLIFERATION = 0.10, (0.04, 0.11)  # per step, in voxels of that grid
WHOLE, SOLID = 0.12, 0.62  # cell density that bounds the whole tumour and its core
LEAST_CORE = 0.04  # of the whole: growth goes on until there is a core
_MOBILITY = {WM: 1.0, GM: 0.12, DGM: 0.25, CSF: 0.02}
_LONGEST = 600  # steps of growth


class SimulatedLesion(NamedTuple):
    """The effect of a disease on a head.

    Attributes:
        kind: Which disease.
        shares: Of each voxel taken by each of `COMPARTMENTS`, shape (I, J, K, 5), sum at most 1.
        density: Of tumour cells in [0, 1], shape (I, J, K); 0 where the disease is no tumour.
        push: Velocity of the mass effect, in voxels, on the control grid (i, j, k, 3).
    """

    kind: Disease
    shares: Array
    density: Array
    push: Array


def draw_lesion(kind: Disease, fractions: Array, spacing_mm: float, rng: np.random.Generator) -> SimulatedLesion:
    """Draw a lesion of a kind in a head.

    Args:
        kind: "high" (ring-enhancing glioma), "low" (solid, not enhancing),
            "ms" (a handful of plaques in white matter), "cyst", or "none".
        fractions: Tissue of the head, shape (I, J, K, 12).
        spacing_mm: Of its grid.
        rng: Where the lesion comes from.
    """
    shape = fractions.shape[:3]
    shares = np.zeros((*shape, len(COMPARTMENTS)), dtype=np.float32)
    density = np.zeros(shape, dtype=np.float32)
    push = np.zeros((*control_grid(shape, spacing_mm)[0], 3), dtype=np.float32)
    if kind in ("high", "low"):
        volume_ml = rng.uniform(30, 170) if kind == "high" else rng.uniform(15, 90)
        density = _grown(fractions, spacing_mm, volume_ml, rng)
        solid = _fill_tumour(shares, density, fractions, spacing_mm, rng, enhancing=kind == "high")
        push = mass_effect(solid, spacing_mm, peak_mm=rng.uniform(2, 6) * (1.0 if kind == "high" else 0.6))
    elif kind == "ms":
        shares[..., PLAQUE] = _plaques(fractions, spacing_mm, rng)
    elif kind == "cyst":
        shares[..., FLUID] = _cyst(fractions, spacing_mm, rng)
        push = mass_effect(shares[..., FLUID], spacing_mm, peak_mm=rng.uniform(1, 4))
    return SimulatedLesion(kind, shares, density, push)


def _grown(fractions: Array, spacing_mm: float, volume_ml: float, rng: np.random.Generator) -> Array:
    """Grow a tumour from one cell by reaction and diffusion until it has its volume; returns its density in [0, 1].

    Reference:
        Fisher-KPP as used for gliomas: dN/dt = div(D grad N) + rho N (1 - N).
    """
    from scipy import ndimage

    stride = max(1, round(GROWTH_MM / spacing_mm))
    coarse = fractions[::stride, ::stride, ::stride]
    voxel_mm = spacing_mm * stride
    mobility = sum(np.float32(share) * coarse[..., tissue] for tissue, share in _MOBILITY.items())
    living = coarse[..., [CSF, GM, WM, DGM]].sum(axis=-1) > 0.5
    texture = np.exp(np.float32(0.8) * smooth_noise(rng, living.shape, 5 / voxel_mm))
    diffusion = np.minimum(DIFFUSION * mobility * texture, 0.16) * living  # explicit steps stay stable below 1/6
    rate = np.exp(rng.uniform(*np.log(PROLIFERATION)))
    growth = (rate * living * (1 - coarse[..., CSF])).astype(np.float32)
    deep = ndimage.distance_transform_edt(coarse[..., WM] > 0.6) * voxel_mm
    deep[:, :, : int(np.quantile(np.nonzero(deep > 0)[2], 0.3))] = 0  # gliomas of the brainstem are another disease
    seeds = np.argwhere(deep >= min(4.0, 0.8 * deep.max()))
    seed = seeds[rng.integers(len(seeds))]
    density = np.zeros(living.shape, dtype=np.float32)
    density[tuple(seed)] = 1
    wanted = volume_ml * 1000 / voxel_mm**3
    reach = 4
    for step in range(_LONGEST):
        box = tuple(slice(max(0, c - reach), c + reach + 1) for c in seed)
        if step % 10 == 0:
            here = density[box]
            if (here > WHOLE).sum() >= wanted and (here > SOLID + 0.1).sum() >= LEAST_CORE * wanted:
                break
            edge = max(here[[0, -1]].max(), here[:, [0, -1]].max(), here[:, :, [0, -1]].max())
            reach += 10 if edge > 1e-4 else 0
            box = tuple(slice(max(0, c - reach), c + reach + 1) for c in seed)
        density[box] += grow_step(density[box], diffusion[box], growth[box])
    if stride == 1:
        return density
    points = grid_points(fractions.shape[:3]) / np.float32(stride)
    return pull(density[..., None], points).reshape(fractions.shape[:3])


def grow_step(density: Array, diffusion: Array, growth: Array) -> Array:
    """Return how fast the density of tumour cells changes at each voxel: logistic growth and diffusion."""
    change = growth * density * (1 - density)
    for axis in range(3):
        first = [slice(None)] * 3
        second = [slice(None)] * 3
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        a, b = tuple(first), tuple(second)
        flow = (density[b] - density[a]) * (diffusion[a] + diffusion[b]) * np.float32(0.5)
        change[a] += flow
        change[b] -= flow
    return change


def _fill_tumour(
    shares: Array, density: Array, fractions: Array, spacing_mm: float, rng: np.random.Generator, *, enhancing: bool
) -> Array:
    """Divide a tumour into compartments, in place; returns the share of the solid core."""
    from scipy import ndimage

    shape = density.shape
    threshold = SOLID if enhancing else 0.45
    solid = density > threshold + 0.05 * smooth_noise(rng, shape, 5 / spacing_mm)
    solid = ndimage.binary_fill_holes(solid)
    box = _box_of(density > 0.01, margin=3)
    depth = np.zeros(shape, dtype=np.float32)
    depth[box] = ndimage.distance_transform_edt(solid[box]) * spacing_mm
    if enhancing:
        rim_mm = rng.uniform(2.0, 4.5) * np.exp(0.25 * smooth_noise(rng, shape, 6 / spacing_mm))
        dead_mm = 6.0 + 1.5 * smooth_noise(rng, shape, 4 / spacing_mm)
        parts = {RIM: solid & (depth <= rim_mm), FLUID: solid & (depth > rim_mm) & (depth > dead_mm)}
        parts[CORE] = solid & ~parts[RIM] & ~parts[FLUID]
    else:
        parts = {CORE: solid}
    core = np.zeros(shape, dtype=np.float32)
    for compartment, where in parts.items():
        shares[..., compartment][box] = ndimage.gaussian_filter(where[box].astype(np.float32), 0.6 / spacing_mm)
        core += shares[..., compartment]
    # Fluid follows the fibres: white matter swells, the cortex above it hardly does.
    loose = fractions[..., WM] + 0.5 * fractions[..., DGM] + 0.35 * fractions[..., GM]
    infiltration = np.clip((density - 0.04) / 0.16, 0, 1)
    shares[..., OEDEMA] = 0.92 * infiltration * loose * (1 - np.minimum(core, 1))
    shares /= np.maximum(shares.sum(axis=-1, keepdims=True), 1)
    return core


def _plaques(fractions: Array, spacing_mm: float, rng: np.random.Generator) -> Array:
    """Scatter 8 to 25 small ellipsoids in white matter, most of them beside the ventricles."""
    from scipy import ndimage

    white = fractions[..., WM]
    inner = ndimage.distance_transform_edt(fractions[..., CSF] < 0.5) * spacing_mm
    cortex = ndimage.gaussian_filter(fractions[..., GM], 6 / spacing_mm)
    weight = (white > 0.8) * np.exp(-inner / 8) * np.maximum(0.35 - cortex, 0.01)
    centres = rng.choice(weight.size, size=rng.integers(8, 26), p=(weight / weight.sum()).ravel(), replace=False)
    share = np.zeros(white.shape, dtype=np.float32)
    for centre in np.stack(np.unravel_index(centres, white.shape), axis=1):
        radii = rng.uniform(2.0, 5.5) * rng.uniform(0.7, 1.3, 3) / spacing_mm
        box = tuple(slice(max(0, int(c - r - 2)), int(c + r + 3)) for c, r in zip(centre, radii))
        offsets = np.ogrid[box]
        distance = np.sqrt(sum(((o - c) / r) ** 2 for o, c, r in zip(offsets, centre, radii)))
        part = share[box]
        np.maximum(part, np.clip((1 - distance) * radii.min() + 0.5, 0, 1), out=part, casting="unsafe")
    return np.asarray(share * np.clip(white * 1.2, 0, 1), dtype=np.float32)


def _cyst(fractions: Array, spacing_mm: float, rng: np.random.Generator) -> Array:
    """Draw a smooth-walled ball of fluid, 6 to 18 mm in radius, in the brain."""
    tissue = fractions[..., WM] + fractions[..., GM] + fractions[..., DGM]
    seeds = np.argwhere(fractions[..., WM] > 0.9)
    centre = seeds[rng.integers(len(seeds))]
    radius = rng.uniform(6, 18) * np.exp(0.15 * smooth_noise(rng, tissue.shape, 12 / spacing_mm))
    offsets = np.ogrid[tuple(slice(0, n) for n in tissue.shape)]
    distance = np.sqrt(sum(((o - c) * spacing_mm) ** 2 for o, c in zip(offsets, centre)))
    ball = np.clip((radius - distance) / spacing_mm + 0.5, 0, 1) * np.clip(tissue * 1.2, 0, 1)
    return np.asarray(ball, dtype=np.float32)


def mass_effect(solid: Array, spacing_mm: float, peak_mm: float) -> Array:
    """Push tissue away from a mass: the origin of a point moves up the slope of the smoothed mass."""
    from scipy import ndimage

    coarse, stride = control_grid(solid.shape, spacing_mm)
    smooth = ndimage.gaussian_filter(solid, 5 / spacing_mm)
    sampled = pull(smooth[..., None], grid_points(coarse) * np.float32(stride)).reshape(coarse)
    slope = np.stack(list(np.gradient(ndimage.gaussian_filter(sampled, 1.0))), axis=-1)
    longest = float(np.linalg.norm(slope, axis=-1).max())
    return (slope * (peak_mm / spacing_mm / max(longest, 1e-6))).astype(np.float32)


def lesion_labels(shares: Array, density: Array, inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Label a lesion as BraTS does: 1 core, necrosis or fluid, 2 oedema or plaque, 4 enhancing.

    Args:
        shares: Of each compartment, shape (I, J, K, 5), on the subject's grid.
        density: On the same grid, shape (I, J, K).
        inside: The brain.
    """
    labels = np.zeros(density.shape, dtype=np.uint8)
    core = shares[..., [CORE, RIM, FLUID]]
    labels[(density > WHOLE) | (shares[..., PLAQUE] > 0.4)] = 2
    solid = core.sum(axis=-1) > 0.5
    labels[solid] = np.array([1, 4, 1], dtype=np.uint8)[core.argmax(axis=-1)[solid]]
    labels[~inside] = 0
    return labels


def _box_of(mask: NDArray[np.bool_], margin: int) -> tuple[slice, ...]:
    where = np.argwhere(mask)
    if not len(where):
        return (slice(0, 1),) * mask.ndim
    return tuple(slice(max(0, int(a) - margin), int(b) + margin + 1) for a, b in zip(where.min(0), where.max(0)))
