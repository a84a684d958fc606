"""Checksums of files, and of the cards and settings that contain their own checksum.

The first entry of a card is the sha256 of all others, so that a changed card is recognised after any copy.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chiasm.errors import RunError

KEY, OLD_KEY = "checksum", "seal"  # of a card's own checksum; files of version 0.1 have the second
SETTLED_SECONDS = 2.0  # a file that was changed later than this may change again without another time stamp


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


_HASHED: dict[tuple[int, ...], str] = {}


def content_hash(path: Path) -> str:
    """Return the sha256 of a file; a file that was hashed before is read again only if it changed.

    A file counts as changed if its place on the disk, its size or one of its times differs from when this process
    hashed it.  No program can set back the time of its last change.

    Raises:
        OSError: If the file cannot be read.
    """
    state = state_of(path)
    if state is None:
        return sha256_of(path)
    if state not in _HASHED:
        _HASHED[state] = sha256_of(path)
    return _HASHED[state]


def state_of(path: Path) -> tuple[int, ...] | None:
    """Return a file's place on the disk, its size and its times; None while it may change again without another time.

    Raises:
        OSError: If there is no such file.
    """
    there = path.stat()
    if time.time() - there.st_ctime < SETTLED_SECONDS:
        return None
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Put the sha256 of a card's content in front of it."""
    return {KEY: _checksum(content), **content}


def without_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's content without its checksum."""
    return {name: value for name, value in content.items() if name not in (KEY, OLD_KEY)}


def has_checksum(content: Mapping[str, Any]) -> bool:
    """Return whether a card contains a checksum, valid or not; a card that a user wrote has none."""
    return KEY in content or OLD_KEY in content


def has_valid_checksum(content: object) -> bool:
    """Return whether a card is unchanged since it was written."""
    return isinstance(content, Mapping) and content.get(KEY, content.get(OLD_KEY)) == _checksum(content)


def check_checksum(content: Mapping[str, Any], path: Path, hint: str) -> None:
    """Refuse a card that was changed since it was written; accept one without a checksum, as users write them.

    Args:
        content: Read from the file.
        path: The file.
        hint: What to do.

    Raises:
        RunError: If the content was changed.
    """
    if has_checksum(content) and not has_valid_checksum(content):
        raise RunError("was changed since it was written", path=path, reason="damaged", hint=hint)


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(without_checksum(content), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
