"""Simulated patients with a known truth: a cohort on disk that everything can be tried on.

Subject n of a seed is the same patient whatever the number of subjects; every
file is the same to the byte.  docs/phantom.md tells what is simulated, what
is not, and how near real cohorts the figures come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import RecipeError, unknown
from chiasm.locks import locked
from chiasm.simulation.anatomy import (
    BONE_CORT,
    Head,
    brain_mask,
    embedded_head,
    find_heads,
    given_head,
    head_mask,
    stripped_mask,
)
from chiasm.simulation.cohort_folder import PARAMETERS, make_room
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
from chiasm.simulation.lesions import COMPARTMENTS, REGIONS, Kind, draw_lesion, lesion_labels
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
from chiasm.storage import read_json, whole_file, write_json
from chiasm.volumes import Geometry, write_volume

Layout = Literal["brats", "bids", "synthrad"]
Movement = Literal["elastic", "rigid", "held"]
Progress = Callable[[int, int, str], None]
Card = TypeVar("Card")

MOST_MISREGISTERED_MM = 20.0

CONTRASTS = ("t1", "t1ce", "t2", "flair", "pd")
#: Contrasts that were scanned after the patient moved, where there is misregistration.
MOVED = ("t2", "flair", "pd")

#: Of five patients in a row three have a glioma, one has another lesion and one has none.
DECKS: tuple[tuple[Kind, ...], ...] = (("high", "high", "low", "ms", "none"), ("high", "high", "low", "cyst", "none"))


@dataclass(frozen=True)
class Difficulty:
    """What makes a cohort hard.

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
    """

    sites: int
    jitter: float
    misregistration_mm: float
    thick_mm: float
    shared: float
    alone: float
    movement: Movement = "elastic"


DIFFICULTIES: Mapping[str, Difficulty] = {
    "easy": Difficulty(1, 0.02, 0.0, 0.0, 0.04, 0.03),
    "standard": Difficulty(4, 0.12, 1.0, 0.0, 0.035, 0.07),
    "hard": Difficulty(4, 0.12, 2.0, 2.0, 0.035, 0.07),
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
        expected: Contrast to `clean` without the T2 texture that T1 cannot tell.
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
        difficulty: What is varied, and how much.
    """
    rng = np.random.default_rng((seed, number))
    if heads:
        name = sorted(heads)[(number - 1) % len(heads)]
        head = given_head(name, heads[name], spacing_mm)
    else:
        head = embedded_head(rng, spacing_mm)
    kind = _dealt(DECKS[(number - 1) // 5 % 2], number, seed, 1)
    lesion = draw_lesion(kind, head.fractions, spacing_mm, rng)
    host = head.fractions * (1 - lesion.shares.sum(axis=-1, keepdims=True))
    textures = [smooth_noise(rng, head.shape, rng.uniform(2.5, 5) / spacing_mm) for _ in range(3)]
    stack = np.concatenate(
        [host, lesion.shares, lesion.density[..., None], *(field[..., None] for field in textures)], axis=-1
    )
    velocity = random_velocity(rng, head.shape, spacing_mm, rng.uniform(12, 20), rng.uniform(4, 7)) + lesion.push
    phi = deform(head.shape, spacing_mm, velocity, matrix=random_affine(rng))
    points = grid_points(head.shape)
    still = pull(stack, phi(points))
    r = _movement(rng, head, difficulty.misregistration_mm, difficulty.movement)
    moved = still if r is None else pull(stack, phi(r(points)))
    site = _protocol(_dealt(SITES[: difficulty.sites], number, seed, 2), difficulty.jitter, rng)
    materials = _materials(site, seed, rng)

    coil = smooth_noise(rng, head.shape, 44 / spacing_mm)
    voxels = [
        occupied(pose[:, : len(CHANNELS)], pose[:, -3], pose[:, -2], materials, _strengths(difficulty))
        for pose in (still, moved)
    ]
    images, clean, expected = {}, {}, {}
    for contrast in CONTRASTS:
        late = contrast in MOVED
        clean[contrast] = signal(contrast, site, voxels[late], head.shape)
        if late:
            expected[contrast] = signal(contrast, site, voxels[late], head.shape, with_own=False)
        thick_mm = site.thick_mm[late] + difficulty.thick_mm * late
        images[contrast] = acquire_mr(
            clean[contrast], coil, site, rng, spacing_mm, gamma=site.gamma[late], thick_mm=thick_mm
        )
    fractions = still[:, : len(CHANNELS)].reshape(*head.shape, -1)
    density = still[:, len(CHANNELS)].reshape(head.shape)
    ct = hounsfield(still[:, : len(CHANNELS)], still[:, -1], materials).reshape(head.shape)
    images["ct"] = acquire_ct(ct, fractions[..., BONE_CORT], rng, spacing_mm)
    brain = brain_mask(fractions, spacing_mm)
    labels = lesion_labels(fractions[..., -len(COMPARTMENTS) :], density, brain)
    parameters = {
        "seed": seed,
        "number": number,
        "head": head.name,
        "lesion": kind,
        "site": asdict(site),
        "difficulty": asdict(difficulty),
        "spacing_mm": spacing_mm,
        "least_jacobian": phi.least_jacobian(),
    }
    shift = np.zeros_like(points) if r is None else r(points) - points
    return Subject(
        f"{number:04d}",
        head.name,
        site.name,
        images,
        labels,
        brain,
        stripped_mask(brain, rng, spacing_mm),
        head_mask(fractions),
        fractions,
        clean,
        expected,
        (shift * np.float32(spacing_mm)).reshape(*head.shape, 3),
        parameters,
        head.affine,
    )


def _dealt(deck: Sequence[Card], number: int, seed: int, pack: int) -> Card:
    """Deal a shuffled deck in turn, so that few patients in a row are a fair sample already."""
    block, place = divmod(number - 1, len(deck))
    return deck[int(np.random.default_rng((seed, pack, block, 77)).permutation(len(deck))[place])]


def _movement(rng: np.random.Generator, head: Head, level_mm: float, kind: Movement) -> Deformation | None:
    """Draw how the patient lies in the later scans; None where there is no movement."""
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


def _strengths(difficulty: Difficulty) -> list[tuple[float, float]]:
    return [(0.10, 0.12) if name in COMPARTMENTS else (difficulty.shared, difficulty.alone) for name in CHANNELS]


# --- on disk -----------------------------------------------------------------------------------------------------


def write_cohort(
    folder: Path,
    subjects: int,
    seed: int,
    *,
    anatomy: Path | None = None,
    spacing_mm: float = 2.0,
    difficulty: str = "standard",
    layout: str = "brats",
    skull_strip: bool | None = None,
    misregistration_mm: float | None = None,
    movement: str = "elastic",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Simulate a cohort, a folder that `find_cohort` recognises; finished subjects are not made again.

    Args:
        folder: Where it goes.
        subjects: How many.
        seed: Of everything.
        anatomy: Folder of label maps of heads; None takes the embedded template.
        spacing_mm: Voxel size, 1 to 4.
        difficulty: A name of `DIFFICULTIES`.
        layout: "brats" (all contrasts), "bids" (all contrasts) or "synthrad" (mr, which is T2-weighted, and ct).
        skull_strip: Whether MR is 0 outside the brain; None does so in "brats" alone.
        misregistration_mm: How far the T2-weighted scans lie from the T1-weighted ones; None as the difficulty says.
        movement: How they lie there: "elastic", "rigid" or "held", as in `Difficulty`.
        overwrite: Whether to remove simulated patients of the folder who do not belong to this cohort.
        progress: Called with subjects done, all subjects, the next one's id.

    Returns:
        The folder.

    Raises:
        RecipeError: If a setting is unknown or out of range.
        CohortError: If `anatomy` holds no heads.
        RunError: If another process writes there, or the folder holds other patients and `overwrite` is False.
    """
    folder = Path(folder)
    if difficulty not in DIFFICULTIES:
        raise unknown("difficulty", difficulty, DIFFICULTIES)
    if layout not in get_args(Layout):
        raise unknown("layout", layout, get_args(Layout))
    if movement not in get_args(Movement):
        raise unknown("movement", movement, get_args(Movement))
    hard = DIFFICULTIES[difficulty]
    level_mm = hard.misregistration_mm if misregistration_mm is None else misregistration_mm
    if not 0 <= level_mm <= MOST_MISREGISTERED_MM:
        raise RecipeError(
            "the misregistration is out of range",
            reason="misregistration",
            found=level_mm,
            expected=f"0 to {MOST_MISREGISTERED_MM:g} mm",
        )
    hard = replace(hard, misregistration_mm=level_mm, movement=cast(Movement, movement))
    if not 1 <= spacing_mm <= 4:
        raise RecipeError("the voxel size is out of range", reason="spacing", found=spacing_mm, expected="1 to 4 mm")
    if subjects < 1:
        raise RecipeError("there must be a subject", reason="subjects", found=subjects, expected="1 or more")
    heads = None if anatomy is None else find_heads(anatomy, spacing_mm)
    strip = layout == "brats" if skull_strip is None else skull_strip
    asked = {
        "layout": layout,
        "skull_strip": strip,
        "difficulty": difficulty,
        "seed": seed,
        "spacing_mm": spacing_mm,
        "heads": None if heads is None else list(heads),
    }
    if hard != DIFFICULTIES[difficulty]:  # the options came later: cohorts of before are still found
        asked |= {"misregistration_mm": level_mm, "movement": movement}
    with locked(folder):
        make_room(folder, asked, [case_name(layout, number) for number in range(1, subjects + 1)], overwrite)
        notes: dict[str, dict[str, Any]] = {}
        for number in range(1, subjects + 1):
            name = case_name(layout, number)
            if progress is not None:
                progress(number - 1, subjects, name)
            done = _parameters(folder, name)
            if done.get("asked") != asked:
                subject = draw_subject(number, seed, heads=heads, spacing_mm=spacing_mm, difficulty=hard)
                _write_subject(folder, name, subject, layout, strip)
                done = {"asked": asked, **subject.parameters}
                write_json(folder / "truth" / name / PARAMETERS, done)
            site, head = done["site"]["name"], done["head"]
            notes[name] = {"site": site, "head": head, "subject": name, "lesion": done["lesion"]}
        regions = {name: list(values) for name, values in REGIONS.items()}
        write_json(folder / "cohort.json", {"cases": notes, "regions": regions})
        if progress is not None:
            progress(subjects, subjects, "")
    return folder


def _parameters(folder: Path, name: str) -> Mapping[str, Any]:
    """Read what a finished subject was made with; nothing where it was not finished."""
    path = folder / "truth" / name / PARAMETERS
    found: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return found


def case_name(layout: str, number: int) -> str:
    """Return the id of subject `number`, as the layout has it."""
    return {"brats": f"PHANTOM_{number:04d}", "bids": f"sub-{number:04d}", "synthrad": f"1BA{number:03d}"}[layout]


def _write_subject(folder: Path, name: str, subject: Subject, layout: str, strip: bool) -> None:
    geometry = Geometry(subject.labels.shape, subject.affine)
    images = {
        contrast: image * subject.stripped if strip and contrast != "ct" else image
        for contrast, image in subject.images.items()
    }
    mask = subject.stripped if strip else subject.body if layout == "synthrad" else subject.brain
    if layout == "bids":
        place = folder / name / "anat"
        suffixes = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw", "ct": "ct"}
        files = {place / f"{name}_{suffixes[contrast]}": image for contrast, image in images.items()}
        derived = folder / "derivatives" / "phantom" / name / "anat"
        masks = {derived / f"{name}_desc-brain_mask": mask, derived / f"{name}_label-lesion_mask": subject.labels}
    elif layout == "synthrad":
        place = folder / "Task1" / "brain" / name
        files = {place / "mr": images["t2"], place / "ct": images["ct"]}
        masks = {place / "mask": mask, place / "seg": subject.labels}
    else:
        place = folder / name
        files = {place / f"{name}_{contrast}": image for contrast, image in images.items()}
        masks = {place / f"{name}_mask": mask, place / f"{name}_seg": subject.labels}
    for path, image in files.items():
        write_volume(path.with_name(path.name + ".nii.gz"), image.astype(np.int16), geometry)
    for path, array in masks.items():
        write_volume(path.with_name(path.name + ".nii.gz"), array.astype(np.uint8), geometry, labels=True)
    truth: dict[str, NDArray[Any]] = {
        "affine": subject.affine,
        "brain": subject.brain,
        "moved_mm": subject.moved_mm.astype(np.float16),
    }
    truth["fractions"] = np.rint(subject.fractions * 255).astype(np.uint8)
    for contrast in ("t2", "flair"):
        truth[f"{contrast}_clean"] = subject.clean[contrast].astype(np.float16)
        truth[f"{contrast}_expected"] = subject.expected[contrast].astype(np.float16)
    with whole_file(folder / "truth" / name / "truth.npz") as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **truth)
