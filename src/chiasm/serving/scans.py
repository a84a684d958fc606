"""Scans that a user handed in: they are read as by `chiasm predict`, synthesised, written and shown.

Files get names of our own in the job's folder.  This folder is removed from messages: a user knows only the field of
the form.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from chiasm.cohorts.cases import Case
from chiasm.cohorts.dicom_modalities import header_modality, other_modality
from chiasm.cohorts.dicom_patients import Selection, parse_rules
from chiasm.cohorts.folder_notes import MARKS
from chiasm.cohorts.images import read_image
from chiasm.errors import ChiasmError, CohortError, VolumeError
from chiasm.prediction.case_files import warn_of_marks, write_dicom, write_volumes
from chiasm.prediction.dicom_case import EXPECTED_ERROR
from chiasm.prediction.folders import Predictor
from chiasm.prediction.inputs import find_inputs
from chiasm.prediction.model import Model
from chiasm.prediction.synthesis import Synthesis
from chiasm.prediction.watching import watched
from chiasm.reports.case_page import CasePage, render_case_page
from chiasm.serving.jobs import Outcome
from chiasm.storage import whole_file
from chiasm.volumes import Volume, read_volume, resample, same_grid
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_scan import is_dicom, scan_series
from chiasm.volumes.screening import VOLUME_SUFFIXES

ALL = "dicom"  # the field of one archive that holds every source
ARCHIVE = ".zip"
#: Formats of one file each; the others are a header and a file beside it.
SUFFIXES = (*(suffix for suffix in VOLUME_SUFFIXES if suffix not in (".mhd", ".nhdr")), ".dcm", ARCHIVE)
FOR_ARCHIVES = "An archive must hold the DICOM files of the scan; files of other formats need no archive."
CASE, SOURCES, DICOM_ARCHIVE = "scan", "sources", "dicom.zip"
MASK = "mask"
READ, WRITTEN = 0.05, 0.98  # shares of the work after which it is read, and predicted

Report = Callable[[str, float], None]


@dataclass
class Synthesiser:
    """A loaded model that predicts one scan at a time.

    Attributes:
        predictor: Reads files as the options of the command say.
        turn: A lock that is held during a prediction: page and DICOM node take turns.
    """

    predictor: Predictor
    turn: Lock

    @property
    def model(self) -> Model:
        """Its model."""
        return self.predictor.model


class Handed(NamedTuple):
    """A scan that was handed in.

    Attributes:
        files: The model's sources, or `ALL`, to files of ours.
        series: Rules that choose series of an archive, as those of `chiasm predict --series`.
    """

    files: Mapping[str, Path]
    series: tuple[str, ...] = ()


class ReadScan(NamedTuple):
    """A case, its images in the order of the model's sources, and warnings on them."""

    case: Case
    volumes: list[Volume]
    warnings: list[str]


def own_name(field: str, name: str) -> str:
    """Return our name of a file that was handed in: its field, and the ending of its name.

    Args:
        field: A source of the model, or `ALL`.
        name: The user's name of the file; only a known ending of it is kept.

    Raises:
        VolumeError: If the name ends as no format that is read from one file.

    >>> own_name("t1", "../../Miller^Anna.NII.GZ"), own_name("t1", "IM0001")
    ('t1.nii.gz', 't1')
    """
    last = re.split(r"[/\\\\]", name)[-1].lower()
    suffix = next((suffix for suffix in SUFFIXES if last.endswith(suffix)), "")
    if not suffix and "." in last:
        raise VolumeError(
            "is of no format that is read from one file",
            path=field,
            reason="format",
            expected=", ".join(SUFFIXES),
            hint="Put a DICOM series into a zip archive; convert a header with a file beside it to NIfTI.",
        )
    return field + suffix


def check_handed(files: Mapping[str, object], sources: Sequence[str]) -> None:
    """Refuse wrong files: there must be one archive of all sources, or one file for each source.

    Raises:
        CohortError: If it is neither.
    """
    if set(files) not in ({ALL}, set(sources)):
        raise CohortError(
            "the files are not those that the model needs",
            reason="sources",
            found=", ".join(files) or "none",
            expected=f"one file in each field: {', '.join(sources)}; or one archive in the field {ALL}",
        )


