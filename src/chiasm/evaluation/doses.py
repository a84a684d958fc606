"""Gamma pass rate of two dose distributions that a user planned on the synthetic and on the real CT.

chiasm computes no dose: both come from the user's planning system.  PyMedPhys (extra `dose`) computes gamma.

Reference: D. A. Low et al., "A technique for the quantitative evaluation of dose distributions", Medical Physics
25(5):656-661, 1998.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chiasm.cohorts.cases import Problem
from chiasm.errors import RecipeError, VolumeError
from chiasm.evaluation.given_volumes import FolderPair, score_given
from chiasm.evaluation.loading import PredictionFolder
from chiasm.evaluation.rows import Row
from chiasm.prediction.manifest import Entry
from chiasm.volumes import Volume, check_pair, read_volume
from chiasm.volumes.dicom_files import DicomFile, read_dataset, text, visit

REGION = "dose"
LEAST_PERCENT = 10.0  # of the largest real dose; voxels below it do not count
MEANING = ("DoseUnits", "DoseType", "DoseSummationType")  # what a DICOM file says of its values
STEPS = 10  # that the distance criterion is divided into, while the nearest equal dose is searched


@dataclass(frozen=True)
class GammaCriteria:
    """What counts as equal.

    Attributes:
        percent: Difference of dose, of the largest real dose (global gamma).
        distance_mm: Distance to an equal dose.

    Raises:
        RecipeError: If one is not a positive number, or larger than 20.
    """

    percent: float = 2.0
    distance_mm: float = 2.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and 0 < value <= 20 for value in (self.percent, self.distance_mm)):
            raise RecipeError(
                "the criteria of gamma are out of range",
                reason="gamma",
                found=self.in_words,
                expected="above 0, at most 20 % and 20 mm",
                hint="Write them as percent,mm: chiasm evaluate --gamma 2,2.",
            )

    @property
    def in_words(self) -> str:
        """Both criteria, as people write them."""
        return f"{self.percent:g} %/{self.distance_mm:g} mm"


def read_criteria(text: str) -> GammaCriteria:
    """Read criteria such as "2,2" or "3,3".

    Raises:
        RecipeError: If it is no such text, or out of range.

    >>> read_criteria("3,2").in_words
    '3 %/2 mm'
    """
    try:
        percent, distance_mm = (float(part) for part in str(text).split(","))
    except ValueError:
        percent = distance_mm = math.nan
    return GammaCriteria(percent, distance_mm)


def check_installed() -> None:
    """Refuse to begin without PyMedPhys.

    Raises:
        RecipeError: If it is not installed.
    """
    if importlib.util.find_spec("pymedphys") is None:
        raise RecipeError(
            "gamma needs PyMedPhys, which is not installed",
            reason="not-installed",
            hint="pip install 'chiasm[dose]', in Python 3.12 or older",
        )


def score_doses(
    given: FolderPair, work: Sequence[tuple[PredictionFolder, Entry]], criteria: GammaCriteria
) -> tuple[list[Row], list[Problem]]:
    """Score the two dose distributions of each predicted case.

    Args:
        given: Folders of doses, in any one unit; of DICOM, units and types are compared.
        work: Predicted cases, each with the folder that it lies in.
        criteria: Of gamma.

    Returns:
        Rows "gamma_pass" and "dose_difference" (%) of the region `REGION`; and problems.
    """
    return score_given(
        given,
        work,
        lambda *files: compare_doses(*read_doses(*files), criteria),
        kind="dose",
        convention=f"gamma (global {criteria.in_words}; from {LEAST_PERCENT:g} % of the largest real dose on)",
    )


def read_doses(synthetic: Path, real: Path) -> tuple[Volume, Volume]:
    """Read two doses, which must mean the same where DICOM says what they mean.

    Args:
        synthetic: File of the dose on the synthetic CT.
        real: File of the dose on the real CT.

    Raises:
        VolumeError: If one cannot be read, or both say that their units, types or sums are different.
    """
    volumes = read_volume(synthetic), read_volume(real)
    for name, found, expected in zip(MEANING, _meaning_of(synthetic), _meaning_of(real), strict=True):
        if found and expected and found != expected:
            raise VolumeError(
                f"is a dose of another {name} than the real one",
                path=synthetic,
                reason="dose-meaning",
                found=found,
                expected=expected,
                hint="Export both doses in the same way.",
            )
    return volumes


def _meaning_of(path: Path) -> tuple[str, ...]:
    """Return the values of `MEANING` in a file, "" for each that it does not state, as in other formats than DICOM."""
    if path.suffix.lower() != ".dcm":
        return ("",) * len(MEANING)
    (header,) = visit([DicomFile(path)], lambda part, file: read_dataset(part, file, tags=MEANING))
    return tuple(text(header, name).upper() for name in MEANING)  # some write "Gy"


def compare_doses(synthetic: Volume, real: Volume, criteria: GammaCriteria) -> dict[str, dict[str, float]]:
    """Compare two doses.

    Args:
        synthetic: Planned or computed on the synthetic CT.
        real: The same plan on the real CT, on the same grid and in the same unit.
        criteria: Of gamma.

    Returns:
        Of `REGION`: "gamma_pass", percent of the voxels with gamma of at most 1, and "dose_difference", mean absolute
        difference in percent of the largest real dose.  Voxels of less than `LEAST_PERCENT` do not count.

    Raises:
        VolumeError: If grids differ, or the real dose is nowhere above 0.
    """
    import pymedphys

    made = check_pair(real, synthetic, a_name="real dose", b_name="synthetic dose", may_be_mirrored=True)
    truth, dose = (np.asarray(volume.array, np.float64) for volume in (real, made))
    largest = float(truth.max())
    if not largest > 0:
        raise VolumeError("the real dose is nowhere above 0", reason="no-dose", found=largest)
    axes = tuple(np.arange(n) * step for n, step in zip(truth.shape, real.geometry.spacing_mm, strict=True))
    gamma = pymedphys.gamma(
        axes,
        truth,
        axes,
        dose,
        criteria.percent,
        criteria.distance_mm,
        lower_percent_dose_cutoff=LEAST_PERCENT,
        interp_fraction=STEPS,
        max_gamma=1.1,  # by how much a voxel fails is not asked
        skip_once_passed=True,
        interp_algo="scipy",
    )
    counted = truth >= LEAST_PERCENT / 100 * largest
    difference = 100 * float(np.abs(dose - truth)[counted].mean()) / largest
    return {REGION: {"gamma_pass": 100 * float((gamma[counted] <= 1).mean()), "dose_difference": difference}}
