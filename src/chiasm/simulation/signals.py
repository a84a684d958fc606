"""The signal of tissue in a scanner: relaxation, Hounsfield units, and the errors of an acquisition.

Signals are computed for each tissue and then mixed by its share of a voxel,
as in a scanner: parameters are not mixed.  `MATERIALS` holds literature
values; those marked "recalled" in docs/phantom.md were not read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.simulation.anatomy import TISSUES
from chiasm.simulation.deformation import Array, smooth_noise
from chiasm.simulation.lesions import COMPARTMENTS


class Material(NamedTuple):
    """Relaxation at 1.5 and 3 T, proton density, and Hounsfield units.

    Attributes:
        t1_ms: At 1.5 T and at 3 T.
        t2_ms: At 1.5 T and at 3 T.
        pd: Proton density, water is 1.
        hu: Mean Hounsfield unit.
        hu_texture: Its standard deviation within the tissue.
        uptake_mm: Gadolinium after injection, in mmol/l.
        t1_level: Brightness in T1-weighted scans; None follows from relaxation.
    """

    t1_ms: tuple[float, float]
    t2_ms: tuple[float, float]
    pd: float
    hu: float
    hu_texture: float
    uptake_mm: float = 0.02
    t1_level: float | None = None


#: Every channel of a subject: `TISSUES`, then the `COMPARTMENTS` of a lesion.
MATERIALS: Mapping[str, Material] = {
    "air": Material((1000, 1000), (10, 10), 0.0, -1000, 3, 0.0),
    "csf": Material((3500, 4000), (1500, 1800), 1.00, 8, 2, 0.0),
    "gm": Material((1080, 1400), (95, 100), 0.84, 37, 2),
    "wm": Material((720, 850), (72, 75), 0.70, 29, 2),
    "dgm": Material((900, 1150), (78, 80), 0.80, 36, 2),
    "skin_fat": Material((350, 450), (70, 90), 0.75, -40, 25),
    "soft": Material((1008, 1300), (44, 38), 0.78, 55, 10),
    "bone_cort": Material((250, 250), (1, 1), 0.12, 1250, 200, 0.0),
    "bone_canc": Material((350, 420), (60, 60), 0.35, 500, 130),
    "mucosa": Material((1100, 1300), (75, 70), 0.85, 40, 12, 0.15),
    "vessel": Material((1441, 1650), (45, 40), 0.85, 52, 6, 0.25),
    "eye": Material((3000, 3500), (900, 900), 0.98, 10, 3, 0.0),
    "oedema": Material((1200, 1480), (150, 165), 0.87, 20, 3),
    "core": Material((1550, 1900), (180, 190), 0.88, 33, 4, 0.04),
    "rim": Material((1200, 1500), (110, 115), 0.86, 42, 4, 0.45),
    "fluid": Material((2200, 3000), (300, 350), 0.95, 14, 3),
    "plaque": Material((1000, 1300), (190, 150), 0.80, 25, 3),
}
CHANNELS = (*TISSUES, *COMPARTMENTS)
RELAXIVITY = 4.5  # per second and mmol/l, of gadolinium chelates


@dataclass(frozen=True)
class Site:
    """The protocols and the scanner of a hospital.

    Attributes:
        name: Of the hospital.
        field: Index into relaxation times: 0 is 1.5 T, 1 is 3 T.
        t1: (TR, TE) in ms of a spin echo, or (TR, TE, flip angle in degrees) of a spoiled gradient echo.
        t2: (TR, TE) in ms of a turbo spin echo.
        pd: Likewise.
        flair: (TR, TI, TE) in ms.
        gain: Typical raw intensity of unit signal.
        noise: Standard deviation of the noise as a share of the 95th percentile.
        bias: Standard deviation of the logarithm of the coil's sensitivity.
        thick_mm: Slice thickness of T1 and of T2-weighted scans; 0 is the voxels'.
        gamma: Exponents of the display curve that the archive applied to T1 and to T2-weighted scans.
    """

    name: str
    field: int
    t1: tuple[float, ...]
    t2: tuple[float, float]
    pd: tuple[float, float]
    flair: tuple[float, float, float]
    gain: float
    noise: float
    bias: float
    thick_mm: tuple[float, float] = (0.0, 0.0)
    gamma: tuple[float, float] = (1.0, 1.0)


#: Design choices within the range of clinical protocols.
SITES: Sequence[Site] = (
    Site("north", 1, (9.0, 3.0, 16.0), (5000, 95), (3000, 15), (9000, 2500, 120), 900, 0.012, 0.12, (0, 3)),
    Site("east", 0, (500, 14), (4000, 100), (2600, 15), (9000, 2300, 110), 250, 0.014, 0.18, (5, 5), (1.0, 1.3)),
    Site("south", 1, (560, 12), (6200, 84), (3200, 12), (9500, 2500, 125), 4000, 0.012, 0.20, (5, 4), (1.4, 0.75)),
    Site(
        "west", 0, (24.0, 5.0, 30.0), (3400, 120), (2400, 20), (8000, 2200, 130), 120, 0.016, 0.15, (0, 6), (0.6, 1.0)
    ),
)


class Voxels(NamedTuple):
    """The voxels of one material, and its differences from the table there.

    Attributes:
        material: From `MATERIALS`, scaled for site and subject.
        where: Flat indices, shape (n,).
        share: Of each voxel, shape (n,).
        stretch: Factor of T1 and T2 alike, shape (n,): what T1 shows of T2.
        own: Factor of T2 alone, shape (n,): what no other contrast shows.
    """

    material: Material
    where: NDArray[np.intp]
    share: Array
    stretch: Array
    own: Array


def occupied(
    fractions: Array,
    shared: Array,
    alone: Array,
    materials: Sequence[Material],
    strength: Sequence[tuple[float, float]],
) -> list[Voxels]:
    """List the voxels of each material, with its texture.

    Args:
        fractions: Share of each channel, shape (N, C).
        shared: Standard normal texture that acts on T1 and T2, shape (N,).
        alone: Likewise, on T2 alone.
        materials: One for each channel.
        strength: (shared, alone) standard deviation of the logarithm of the relaxation times, for each channel.
    """
    listed = []
    for channel, (material, (a, b)) in enumerate(zip(materials, strength, strict=True)):
        where = np.flatnonzero(fractions[:, channel] > 0.004)
        if material.pd > 0 and len(where):
            stretch, own = np.exp(np.float32(a) * shared[where]), np.exp(np.float32(b) * alone[where])
            listed.append(Voxels(material, where, fractions[where, channel], stretch, own))
    return listed


def signal(
    contrast: str, site: Site, voxels: Sequence[Voxels], shape: tuple[int, ...], *, with_own: bool = True
) -> Array:
    """Compute a noise-free MR image.

    Spin echoes give ``PD (1 - exp(-TR/T1)) exp(-TE/T2)``, spoiled gradient
    echoes the Ernst formula, inversion recovery the magnitude of
    ``1 - 2 exp(-TI/T1) + exp(-TR/T1)``; gadolinium adds to 1/T1.

    Args:
        contrast: "t1", "t1ce", "t2", "pd" or "flair".
        site: The protocol.
        voxels: From `occupied`.
        shape: Of the image.
        with_own: Whether T2 has the texture that no other contrast shows.

    Returns:
        Shape `shape`; pure water of full magnetisation is 1.
    """
    image = np.zeros(int(np.prod(shape)), dtype=np.float32)
    for material, where, share, stretch, own in voxels:
        rate1 = np.float32(1 / material.t1_ms[site.field]) / stretch
        rate2 = np.float32(1 / material.t2_ms[site.field]) / (stretch * own if with_own else stretch)
        if contrast == "t1ce":
            rate1 = rate1 + np.float32(RELAXIVITY * material.uptake_mm / 1000)
        if contrast == "t1" and material.t1_level is not None:
            part = np.float32(material.t1_level / material.pd) / stretch
        elif contrast in ("t1", "t1ce"):
            part = _gradient_echo(rate1, rate2, *site.t1) if len(site.t1) == 3 else _spin_echo(rate1, rate2, *site.t1)
        elif contrast == "flair":
            repetition, inversion, echo = site.flair
            part = np.abs(1 - 2 * np.exp(-inversion * rate1) + np.exp(-repetition * rate1)) * np.exp(-echo * rate2)
        else:
            part = _spin_echo(rate1, rate2, *(site.t2 if contrast == "t2" else site.pd))
        image[where] += share * part * np.float32(material.pd)
    return image.reshape(shape)


def _spin_echo(rate1: Array, rate2: Array, repetition: float, echo: float) -> Array:
    return np.asarray((1 - np.exp(-np.float32(repetition) * rate1)) * np.exp(-np.float32(echo) * rate2))


def _gradient_echo(rate1: Array, rate2: Array, repetition: float, echo: float, flip: float) -> Array:
    """Ernst's formula, scaled so that it is as bright as a spin echo; T2* is taken as half of T2."""
    angle = np.radians(flip)
    e1 = np.exp(-np.float32(repetition) * rate1)
    steady = np.float32(np.sin(angle)) * (1 - e1) / (1 - np.float32(np.cos(angle)) * e1)
    return np.asarray(np.float32(6) * steady * np.exp(-np.float32(2 * echo) * rate2))