def synthesise_scan(folder: Path, report: Report, *, handed: Handed, using: Synthesiser) -> Outcome:
    """Read a scan, synthesise it and write the results beside it.

    Args:
        folder: Of the job.
        report: Called as the work goes on; may end it by raising.
        handed: What was handed in.
        using: The model.

    Raises:
        ChiasmError: If the scan cannot be read, fits the model badly, or the results cannot be written.
    """
    with without_folder(folder):
        report("reading", 0.0)
        scan = read_scan(handed, using.predictor)
        report("waiting for the DICOM node" if using.turn.locked() else "predicting", READ)
        with using.turn, watched(_follow(report, using.predictor)):
            made = using.predictor.predict(*scan.volumes)
        made = replace(made, warnings=(*scan.warnings, *made.warnings))
        report("writing", WRITTEN)
        return _write(folder, made, scan, using.predictor.models)


def read_scan(handed: Handed, predictor: Predictor) -> ReadScan:
    """Read the images of a scan.

    Raises:
        ChiasmError: If one is missing, or cannot be read.
    """
    sources, rules = predictor.model.plan.sources, parse_rules(handed.series, predictor.model.plan.sources)
    selection = Selection(series=rules, allow=MARKS, reading=predictor.reading)
    if ALL in handed.files:
        found = _find(handed.files[ALL], sources, selection)
    else:
        parts = [_find(handed.files[name], (name,), selection) for name in sources]
        images = {name: part.images[name] for name, part in zip(sources, parts, strict=True)}
        found = Case(CASE, CASE, images)
    case = replace(found, id=CASE)
    volumes = [read_image(case.images[name], name, predictor.reading) for name in sources]
    return ReadScan(case, volumes, warn_of_marks(case, sources))


def _find(path: Path, sources: Sequence[str], selection: Selection) -> Case:
    """Find the sources among the series of an archive; another kind of file is a source itself.

    Raises:
        CohortError: If there is none, or there are several patients.
    """
    if not is_dicom(path):
        if len(sources) > 1:
            raise CohortError("is no archive of DICOM files", path=path, reason="no-dicom")
        return Case(CASE, CASE, {sources[0]: path})
    rules = {name: words for name, words in selection.series.items() if name in sources}
    alone = sources[0] if len(sources) == 1 else None
    chosen = replace(selection, series=rules, alone=alone)
    try:
        found = find_inputs([path], sources, selection=chosen)
    except CohortError as error:
        raise _unclear(path, sources, error) from error
    if len(found.cases) == 1:
        _check_modalities(found.cases[0])
        return found.cases[0]
    if found.problems:
        problem = found.problems[0]
        raise CohortError(problem.message, path=path, reason=problem.reason)
    raise CohortError(
        "does not hold one patient",
        path=path,
        reason="no-cases",
        found=f"{len(found.cases)} cases",
        expected="one",
        hint="Send the archive of one patient.",
    )


def _unclear(path: Path, sources: Sequence[str], error: CohortError) -> CohortError:
    """Describe an archive in which the sources were not found, and how to choose, without descriptions of series."""
    series = [one for one in scan_series(path).series if one.images]
    if not series:
        return CohortError("holds no DICOM series", path=path, reason=error.reason, hint=FOR_ARCHIVES)
    if len(series) == 1 and other_modality(series[0], sources[0]):
        return _other_modality(path, sources[0], series[0].modality)
    return CohortError(
        f"does not show which series is the {' and which is the '.join(sources)}",
        path=path,
        reason="several-series",
        found="; ".join(one.described() for one in series),
        hint=f"Name it in the field series, such as {sources[0]}=2: by its number, or by words of its description.",
    )


def _check_modalities(case: Case) -> None:
    """Refuse a CT or PET for a model of MR, and an MR or PET for a model of CT.

    Raises:
        CohortError: If a series is of the other modality.
    """
    for name, place in case.images.items():
        if found := other_modality(pick_series(place), name):
            raise _other_modality(place, name, found)


def _other_modality(place: Path, source: str, found: str) -> CohortError:
    """Say that a series is of another modality than a source."""
    return CohortError(
        f"is no {source}",
        path=place,
        reason="modality",
        found=f"modality {found}",
        expected=f"modality {header_modality(source)}",
    )


