"""What was made of studies that came by STOW-RS, as QIDO-RS finds it: attributes of study, series and instances.

Attributes are kept as text in DICOM's JSON model (PS3.18, annex F), which takes a tenth of the memory of its objects.
The images themselves lie in the archive of their job and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chiasm.errors import ChiasmError
from chiasm.serving.jobs import ServedJob
from chiasm.serving.scans import DICOM_ARCHIVE
from chiasm.volumes.dicom_files import DicomFile, list_parts, read_dataset, taming, visit

Attributes = dict[str, dict[str, Any]]

STUDY = (
    "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyDescription", "PatientName",
    "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID",
)  # fmt: skip
SERIES = ("Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber")
INSTANCE = ("SOPClassUID", "SOPInstanceUID", "InstanceNumber", "Rows", "Columns", "BitsAllocated", "NumberOfFrames")
#: What is counted or said of a level beside what its files hold.
MODALITIES, STUDY_SERIES, STUDY_INSTANCES = "00080061", "00201206", "00201208"
SERIES_INSTANCES, RETRIEVE = "00201209", "00081190"
UID = {"study": "0020000D", "series": "0020000E", "instance": "00080018"}


class FoundInstance(NamedTuple):
    """An instance that was made.

    Attributes:
        uid: SOP Instance UID.
        member: Its name in the job's archive.
        says: Its attributes, JSON.
    """

    uid: str
    member: str
    says: str


class FoundSeries(NamedTuple):
    """A series that was made.

    Attributes:
        job: What made it; its files are there as long as the job is.
        study: Study Instance UID.
        uid: Series Instance UID.
        of_study: Attributes of the study, JSON.
        says: Its attributes, JSON.
        instances: In the order of the archive.
    """

    job: ServedJob
    study: str
    uid: str
    of_study: str
    says: str
    instances: tuple[FoundInstance, ...]


def index_results(job: ServedJob) -> list[FoundSeries]:
    """Read what a job made from the headers of its archive; the job need not be done yet.

    Raises:
        ChiasmError: If the archive holds no DICOM, or there is none.
    """
    found = []
    for member, header in _headers(job.folder / DICOM_ARCHIVE):
        of = {name: _value(header, UID[name]) for name in UID}
        found.append(
            (of["study"], of["series"], FoundInstance(of["instance"], member, _said(header, INSTANCE)), header)
        )
    made = []
    for (study, uid), group in groupby(found, lambda one: one[:2]):
        members = list(group)
        first = members[0][3]
        instances = tuple(one[2] for one in members)
        made.append(FoundSeries(job, study, uid, _said(first, STUDY), _said(first, SERIES), instances))
    return made


def _headers(archive: Path) -> Iterator[tuple[str, Attributes]]:
    """Read the attributes of each file of an archive that a search shows."""
    if not archive.exists():
        raise ChiasmError("nothing was made that DICOM can hold", reason="no-dicom")
    parts = list_parts(archive)
    tags = (*STUDY, *SERIES, *INSTANCE, "SpecificCharacterSet")
    for part, said in zip(parts, visit(parts, partial(_attributes, tags=tags)), strict=True):
        yield str(part.member), said


def read_metadata(archive: Path, members: Sequence[str]) -> Iterator[Attributes]:
    """Read all attributes of files in an archive as DICOM's JSON model, without their pixels.

    Raises:
        VolumeError: If one is damaged.
    """
    return visit([DicomFile(archive, member) for member in members], partial(_attributes, tags=()))


def _attributes(part: DicomFile, file: BinaryIO, *, tags: Sequence[str]) -> Attributes:
    header = read_dataset(part, file, tags=tags)
    with taming(part):
        said: Attributes = header.to_json_dict(suppress_invalid_tags=True)
    return said


def _said(header: Attributes, keywords: Sequence[str]) -> str:
    """Return the attributes of a level as JSON; those that are empty or lacking too, as QIDO-RS wants them."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tags = {f"{tag_for_keyword(word):08X}": word for word in keywords}
    said = {tag: header.get(tag) or {"vr": dictionary_VR(word)} for tag, word in tags.items()}
    return json.dumps(said)


def _value(header: Attributes, tag: str) -> str:
    values = header.get(tag, {}).get("Value") or [""]
    return str(values[0])


# --- searching ---------------------------------------------------------------------------------------------------


def describe_study(series: Sequence[FoundSeries], root: str) -> Attributes:
    """Describe a study by its series, at least one, as QIDO-RS does.

    Args:
        series: All of one study.
        root: Address of DICOMweb, with which that of the study begins.
    """
    said: Attributes = json.loads(series[0].of_study)
    modality = "00080060"
    modalities = sorted({_value(json.loads(one.says), modality) for one in series})
    said[MODALITIES] = {"vr": "CS", "Value": modalities}
    said[STUDY_SERIES] = {"vr": "IS", "Value": [len(series)]}
    said[STUDY_INSTANCES] = {"vr": "IS", "Value": [sum(len(one.instances) for one in series)]}
    said[RETRIEVE] = {"vr": "UR", "Value": [f"{root}/studies/{series[0].study}"]}
    return said


def describe_series(series: FoundSeries, root: str) -> Attributes:
    """Describe a series with its study, as QIDO-RS does; see `describe_study`."""
    said: Attributes = {**json.loads(series.of_study), **json.loads(series.says)}
    said[SERIES_INSTANCES] = {"vr": "IS", "Value": [len(series.instances)]}
    said[RETRIEVE] = {"vr": "UR", "Value": [f"{root}/studies/{series.study}/series/{series.uid}"]}
    return said


def describe_instance(series: FoundSeries, instance: FoundInstance, root: str) -> Attributes:
    """Describe an instance with its series and study, as QIDO-RS does; see `describe_study`."""
    said = {**describe_series(series, root), **json.loads(instance.says)}
    said[RETRIEVE]["Value"][0] += f"/instances/{instance.uid}"
    return said
