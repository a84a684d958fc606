"""Simulated patients with a known truth, as a cohort on disk.

Subject n of a seed is the same patient for any number of subjects; every file is the same to the byte.
docs/phantom.md says what is simulated and what is not, and compares its numbers with those of real cohorts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import RecipeError, unknown
from chiasm.locks import locked
from chiasm.progress import Progress
from chiasm.simulation.anatomy import find_heads
from chiasm.simulation.cohort_folder import PARAMETERS, make_room
from chiasm.simulation.lesions import REGIONS
from chiasm.simulation.patient import CONTRASTS, DIFFICULTIES, Difficulty, Movement, Subject, draw_subject
from chiasm.storage import read_json, whole_file, write_json
from chiasm.volumes import Geometry, write_volume

MOST_MISREGISTERED_MM = 20.0


class LayoutFiles(NamedTuple):
    """The places of a subject's files in a layout; braces stand for its id.

    Attributes:
        case: The id; braces stand for the subject's number.
        images: By contrast.
        mask: Of the valid voxels.
        labels: Of the lesion.
        is_head: Whether the mask is the head where it is not skull-stripped, not the brain.
    """

    case: str
    images: Mapping[str, str]
    mask: str
    labels: str
    is_head: bool = False


_BIDS = {"t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw", "ct": "ct"}
_DERIVED = "derivatives/phantom/{0}/anat/{0}"

LAYOUTS: Mapping[str, LayoutFiles] = {
    "brats": LayoutFiles(
        "PHANTOM_{:04d}",
        {contrast: f"{{0}}/{{0}}_{contrast}.nii.gz" for contrast in (*CONTRASTS, "ct")},
        "{0}/{0}_mask.nii.gz",
        "{0}/{0}_seg.nii.gz",
    ),
    "bids": LayoutFiles(
        "sub-{:04d}",
        {contrast: f"{{0}}/anat/{{0}}_{suffix}.nii.gz" for contrast, suffix in _BIDS.items()},
        f"{_DERIVED}_desc-brain_mask.nii.gz",
        f"{_DERIVED}_label-lesion_mask.nii.gz",
    ),
    "synthrad": LayoutFiles(
        "1BA{:03d}",
        {"t2": "Task1/brain/{}/mr.nii.gz", "ct": "Task1/brain/{}/ct.nii.gz"},
        "Task1/brain/{}/mask.nii.gz",
        "Task1/brain/{}/seg.nii.gz",
        is_head=True,
    ),
}


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
    _check_names(difficulty, layout, movement)
    hard = _choose_difficulty(difficulty, misregistration_mm, cast(Movement, movement))
    _check_numbers(spacing_mm, subjects)
    heads = None if anatomy is None else find_heads(anatomy, spacing_mm)
    strip = layout == "brats" if skull_strip is None else skull_strip
    settings = CohortSettings(seed, heads, spacing_mm, difficulty, hard, layout, strip)
    names = [case_name(layout, number) for number in range(1, subjects + 1)]
    report = progress or _silent
    with locked(folder):
        make_room(folder, settings.asked, names, overwrite)
        notes = {}
        for number, name in enumerate(names, 1):
            report(number - 1, subjects, name)
            notes[name] = _simulate(folder, name, number, settings)
        regions = {name: list(values) for name, values in REGIONS.items()}
        write_json(folder / "cohort.json", {"cases": notes, "regions": regions})
        if layout == "bids":
            description = {"Name": "Simulated patients", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
            write_json(folder / "dataset_description.json", description)
        report(subjects, subjects, "")
    return folder


def _silent(done: int, subjects: int, name: str) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class CohortSettings:
    """The settings of a simulated cohort.

    Attributes:
        seed: Of everything.
        heads: From `find_heads`; None embeds the template.
        spacing_mm: Voxel size.
        named: The difficulty's name.
        difficulty: With its misregistration as asked for.
        layout: A name of `LAYOUTS`.
        skull_strip: Whether MR is 0 outside the brain.
    """

    seed: int
    heads: Mapping[str, Path] | None
    spacing_mm: float
    named: str
    difficulty: Difficulty
    layout: str
    skull_strip: bool

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that are stored beside each subject; a subject with other settings is made again."""
        asked = {
            "layout": self.layout,
            "skull_strip": self.skull_strip,
            "difficulty": self.named,
            "seed": self.seed,
            "spacing_mm": self.spacing_mm,
            "heads": None if self.heads is None else list(self.heads),
        }
        if self.difficulty == DIFFICULTIES[self.named]:  # the options came later: cohorts of before are still found
            return asked
        moved = {"misregistration_mm": self.difficulty.misregistration_mm, "movement": self.difficulty.movement}
        return asked | moved


