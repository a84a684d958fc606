"""One simulated patient: a head, a disease, the position in each scan, and the scanner's images.

Patient n of a seed is the same for any number of patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.simulation.anatomy import (
    BONE_CORT,
    Head,
    brain_mask,
    embedded_head,
    given_head,
    head_mask,
    stripped_mask,
)
from chiasm.simulation.deformation import (
    Array,
    Deformation,
    deform,
    grid_points,
    pull,
    random_affine,
    random_velocity,
    rotation,
    smooth_noise,
)
from chiasm.simulation.lesions import COMPARTMENTS, Disease, SimulatedLesion, draw_lesion, lesion_labels
from chiasm.simulation.signals import (
    CHANNELS,
    MATERIALS,
    SITES,
    Material,
    Site,
    acquire_ct,
    acquire_mr,
    hounsfield,
    occupied,
    signal,
)

Movement = Literal["elastic", "rigid", "held"]
Card = TypeVar("Card")

CONTRASTS = ("t1", "t1ce", "t2", "flair", "pd")
#: Contrasts that were scanned after the patient moved, where there is misregistration.
MOVED = ("t2", "flair", "pd")

#: Brightness of a lesion's compartments in T1-weighted scans of varied patients, from fluid (0) to white matter (1).
VARIED_LEVELS: Mapping[str, tuple[float, float]] = {
    "oedema": (0.35, 1.0),
    "core": (0.1, 0.85),
    "rim": (0.3, 1.05),
    "fluid": (0.0, 0.45),
    "plaque": (0.2, 0.85),
}

#: Of five patients in a row three have a glioma, one has another lesion and one has none.
DECKS: tuple[tuple[Disease, ...], ...] = (
    ("high", "high", "low", "ms", "none"),
    ("high", "high", "low", "cyst", "none"),
)


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of a cohort.

    Attributes:
        sites: How many of `SITES` take part.
        jitter: Standard deviation of the logarithm of TR, TE and TI between patients of a site.
        misregistration_mm: How far the T2-weighted scans lie from the T1-weighted ones.
        thick_mm: Added to the slice thickness of the T2-weighted scans.
        shared: Standard deviation of the logarithm of T1 and T2 alike, in normal tissue.
        alone: Likewise of T2 alone: the noise floor of any T1 to T2.
        movement: How they lie there: "elastic" is half rigid and half a smooth
            deformation; "rigid" is rigid alone; "held" is the same patient and
            scan had he not moved.
        varied: Whether each patient's T1-weighted scan has a contrast, shading, noise, slices and display curve
            of its own, beyond any hospital's, and the T2-weighted ones little shading and noise.
    """

    sites: int
    jitter: float
    misregistration_mm: float
    thick_mm: float
    shared: float
    alone: float
    movement: Movement = "elastic"
    varied: bool = False


DIFFICULTIES: Mapping[str, Difficulty] = {
    "easy": Difficulty(1, 0.02, 0.0, 0.0, 0.04, 0.03),
    "standard": Difficulty(4, 0.12, 1.0, 0.0, 0.035, 0.07),
    "hard": Difficulty(4, 0.12, 2.0, 2.0, 0.035, 0.07),
    "varied": Difficulty(4, 0.12, 0.0, 0.0, 0.035, 0.05, varied=True),
}


class Subject(NamedTuple):
    """One simulated patient and the truth about it.

    Attributes:
        name: Number as text, four digits.
        head: The anatomy it was made of.
        site: Where it was scanned.
        images: Contrast to raw intensities, shape (I, J, K), float32 of whole numbers.
        labels: 0 or a value of `REGIONS`, shape (I, J, K), uint8.
        brain: The brain, shape (I, J, K).
        stripped: The brain as a skull-stripper found it.
        body: The head, shape (I, J, K).
        fractions: Share of each of `CHANNELS`, shape (I, J, K, 17), sums to 1.
        clean: Contrast to what it is without noise, bias, gain and display curve.
        expected: Contrast to `clean` without the T2 texture that T1 does not show.
        moved_mm: Where each voxel of a moved contrast comes from: (I, J, K, 3), float32.
        parameters: Everything that was drawn, ready for JSON.
        affine: Voxel to world mm, (4, 4).
    """

    name: str
    head: str
    site: str
    images: dict[str, Array]
    labels: NDArray[np.uint8]
    brain: NDArray[np.bool_]
    stripped: NDArray[np.bool_]
    body: NDArray[np.bool_]
    fractions: Array
    clean: dict[str, Array]
    expected: dict[str, Array]
    moved_mm: Array
    parameters: dict[str, Any]
    affine: NDArray[np.float64]


