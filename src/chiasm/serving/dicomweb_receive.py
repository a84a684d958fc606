"""The body of a STOW-RS request: DICOM files, one part each, that go into a job's folder under numbers.

The body is parsed as it comes, by the parser that reads the page's forms, so it never lies in memory.

Reference:
    DICOM PS3.18, 10.5 (Store Transaction) and 8.6 (multipart payloads).
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

from anyio import to_thread
from fastapi import Request

from chiasm.errors import VolumeError
from chiasm.serving.dicom_node import IMAGES
from chiasm.serving.web_gate import WebError
from chiasm.volumes.dicom_files import DicomFile, read_dataset, taming, text, visit

MOST_PARTS = 5000  # of a request
SUFFIX = ".dcm"
NOT_UNDERSTOOD, OTHER_KIND, OTHER_STUDY, NO_ROOM = 0xC000, 0x0122, 0xC409, 0xA700  # reasons of failure
UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID")


class Received(NamedTuple):
    """An instance that arrived.

    Attributes:
        path: Its file.
        sop_class: SOP Class UID, as the next ones "" if it cannot be read.
        instance: SOP Instance UID.
        study: Study Instance UID.
        failure: Why it is not kept, a code of PS3.18; 0 if it is.
    """

    path: Path
    sop_class: str = ""
    instance: str = ""
    study: str = ""
    failure: int = 0


class _Parts:
    """Callbacks of the parser: each part becomes a file, which gets its ending when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.is_whole = folder, 0, False
        self._file: BinaryIO | None = None

    def on_part_begin(self) -> None:
        """Open the file of the next part.

        Raises:
            WebError: If the request has more parts than are taken.
        """
        self.count += 1
        if self.count > MOST_PARTS:
            raise WebError(413, "the request holds too many instances", "too-large", f"Send at most {MOST_PARTS}.")
        self._file = (self.folder / f"{self.count:06d}").open("xb")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._file.write(memoryview(data)[start:end])

    def on_part_end(self) -> None:
        self.close()
        path = self.folder / f"{self.count:06d}"
        path.rename(path.with_suffix(SUFFIX))

    def on_end(self) -> None:
        self.is_whole = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


async def receive_instances(request: Request, folder: Path) -> None:
    """Receive DICOM files into a folder, as `000001.dcm` and so on; of a request that breaks off, the whole ones.

    Args:
        request: Whose body is not read yet.
        folder: An empty one.

    Raises:
        WebError: If the request is no multipart message of DICOM files, ends too early, or is larger or slower than
            is taken.
        ClientDisconnect: If the client leaves.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser

    parts = _Parts(folder)
    try:
        parser = MultipartParser(
            _boundary(request),
            {
                "on_part_begin": parts.on_part_begin,
                "on_part_data": parts.on_part_data,
                "on_part_end": parts.on_part_end,
                "on_end": parts.on_end,
            },
        )
        async for piece in request.stream():
            await to_thread.run_sync(parser.write, piece)
    except FormParserError as error:
        raise WebError(400, "the parts of the request cannot be read", "multipart", "Send it again.") from error
    finally:
        parts.close()
    if not parts.is_whole or not parts.count:
        raise WebError(400, "the request holds no instance, or ends too early", "multipart", "Send it again.")


def _boundary(request: Request) -> bytes:
    """Return the boundary of the parts.

    Raises:
        WebError: If the body is of another type.
    """
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type", ""))
    of = options.get(b"type", b"application/dicom").strip().lower()
    if kind.lower() != b"multipart/related" or of != b"application/dicom" or not options.get(b"boundary"):
        raise WebError(
            415,
            "the request is no multipart message of DICOM files",
            "multipart",
            'Send multipart/related; type="application/dicom"; boundary=..., an instance in each part.',
        )
    return options[b"boundary"]


def read_received(folder: Path, study: str | None) -> list[Received]:
    """Read which instances arrived, and which of them are not kept.

    Args:
        folder: Of `receive_instances`.
        study: The only study that is taken, or None for any.
    """
    return [_read(path, study) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def _read(path: Path, study: str | None) -> Received:
    try:
        sop_class, instance, of = read_uids(path)
    except VolumeError:
        return Received(path, failure=NOT_UNDERSTOOD)
    failure = 0
    if not instance or not of:
        failure = NOT_UNDERSTOOD
    elif study is not None and of != study:
        failure = OTHER_STUDY
    elif sop_class not in IMAGES:
        failure = OTHER_KIND
    return Received(path, sop_class, instance, of, failure)


def read_uids(path: Path) -> tuple[str, str, str]:
    """Read the UIDs of class, instance and study of a DICOM file; "" where there is none.

    Raises:
        VolumeError: If it is no DICOM or is damaged.
    """
    part = DicomFile(path)
    (header,) = visit([part], lambda part, file: read_dataset(part, file, tags=UIDS))
    with taming(part):
        sop_class, instance, study = (text(header, name) for name in UIDS)
    return sop_class, instance, study
