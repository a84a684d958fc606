"""Zip archives: their members, with checks of the unpacked size and of members that lead outside."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from chiasm.errors import VolumeError

HIDDEN = (".", "__MACOSX")  # how names of files begin that are passed over
MOST_FILES = 20_000
LARGEST_ARCHIVE = 4 * 2**30  # bytes that the members of a zip may unpack to
LARGEST_MEMBER = 2**29
BOMB_SIZE, BOMB_RATIO = 2**24, 100  # a member that is both larger and more compressible holds no image
PIECE = 2**20  # bytes unpacked of an archive's member at a time, if the method can be stopped
PACKED_PIECE = 4096  # bytes taken of a member that is packed by another method, which unpacks all that it takes


def looks_like_zip(head: bytes) -> bool:
    """Recognise an archive by the mark of a first member, or of an archive without one."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def list_members(path: Path) -> list[str]:
    """List the members of an archive by name, without hidden ones; nothing is unpacked.

    Raises:
        VolumeError: If there are too many, or one is a bomb, has a password or names a place outside the archive.
        BadZipFile: If it is damaged; other exceptions of the standard library may say so too.
    """
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    check_count(len(members), path)
    _check_members(members, path)
    return [name for name in sorted(info.filename for info in members) if not _is_hidden(name)]


def check_count(count: int, path: Path) -> None:
    """Refuse a place with more files than a scan session has.

    Raises:
        VolumeError: If it has.
    """
    if count > MOST_FILES:
        raise VolumeError(
            "holds too many files to be one scan session",
            path=path,
            reason="too-large",
            expected=f"at most {MOST_FILES}",
            hint="Name the folder of one series.",
        )


def _check_members(members: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """Refuse an archive that unpacks to too much, or with a member that must not be unpacked."""
    unpacked = sum(info.file_size for info in members)
    if unpacked > LARGEST_ARCHIVE:
        raise VolumeError(
            "unpacks to too much",
            path=path,
            reason="too-large",
            found=f"{unpacked / 2**20:.0f} MiB",
            expected=f"at most {LARGEST_ARCHIVE / 2**20:.0f} MiB",
        )
    for info in members:
        _check_member(info, path)


def _check_member(info: zipfile.ZipInfo, path: Path) -> None:
    """Refuse a member that leads outside, has a password, or unpacks to too much."""
    name = info.filename
    if _leads_outside(name):
        raise VolumeError(
            "is a zip archive with a member that leads outside", path=path, reason="zip-slip", found=repr(name)
        )
    if info.flag_bits & 1:
        raise VolumeError("is a zip archive with a password", path=path, reason="encrypted", hint="Unpack it.")
    bomb = info.file_size > max(BOMB_SIZE, BOMB_RATIO * max(1, info.compress_size))
    if bomb or info.file_size > LARGEST_MEMBER:
        raise VolumeError(
            "is a zip archive with a member that unpacks to too much",
            path=path,
            reason="bomb" if bomb else "too-large",
            found=f"{name!r}: {info.compress_size} to {info.file_size} bytes",
        )


def _leads_outside(member: str) -> bool:
    """Return whether the name of a member is a place outside the archive."""
    is_absolute = PurePosixPath(member).is_absolute() or bool(PureWindowsPath(member).drive)
    return is_absolute or ".." in re.split(r"[/\\]", member)


def _is_hidden(member: str) -> bool:
    return any(part.startswith(HIDDEN) for part in member.split("/"))


def unpack_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Unpack a member, never more than its entry says, as `list_members` checked; `ZipFile.read` cuts afterwards."""
    stoppable = archive.getinfo(name).compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    content = bytearray()
    with archive.open(name) as packed:  # its checksum is compared at its end
        while piece := packed.read(PIECE if stoppable else PACKED_PIECE):
            content += piece
    return bytes(content)
