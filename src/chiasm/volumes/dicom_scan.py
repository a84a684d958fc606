"""Find the DICOM series of a place by the headers of its files; names of files do not count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from chiasm.errors import VolumeError
from chiasm.volumes.archives import looks_like_zip
from chiasm.volumes.dicom_files import (
    HEAD,
    DicomFile,
    head_of,
    list_parts,
    looks_like_dicom,
    parts_beside,
    parts_in,
    taming,
    visit,
)
from chiasm.volumes.dicom_headers import KEPT
from chiasm.volumes.dicom_series import DicomHeader, Series, join_headers
from chiasm.volumes.dicom_silence import silenced


class Scan(NamedTuple):
    """The series of a place in the order of their numbers, and the errors of its damaged DICOM files."""

    series: tuple[Series, ...]
    broken: tuple[VolumeError, ...]


def scan_series(path: Path | str) -> Scan:
    """Find the series of a folder, with the folders below it, of a zip archive, or around a file.

    A file stands for its whole series in its folder, or for the images of its
    kind there; a multi-frame file, segmentation or structure set, for itself.  A path may go on into an
    archive, and from a file with images of several kinds to one of these, as
    `enhanced.dcm/phase`.  What is no DICOM is passed over.

    Raises:
        VolumeError: If the place cannot be listed, or the file is no DICOM or is damaged.
    """
    path = Path(path)
    asked, words = _asked(path)
    if asked is None:
        return _scan(list_parts(path), path)
    scan = _scan_around(asked, path)
    series = _named_inside(scan.series, words)
    if not series and not scan.broken:
        listed = "; ".join(one.described() for one in in_order(scan.series))
        raise VolumeError(f"holds no images of the kind {words!r}", path=asked.place, reason="no-series", found=listed)
    return scan._replace(series=in_order(series))


def _named_inside(series: Iterable[Series], words: str) -> list[Series]:
    """Return the series whose images are of a kind; structure sets take the words for names of structures."""
    every = (replace(one, apart=words) if one.is_structure_set else one for one in series)
    return [one for one in every if words in ("", one.apart)]


def _scan_around(part: DicomFile, path: Path) -> Scan:
    """Find the series of one file: of a multi-frame file itself, else with the files beside it."""
    header = _only_header(part, path)
    stands_alone = header.series.is_drawn or header.series.images > 1
    if stands_alone and not header.series.concatenated:
        return Scan(tuple(join_headers([header], path)), ())
    scan = _scan(parts_beside(part), path, header.series.uid)
    return scan._replace(series=tuple(one for one in scan.series if part in one.parts) or scan.series)


def place_inside(path: Path) -> str:
    """Return what a path names inside a file: a member of an archive, images of one kind; "" for what lies on disk.

    >>> place_inside(Path(__file__, "phase")), place_inside(Path(__file__))
    ('phase', '')
    """
    file = _file_above(path)
    return "" if file is None else path.relative_to(file).as_posix()


def _file_above(path: Path) -> Path | None:
    """Return the file into which a path goes on, if it does."""
    return next((parent for parent in path.parents if parent.is_file()), None)


def scan_folder_alone(path: Path) -> Scan:
    """Find the series of the files in a folder itself, without those below it.

    Raises:
        VolumeError: If the folder cannot be listed.
    """
    return _scan(parts_in(path), path)


def find_series(path: Path | str) -> tuple[Series, ...]:
    """List the series of a folder, a zip archive or around a file, in the order of their numbers.

    Objects without images, such as reports, are among them with `images` 0.

    Raises:
        VolumeError: If there is none, or the place cannot be read.
    """
    scan = scan_series(path)
    if scan.series:
        return scan.series
    if scan.broken:
        raise scan.broken[0]
    raise VolumeError("holds no DICOM file", path=path, reason="no-dicom")


def is_dicom(path: Path) -> bool:
    """Return whether `find_series` is the one to read a place: a folder, a DICOM file, an archive, or a path into one.

    Raises:
        VolumeError: If a file cannot be read.
    """
    if path.is_dir():
        return True
    if not path.exists():
        return _file_above(path) is not None
    head = head_of(path)
    return looks_like_zip(head) or looks_like_dicom(head)


def _asked(path: Path) -> tuple[DicomFile | None, str]:
    """Return the one file that a path names, or None for a folder or a whole archive, and what it names inside."""
    if path.is_dir():
        return None, ""
    if path.exists():
        return (None if looks_like_zip(head_of(path)) else DicomFile(path)), ""
    return _asked_inside(path)


def _asked_inside(path: Path) -> tuple[DicomFile, str]:
    """Return the one file that a path into an archive or a file names, and what it names inside that."""
    holder = _file_above(path)
    inside = None if holder is None else _inside(holder, path.relative_to(holder).parts)
    if inside is None:
        raise VolumeError("does not exist", path=path, reason="not-found")
    return inside


def _inside(holder: Path, names: Sequence[str]) -> tuple[DicomFile, str] | None:
    """Return which member of an archive a path goes on to, or the DICOM file itself, and what it names in that."""
    parts = list_parts(holder)
    if parts == [DicomFile(holder)] and is_dicom(holder):
        return parts[0], "/".join(names)
    for count in range(len(names), 0, -1):
        if (part := DicomFile(holder, "/".join(names[:count]))) in parts:
            return part, "/".join(names[count:])
    return None


class _Search:
    """What is found on the way through the files of a place.

    Attributes:
        only: The one SeriesInstanceUID that counts; None for all.
        headers: Of files of DICOM, by SeriesInstanceUID.
        broken: Why files of DICOM cannot be read.
        hollow: Files that end before they say anything, or are filled with zeros.
    """

    def __init__(self, only: str | None) -> None:
        self.only = only
        self.headers: dict[str, list[DicomHeader]] = {}
        self.broken: list[VolumeError] = []
        self.hollow: list[DicomFile] = []

    def look_at(self, parts: Iterable[DicomFile]) -> None:
        """Look at files, one after another."""
        with silenced():  # once for all: to change the levels of loggers takes longer than a header's text
            for _ in visit(parts, self._look):
                pass

    def _look(self, part: DicomFile, file: BinaryIO) -> None:
        """Look at a file, open at its start."""
        with taming(part):
            head = file.read(HEAD)
            file.seek(0)
        is_named = part.place.suffix.lower() in (".dcm", ".ima")
        if b"DICM".startswith(head.lstrip(b"\0")):
            self.hollow.append(part)
        elif is_named or looks_like_dicom(head):
            self._read(part, file, is_named or head[128:132] == b"DICM")

    def _read(self, part: DicomFile, file: BinaryIO, is_sure: bool) -> None:
        """Read a header; `is_sure` says that what cannot be read is damaged DICOM, and not something else."""
        try:
            header = KEPT.read(part, file)
        except VolumeError as error:
            self.broken += [error] * is_sure
            return
        if header is not None and self.only in (None, header.series.uid):
            self.headers.setdefault(header.series.uid, []).append(header)

    def missing(self, parts: Sequence[DicomFile], what: str, reason: str) -> list[VolumeError]:
        """Say what is wrong with files that seem to be of a series that was found."""
        kin = {_kin(header.series.parts[0]) for headers in self.headers.values() for header in headers}
        return [
            VolumeError(f"{what}, among files of DICOM", path=part.place, reason=reason, hint="Copy it again.")
            for part in parts
            if _kin(part) in kin
        ]


def _scan(parts: Sequence[DicomFile], path: Path, only: str | None = None) -> Scan:
    """Find the series of some files, of one SeriesInstanceUID or all."""
    search = _Search(only)
    lost = [part for part in parts if not part.path.exists()]
    search.look_at(part for part in parts if part not in lost)
    broken = [
        *search.broken,
        *search.missing(search.hollow, "is empty", "truncated"),
        *search.missing(lost, "is a link that leads nowhere", "not-found"),
    ]
    series = chain.from_iterable(join_headers(headers, path) for headers in search.headers.values())
    return Scan(in_order(series), tuple(broken))


def in_order(series: Iterable[Series]) -> tuple[Series, ...]:
    """Return series in the order of a listing, by their own numbers and those without one last, counted from 1."""
    ordered = sorted(series, key=lambda one: (one.number is None, one.number or 0, one.uid))
    return tuple(one.numbered(choice) for choice, one in enumerate(ordered, start=1))


def _kin(part: DicomFile) -> tuple[Path, str]:
    """Return what files of one series share, as a rule: folder and suffix."""
    suffix = part.place.suffix.lower()
    return part.place.parent, "" if suffix[1:].isdigit() else suffix  # UIDs as names end in anything


def _only_header(part: DicomFile, path: Path) -> DicomHeader:
    """Read the header of a file that must not be a DICOMDIR."""
    (header,) = visit([part], KEPT.read)
    if header is None:
        raise VolumeError(
            "is the table of contents of a DICOM folder", path=path, reason="format", hint="Name the folder."
        )
    return header