def draw_subject(
    number: int, seed: int, *, heads: Mapping[str, Path] | None, spacing_mm: float, difficulty: Difficulty
) -> Subject:
    """Simulate one patient.

    Args:
        number: From 1.
        seed: Of the cohort.
        heads: From `find_heads`, taken in turn; None embeds the template.
        spacing_mm: Voxel size.
        difficulty: How much the patients vary.
    """
    rng = np.random.default_rng((seed, number))
    head = _choose_head(heads, number, spacing_mm, rng)
    kind = _drawn(DECKS[(number - 1) // 5 % 2], number, seed, 1)
    lesion = draw_lesion(kind, head.fractions, spacing_mm, rng)
    lying = _lay(head, lesion, difficulty, rng)
    site = _protocol(_drawn(SITES[: difficulty.sites], number, seed, 2), difficulty.jitter, rng)
    materials = _materials(site, seed, rng)
    sites = (site, site)
    if difficulty.varied:
        materials = vary_contrast(materials, rng)
        sites = _vary_scans(site, rng)
    scans = _scan(head, lying, sites, materials, difficulty, rng)

    fractions = lying.still.fractions.reshape(*head.shape, -1)
    ct = hounsfield(lying.still.fractions, lying.still.textures[:, 2], materials).reshape(head.shape)
    scans.images["ct"] = acquire_ct(ct, fractions[..., BONE_CORT], rng, spacing_mm)
    brain = brain_mask(fractions, spacing_mm)
    labels = lesion_labels(fractions[..., -len(COMPARTMENTS) :], lying.still.density.reshape(head.shape), brain)
    parameters = {
        "seed": seed,
        "number": number,
        "head": head.name,
        "lesion": kind,
        "site": asdict(site),
        "difficulty": asdict(difficulty),
        "spacing_mm": spacing_mm,
        "least_jacobian": lying.least_jacobian,
    }
    return Subject(
        f"{number:04d}",
        head.name,
        site.name,
        scans.images,
        labels,
        brain,
        stripped_mask(brain, rng, spacing_mm),
        head_mask(fractions),
        fractions,
        scans.clean,
        scans.expected,
        lying.moved_mm,
        parameters,
        head.affine,
    )


def _choose_head(heads: Mapping[str, Path] | None, number: int, spacing_mm: float, rng: np.random.Generator) -> Head:
    """Take the given heads in turn; without any, embed the template."""
    if not heads:
        return embedded_head(rng, spacing_mm)
    name = sorted(heads)[(number - 1) % len(heads)]
    return given_head(name, heads[name], spacing_mm)


class Pose(NamedTuple):
    """The content of each voxel during a scan.

    Attributes:
        fractions: Share of each of `CHANNELS`, shape (voxels, 17).
        density: Of tumour cells, shape (voxels,).
        textures: Of T1 and T2 alike, of T2 alone and of CT, shape (voxels, 3).
    """

    fractions: Array
    density: Array
    textures: Array


class Lying(NamedTuple):
    """The position of a patient in the earlier and in the later scans.

    Attributes:
        still: In the earlier ones.
        moved: In the later ones.
        moved_mm: Where each voxel of the later ones comes from, shape (I, J, K, 3).
        least_jacobian: Of what makes this patient's head from the given one.
    """

    still: Pose
    moved: Pose
    moved_mm: Array
    least_jacobian: float


def _lay(head: Head, lesion: SimulatedLesion, difficulty: Difficulty, rng: np.random.Generator) -> Lying:
    """Put the lesion into the head, deform both alike, and draw how far the patient moves."""
    host = head.fractions * (1 - lesion.shares.sum(axis=-1, keepdims=True))
    textures = [smooth_noise(rng, head.shape, rng.uniform(2.5, 5) / head.spacing_mm) for _ in range(3)]
    stack = np.concatenate(
        [host, lesion.shares, lesion.density[..., None], *(field[..., None] for field in textures)], axis=-1
    )
    velocity = random_velocity(rng, head.shape, head.spacing_mm, rng.uniform(12, 20), rng.uniform(4, 7)) + lesion.push
    phi = deform(head.shape, head.spacing_mm, velocity, matrix=random_affine(rng))
    points = grid_points(head.shape)
    still = _pose(pull(stack, phi(points)))
    movement = _movement(rng, head, difficulty.misregistration_mm, difficulty.movement)
    places = points if movement is None else movement(points)
    moved = still if movement is None else _pose(pull(stack, phi(places)))
    shift_mm = (places - points) * np.float32(head.spacing_mm)
    return Lying(still, moved, shift_mm.reshape(*head.shape, 3), phi.least_jacobian())


def _pose(stack: Array) -> Pose:
    tissues = len(CHANNELS)
    return Pose(stack[:, :tissues], stack[:, tissues], stack[:, tissues + 1 :])


class Scans(NamedTuple):
    """MR images by contrast, and the truth about them; see `Subject`."""

    images: dict[str, Array]
    clean: dict[str, Array]
    expected: dict[str, Array]


def _scan(
    head: Head,
    lying: Lying,
    sites: tuple[Site, Site],
    materials: Sequence[Material],
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> Scans:
    """Scan every MR contrast at the first site, those of `MOVED` after the patient moved, and at the second."""
    coil = smooth_noise(rng, head.shape, 44 / head.spacing_mm)
    voxels = [
        occupied(pose.fractions, pose.textures[:, 0], pose.textures[:, 1], materials, _strengths(difficulty))
        for pose in (lying.still, lying.moved)
    ]
    scans = Scans({}, {}, {})
    for contrast in CONTRASTS:
        late = contrast in MOVED
        site = sites[late]
        scans.clean[contrast] = signal(contrast, site, voxels[late], head.shape)
        if late:
            scans.expected[contrast] = signal(contrast, site, voxels[late], head.shape, with_own=False)
        thick_mm = site.thick_mm[late] + difficulty.thick_mm * late
        scans.images[contrast] = acquire_mr(
            scans.clean[contrast], coil, site, rng, head.spacing_mm, gamma=site.gamma[late], thick_mm=thick_mm
        )
    return scans


def _drawn(deck: Sequence[Card], number: int, seed: int, pack: int) -> Card:
    """Draw from a shuffled list in turn, so that a few patients in a row are already a fair sample."""
    block, place = divmod(number - 1, len(deck))
    return deck[int(np.random.default_rng((seed, pack, block, 77)).permutation(len(deck))[place])]


def _movement(rng: np.random.Generator, head: Head, level_mm: float, kind: Movement) -> Deformation | None:
    """Draw the patient's position in the later scans; None without movement."""
    if level_mm == 0:
        return None
    shift = rng.normal(size=3)
    shift *= level_mm / np.linalg.norm(shift) / head.spacing_mm / 2
    velocity = random_velocity(rng, head.shape, head.spacing_mm, 16, level_mm)
    matrix = rotation(rng.uniform(-0.5, 0.5, 3) * level_mm)
    if kind == "held":  # drawn all the same, so that what follows is the same
        return None
    if kind == "rigid":
        return deform(head.shape, head.spacing_mm, 0 * velocity, matrix=matrix, shift=2 * shift)
    return deform(head.shape, head.spacing_mm, velocity, matrix=matrix, shift=shift)


def _protocol(site: Site, jitter: float, rng: np.random.Generator) -> Site:
    def drawn(times: tuple[float, ...]) -> Any:
        return tuple(float(time * np.exp(jitter * np.clip(rng.normal(), -2, 2))) for time in times)

    return replace(
        site,
        t1=drawn(site.t1),
        t2=drawn(site.t2),
        pd=drawn(site.pd),
        flair=drawn(site.flair),
        gamma=drawn(site.gamma),
    )


def _materials(site: Site, seed: int, rng: np.random.Generator) -> list[Material]:
    """Scale the table for the site (its way of measuring) and for the patient."""
    ours = np.random.default_rng((seed, 3, [one.name for one in SITES].index(site.name)))
    factor1, factor2 = np.exp(ours.uniform(-0.08, 0.08, 2))
    made = []
    for name in CHANNELS:
        material = MATERIALS[name]
        spread = (0.10, 0.14) if name in COMPARTMENTS else (0.045, 0.045)  # disease differs more than tissue
        one, two = np.exp(rng.normal(0, spread)) * (factor1, factor2)
        made.append(
            material._replace(
                t1_ms=tuple(time * one for time in material.t1_ms), t2_ms=tuple(time * two for time in material.t2_ms)
            )
        )
    return made


def vary_contrast(materials: Sequence[Material], rng: np.random.Generator) -> list[Material]:
    """Give each material a brightness in T1-weighted scans that no protocol decides, in a plausible order of tissues.

    White matter is 1, fluid lies at 0.1 to 0.45, grey matter between them; lesions lie anywhere from fluid to a little
    above white matter, as far as their water allows.

    Args:
        materials: One for each of `CHANNELS`.
        rng: Where the levels come from.
    """
    fluid = rng.uniform(0.1, 0.45)
    grey = rng.uniform(0.35, 0.85)
    shares = {"csf": 0.0, "eye": 0.0, "wm": 1.0, "gm": grey, "dgm": grey + (1 - grey) * rng.uniform(0.1, 0.8)}
    shares |= {"vessel": rng.uniform(0.0, 1.5), "soft": rng.uniform(0.3, 1.0), "mucosa": rng.uniform(0.3, 1.0)}
    shares |= {name: rng.uniform(*VARIED_LEVELS[name]) for name in COMPARTMENTS}
    levels = {name: fluid + (1 - fluid) * share for name, share in shares.items()}
    return [material._replace(t1_level=levels.get(name)) for name, material in zip(CHANNELS, materials, strict=True)]


def _vary_scans(site: Site, rng: np.random.Generator) -> tuple[Site, Site]:
    """Return how the T1-weighted and the T2-weighted scans of a varied patient are acquired."""
    thick_mm = rng.uniform(1, 5) if rng.random() < 0.4 else 0.0
    early = replace(
        site,
        bias=rng.uniform(0.03, 0.12),
        noise=rng.uniform(0.01, 0.04),
        thick_mm=(thick_mm, 0.0),
        gamma=(rng.uniform(0.75, 1.4), 1.0),
    )
    return early, replace(site, bias=0.03, noise=0.005, thick_mm=(0.0, 0.0), gamma=(1.0, site.gamma[1]))


def _strengths(difficulty: Difficulty) -> list[tuple[float, float]]:
    return [(0.10, 0.12) if name in COMPARTMENTS else (difficulty.shared, difficulty.alone) for name in CHANNELS]
