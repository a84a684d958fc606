"""A completed cohort: copies of the originals, synthetic images for the missing ones, and marks on these.

A synthetic image is marked three times, so that one mistake cannot turn it into a scan: its file's name ends in
`_synthetic`, a JSON sidecar beside it names the model and its sources, and the manifest names it in its column
`synthetic`.

Originals are copied for two reasons.  A manifest may not name a file outside its folder, so a symbolic link is not
possible.  A viewer that saves in place would change the original through a hard link.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import MAPS, Case, Regions, volume_stem, with_files
from chiasm.cohorts.folder_notes import SIDECAR
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.labels import read_label_map
from chiasm.cohorts.manifests import MANIFESTS
from chiasm.errors import RunError
from chiasm.storage import copy_file, read_json, write_json, write_text
from chiasm.volumes import Volume, write_volume
from chiasm.volumes.dicom_scan import is_dicom
from chiasm.volumes.screening import STRICT, says_synthetic, volume_files

MARK = "_synthetic"
SAID = {"SyntheticData": "YES"}  # as DICOM says it, and BIDS would


@dataclass(frozen=True)
class Origin:
    """The sources and the model of a synthetic image.

    Attributes:
        case: Id.
        modality: The modality that the image replaces.
        sources: Modality to the sha256 of the source's file.
        method: Its key.
        model: The sha256 of the weights.
        software: Name and version.
    """

    case: str
    modality: str
    sources: Mapping[str, str]
    method: str
    model: str
    software: str


def sidecar_of(path: Path) -> Path:
    """Return the JSON file that describes a volume."""
    return path.with_name(f"{volume_stem(path.name)}.json")


def is_synthetic(path: Path) -> bool:
    """Return whether a volume's name, its sidecar or its header says that it is synthetic."""
    stem = volume_stem(path.name)
    if stem is None or stem.lower().endswith(MARK):
        return stem is not None
    return _sidecar(path).items() >= SAID.items() or says_synthetic(path)


def mark_synthetic(path: Path, origin: Origin, *, expected_error: Path | None, warnings: Sequence[str]) -> None:
    """Write the sidecar of a synthetic image, after all its other files.

    Args:
        path: The image; its name ends in `_synthetic`.
        origin: Its sources and its model.
        expected_error: Map of the expected absolute error in the same folder, or None.
        warnings: What a reader of the image must know.

    Raises:
        ChiasmError: If it cannot be written.
        ValueError: If the image's name does not end in `_synthetic`.
    """
    stem = volume_stem(path.name)
    if stem is None or not stem.endswith(MARK):
        raise ValueError(f"{path.name} is no volume whose name ends in {MARK}")
    beside = {"expected_error": None if expected_error is None else expected_error.name, "warnings": list(warnings)}
    write_json(sidecar_of(path), {**SAID, **asdict(origin), **beside})


def was_made(path: Path, origin: Origin) -> bool:
    """Return whether the image of the same sources and the same model is there already."""
    return path.is_file() and _sidecar(path).items() >= asdict(origin).items()


def _sidecar(path: Path) -> Mapping[str, object]:
    """Return the content of a volume's sidecar; empty if there is none, or if another program wrote it."""
    beside = sidecar_of(path)
    try:
        content = read_json(beside) if beside.is_file() else {}
    except RunError:
        return {}
    return content if isinstance(content, Mapping) else {}


def copy_case(case: Case, root: Path) -> Case:
    """Copy a case's files to `root/<case>/<case>_<modality>`, unless they are there.

    A volume in one file keeps its bytes.  A volume in several files (a DICOM series, a MetaImage header with its
    voxels) becomes NIfTI.  Soft labels become NIfTI too, with the voxels that count.

    Returns:
        The case with the copies' paths.

    Raises:
        VolumeError: If a file cannot be read.
        ChiasmError: If one cannot be written.
    """
    copies = {role: _copied(case, path, role, root / case.id) for role, path in case.files.items()}
    return replace(with_files(case, copies), label_threshold=None)


def _copied(case: Case, path: Path, role: str, folder: Path) -> Path:
    """Copy one file of a case and return where."""
    if _is_soft(case, role) or is_dicom(path) or len(volume_files(path)) > 1:
        return _converted(case, path, role, folder / f"{case.id}_{role}.nii.gz")
    return _same_file(path, folder / f"{case.id}_{role}{path.name[len(volume_stem(path.name) or '') :]}")


def _same_file(path: Path, copy: Path) -> Path:
    """Copy a file as it is, unless it is there already, and return where."""
    if not copy.is_file() or sha256_of(copy) != sha256_of(path):
        copy_file(path, copy)
    return copy


def _converted(case: Case, path: Path, role: str, copy: Path) -> Path:
    """Write one file of a case as NIfTI and return where."""
    volume = _volume_of(case, path, role)
    write_volume(copy, volume.array, volume.geometry, labels=role in MAPS)
    return copy


def _is_soft(case: Case, role: str) -> bool:
    """Return whether a file of a case holds soft labels, which count from a threshold on."""
    return role == "labels" and case.label_threshold is not None


def _volume_of(case: Case, path: Path, role: str) -> Volume:
    """Read one file of a case as it is used; soft labels as the voxels that count."""
    if _is_soft(case, role):
        return read_label_map(case, {})
    return read_case_labels(case, path) if role in MAPS else read_case_image(case, role)


def write_completed(root: Path, cases: Sequence[Case], regions: Regions) -> None:
    """Write the manifest of a completed cohort, and `cohort.json` with the labels of each region.

    A case with a synthetic image is for training, unless it has a role already.  So folds test and validate only on
    scans.

    Args:
        root: The cohort's folder, above all its files.
        cases: With their files in it.
        regions: Region name to label values.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    if notes := _notes(cases, regions):
        write_json(root / SIDECAR, notes)
    write_text(root / MANIFESTS[0], _manifest(root, cases))


def _notes(cases: Sequence[Case], regions: Regions) -> dict[str, object]:
    """Return the content of `cohort.json` for a completed cohort; it may be empty."""
    notes: dict[str, object] = {}
    if regions:
        notes["regions"] = {name: list(values) for name, values in regions.items()}
    if cases and cases[0].reading != STRICT:  # the copies keep their headers
        notes["reading"] = asdict(cases[0].reading)
    return notes


def _manifest(root: Path, cases: Sequence[Case]) -> str:
    """Return the table that lists the files of all cases."""
    roles = [*sorted({name for case in cases for name in case.images}), *MAPS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "subject", "site", "split", *roles, "synthetic"])
    writer.writerows(_manifest_row(case, roles, root) for case in cases)
    return text.getvalue()


def _manifest_row(case: Case, roles: Sequence[str], root: Path) -> list[str]:
    """Return the manifest's row of a case: its files by role, relative to the cohort's folder."""
    files = {role: path.relative_to(root).as_posix() for role, path in case.files.items()}
    split = case.split or ("train" if case.synthetic else "")
    cells = [files.get(role, "") for role in roles]
    return [case.id, case.subject, case.site or "", split, *cells, " ".join(case.synthetic)]