def hounsfield(fractions: Array, texture: Array, materials: Sequence[Material]) -> Array:
    """Compute a noise-free CT image, shape (N,), from fractions (N, C) and a standard normal texture (N,)."""
    mean = np.array([material.hu for material in materials], dtype=np.float32)
    spread = np.array([material.hu_texture for material in materials], dtype=np.float32)
    image: Array = fractions @ mean + (fractions @ spread) * texture
    return image


def acquire_mr(
    image: Array,
    coil: Array,
    site: Site,
    rng: np.random.Generator,
    spacing_mm: float,
    *,
    gamma: float,
    thick_mm: float,
) -> Array:
    """Add the errors of a scanner and an archive to a noise-free MR image.

    Args:
        image: Unit signal, shape (I, J, K).
        coil: Standard normal field that all scans of a session share, of the same shape.
        site: Bias, noise and gain.
        rng: Where noise and bias come from.
        spacing_mm: Of the grid.
        gamma: Of the display curve, around the 99th percentile.
        thick_mm: Slice thickness along K; below the spacing it does nothing.

    Returns:
        Raw intensities: whole numbers from 0, below 32768, shape (I, J, K).
    """
    from scipy import ndimage

    if thick_mm > spacing_mm:
        image = ndimage.gaussian_filter1d(image, thick_mm / spacing_mm / 2.355, axis=2)
    own = smooth_noise(rng, image.shape, 44 / spacing_mm)
    image = image * np.exp(np.float32(site.bias) * (np.float32(0.8) * coil + np.float32(0.6) * own))
    level = float(np.percentile(image[image > 0.02], 95))
    sigma = np.float32(site.noise * rng.uniform(0.7, 1.4) * level)
    real = image + sigma * rng.standard_normal(image.shape, dtype=np.float32)
    image = np.hypot(real, sigma * rng.standard_normal(image.shape, dtype=np.float32))
    image = level * (image / np.float32(level)) ** np.float32(gamma)
    raw = np.rint(image * np.float32(site.gain * rng.uniform(0.7, 1.4)))
    return np.asarray(np.minimum(raw, 32767), dtype=np.float32)


def acquire_ct(image: Array, bone: Array, rng: np.random.Generator, spacing_mm: float) -> Array:
    """Add the errors of a scanner to a noise-free CT image: point spread, beam hardening, noise, clipping.

    Args:
        image: Hounsfield units, shape (I, J, K).
        bone: Share of compact bone, of the same shape.
        rng: Where the noise comes from.
        spacing_mm: Of the grid.

    Returns:
        Whole Hounsfield units in [-1024, 3071], shape (I, J, K).
    """
    from scipy import ndimage

    image = ndimage.gaussian_filter(image, 0.8 / 2.355 / spacing_mm)
    image = image + 14 * ndimage.gaussian_filter(bone, 6 / spacing_mm) * (image > -200)
    grain = ndimage.gaussian_filter(rng.standard_normal(image.shape, dtype=np.float32), 0.5)
    image = image + np.float32(rng.uniform(4, 6)) * grain / grain.std()
    return np.clip(np.rint(image), -1024, 3071).astype(np.float32)