def _choose_difficulty(name: str, misregistration_mm: float | None, movement: Movement) -> Difficulty:
    """Take a difficulty with the movement, and with the misregistration where one is given.

    Raises:
        RecipeError: If the misregistration is out of range.
    """
    hard = DIFFICULTIES[name]
    level_mm = hard.misregistration_mm if misregistration_mm is None else misregistration_mm
    if not 0 <= level_mm <= MOST_MISREGISTERED_MM:
        raise RecipeError(
            "the misregistration is out of range",
            reason="misregistration",
            found=level_mm,
            expected=f"0 to {MOST_MISREGISTERED_MM:g} mm",
        )
    return replace(hard, misregistration_mm=level_mm, movement=movement)


def _check_names(difficulty: str, layout: str, movement: str) -> None:
    """Refuse names that are unknown.

    Raises:
        RecipeError: If one is; lists the known ones.
    """
    choices = (("difficulty", difficulty, DIFFICULTIES), ("layout", layout, LAYOUTS))
    for what, name, known in (*choices, ("movement", movement, get_args(Movement))):
        if name not in known:
            raise unknown(what, name, known)


def _check_numbers(spacing_mm: float, subjects: int) -> None:
    """Refuse numbers out of range.

    Raises:
        RecipeError: If one is.
    """
    if not 1 <= spacing_mm <= 4:
        raise RecipeError("the voxel size is out of range", reason="spacing", found=spacing_mm, expected="1 to 4 mm")
    if subjects < 1:
        raise RecipeError("there must be a subject", reason="subjects", found=subjects, expected="1 or more")


def _simulate(folder: Path, name: str, number: int, settings: CohortSettings) -> dict[str, Any]:
    """Simulate one subject unless it is finished; returns what `cohort.json` says of it."""
    done = _parameters(folder, name)
    if done.get("asked") != settings.asked:
        subject = draw_subject(
            number,
            settings.seed,
            heads=settings.heads,
            spacing_mm=settings.spacing_mm,
            difficulty=settings.difficulty,
        )
        _write_subject(folder, name, subject, settings.layout, settings.skull_strip)
        _write_truth(folder / "truth" / name, subject)
        done = {"asked": settings.asked, **subject.parameters}
        write_json(folder / "truth" / name / PARAMETERS, done)
    return {"site": done["site"]["name"], "head": done["head"], "subject": name, "lesion": done["lesion"]}


def _parameters(folder: Path, name: str) -> Mapping[str, Any]:
    """Read the parameters of a finished subject; empty if it is not finished."""
    path = folder / "truth" / name / PARAMETERS
    found: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    return found


def case_name(layout: str, number: int) -> str:
    """Return the id of subject `number`, as the layout has it."""
    return LAYOUTS[layout].case.format(number)


def _write_subject(folder: Path, name: str, subject: Subject, layout: str, strip: bool) -> None:
    """Write a subject's images, mask and labels where the layout has them."""
    geometry = Geometry(subject.labels.shape, subject.affine)
    files = LAYOUTS[layout]
    for contrast, place in files.images.items():
        image = subject.images[contrast]
        if strip and contrast != "ct":
            image = image * subject.stripped
        write_volume(folder / place.format(name), image.astype(np.int16), geometry)
    whole = subject.body if files.is_head else subject.brain
    masks = {files.mask: subject.stripped if strip else whole, files.labels: subject.labels}
    for place, array in masks.items():
        write_volume(folder / place.format(name), array.astype(np.uint8), geometry, labels=True)


def _write_truth(folder: Path, subject: Subject) -> None:
    """Write the truth on a subject."""
    truth: dict[str, NDArray[Any]] = {
        "affine": subject.affine,
        "brain": subject.brain,
        "moved_mm": subject.moved_mm.astype(np.float16),
    }
    truth["fractions"] = np.rint(subject.fractions * 255).astype(np.uint8)
    for contrast in ("t2", "flair"):
        truth[f"{contrast}_clean"] = subject.clean[contrast].astype(np.float16)
        truth[f"{contrast}_expected"] = subject.expected[contrast].astype(np.float16)
    with whole_file(folder / "truth.npz") as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **truth)