def _follow(report: Report, predictor: Predictor) -> Callable[[int, int], None]:
    """Convert the passes of networks over a volume, stage by stage, into a share of the work."""
    is_mean = predictor.average == "flip"  # then the map is made by a pass of its own
    passes = [(1 + len(one.earlier)) * (1 + is_mean) for one in predictor.models]
    runs = sum(passes) + is_mean * sum(one.local_discriminator is not None for one in predictor.models)
    before = 0

    def follow(done: int, total: int) -> None:
        nonlocal before
        report("predicting", READ + (WRITTEN - READ) * min(1.0, (before + done / total) / runs))
        before += done == total

    return follow


# --- results -----------------------------------------------------------------------------------------------------


def _write(folder: Path, made: Synthesis, scan: ReadScan, models: Sequence[Model]) -> Outcome:
    """Write a synthesis as NIfTI and, where all sources are DICOM, as DICOM in an archive."""
    plan = models[0].plan
    written = write_volumes(made, scan.case, folder, plan, "nifti")
    titles = {
        written.image: f"Synthetic {plan.target}",
        written.expected_error: "Expected error",
        written.spread: "Spread over models",
        written.mask: "Mask",
    }
    files = {name: f"{title} (NIfTI)" for name, title in titles.items() if name is not None}
    if all(is_dicom(_outside(place)) for place in scan.case.images.values()):
        written = write_dicom(made, scan.case, folder, models)
        _zip(folder / CASE, folder / DICOM_ARCHIVE)
        files[DICOM_ARCHIVE] = "All as DICOM (zip)"
    return Outcome(files, written.warnings)


def _outside(place: Path) -> Path:
    """Return the file on the disk that contains a place."""
    return next(path for path in (place, *place.parents) if path.exists())


def _zip(folder: Path, archive: Path) -> None:
    """Move a folder into an archive."""
    with whole_file(archive) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            zipped.write(file, file.relative_to(folder).as_posix())
    shutil.rmtree(folder)


def show_scan(source: str, warnings: Sequence[str], *, folder: Path, handed: Handed, using: Synthesiser) -> str:
    """Draw a finished job as a page with linked panes, that of a case of a report.

    Args:
        source: Which of the sources is shown.
        warnings: What a reader of the images must know.
        folder: Of the job.
        handed: What was handed in.
        using: The model.

    Raises:
        ChiasmError: If its files are gone.
    """
    plan = using.model.plan
    with without_folder(folder):
        shown = read_scan(handed, using.predictor).volumes[plan.sources.index(source)]
        image, mask, expected_error = (_read_back(folder, name) for name in (plan.target, MASK, EXPECTED_ERROR))
    assert image is not None and mask is not None
    if not same_grid(shown.geometry, image.geometry):  # thick slices, or a second source that was moved
        shown = resample(shown, image.geometry, order=1)
    page = CasePage(
        case="Scan",
        title=f"{' + '.join(plan.sources)} to {plan.target}",
        source=shown.array,
        real=None,
        synthetic=image.array,
        expected_error=None if expected_error is None else expected_error.array,
        mask=mask.array > 0,
        lesion=None,
        affine=image.geometry.affine,
        unit=plan.target_unit,
        window=plan.target_range,
        source_name=source,
        target_name=plan.target,
        warnings=warnings,
    )
    return render_case_page(page)


def _read_back(folder: Path, name: str) -> Volume | None:
    """Read a volume that was written here; None where the model makes no such."""
    path = folder / f"{CASE}_{name}.nii.gz"
    if not path.exists() and name == EXPECTED_ERROR:
        return None
    return read_volume(path, labels=name == MASK, allow_thin=True, allow_constant=True)


@contextmanager
def without_folder(folder: Path) -> Iterator[None]:
    """Take the server's folder out of the message of an error, so that it names only the field of the form.

    Raises:
        ChiasmError: The error of the block, without the folder.
    """
    try:
        yield
    except ChiasmError as error:
        raise _relative(error, folder) from error


def _relative(error: ChiasmError, folder: Path) -> ChiasmError:
    def shorten(text: object) -> str:
        short = str(text)
        for part in (f"{folder / SOURCES}/", f"{folder}/", str(folder)):
            short = short.replace(part, "")
        return short

    return type(error)(
        shorten(error.what),
        path=None if error.path is None else shorten(error.path),
        reason=error.reason,
        found=None if error.found is None else shorten(error.found),
        expected=None if error.expected is None else shorten(error.expected),
        hint=None if error.hint is None else shorten(error.hint),
    )
