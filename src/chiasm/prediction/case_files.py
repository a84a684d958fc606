"""The files that a case's prediction writes, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chiasm import __version__
from chiasm.cohorts.cases import Case
from chiasm.cohorts.dicom_patients import WARNINGS, marks_on, modality_at
from chiasm.prediction.dicom_case import EXPECTED_ERROR, SERIES, SPREAD, write_dicom_case
from chiasm.prediction.ensemble import name_of
from chiasm.prediction.manifest import SUFFIXES, Container
from chiasm.prediction.model import Model
from chiasm.prediction.synthesis import CompactSynthesis, Synthesis
from chiasm.preparation.plan import Plan
from chiasm.volumes import Volume, write_volume
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.screening import SYNTHETIC, written_suffix

#: In the header of every image that is written.
_REMARK = f'{SYNTHETIC}, "software": "chiasm {__version__}"}}'


class WrittenFiles(NamedTuple):
    """Names of the files of a case, and warnings on them, in the order of an `Entry`."""

    image: str
    mask: str | None
    expected_error: str | None
    warnings: tuple[str, ...]
    spread: str | None = None


def write_dicom(made: Synthesis, case: Case, out: Path, models: Sequence[Model]) -> WrittenFiles:
    """Write a case as the folder `<case>` of DICOM.

    Raises:
        ChiasmError: As `write_dicom_case`.
    """
    series = [pick_series(case.images[name]) for name in models[0].plan.sources]
    written = write_dicom_case(out / case.id, made, series, models[0], name_of(models))
    maps = {path.stem: f"{case.id}/{path.name}" for path in written.maps}
    return WrittenFiles(f"{case.id}/{SERIES}", None, maps.get(EXPECTED_ERROR), written.warnings, maps.get(SPREAD))


def write_volumes(
    made: Synthesis | CompactSynthesis, case: Case, out: Path, plan: Plan, container: Container
) -> WrittenFiles:
    """Write a case as one file an image.

    Raises:
        ChiasmError: If a file cannot be written.
    """

    def write(name: str, volume: Volume, labels: bool = False) -> str:
        file = _called(case, name, plan, container)
        write_volume(out / file, volume.array, volume.geometry, labels, remark="" if labels else _REMARK)
        return file

    def write_if_made(name: str, volume: Volume | None) -> str | None:
        return None if volume is None else write(name, volume)

    image = write(plan.target, made.image)
    mask = write("mask", made.mask, labels=True)
    expected_error = write_if_made(EXPECTED_ERROR, made.expected_error)
    return WrittenFiles(image, mask, expected_error, made.warnings, write_if_made(SPREAD, made.spread))


def _called(case: Case, name: str, plan: Plan, container: Container) -> str:
    """Return the name of an output: that of the case, with the suffix of the chosen format or of the first source."""
    return f"{case.id}_{name}{SUFFIXES.get(container) or written_suffix(case.images[plan.sources[0]])}"


def places_of(cases: Sequence[Case], plan: Plan, container: Container) -> dict[str, tuple[Case, tuple[str, ...]]]:
    """Return each case by its id, with the names of its outputs."""
    return {case.id: (case, _outputs(case, plan, container)) for case in cases}


def _outputs(case: Case, plan: Plan, container: Container) -> tuple[str, ...]:
    """List what a case's prediction may write in the folder."""
    if container == "dicom":
        return (f"{case.id}/{SERIES}",)
    return tuple(_called(case, name, plan, container) for name in (plan.target, "mask", EXPECTED_ERROR, SPREAD))


def warn_of_marks(case: Case, sources: Sequence[str]) -> list[str]:
    """Warn of marks on sources, each mark once, and of series of another modality, which a rule has chosen."""
    marks = dict.fromkeys(chain.from_iterable(marks_on(case, name) for name in sources))
    others = ((name, modality_at(case.images[name], name)) for name in sources)
    strange = [
        f"its header says that the image is {other}, and the model takes {name}" for name, other in others if other
    ]
    return [*(WARNINGS[mark] for mark in marks), *strange]
