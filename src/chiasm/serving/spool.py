"""The temporary folder of a server; the next start removes the folder of a killed server."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chiasm.locks import is_left_over
from chiasm.storage import temporary_beside, writing

NAME = "serve"  # the end of the folder's name, after the process and the machine that made it

_in_use: set[Path] = set()  # by this process


@contextmanager
def spooled() -> Iterator[Path]:
    """Make an empty folder that only its owner can read, and remove it with its content afterwards.

    It lies in the system's folder for temporary files (`TMPDIR`).  Folders of
    servers that were killed are removed first, if they belong to the same user.

    Raises:
        ChiasmError: If it cannot be made.
    """
    root = Path(tempfile.gettempdir())
    _remove_left_over(root)
    folder = temporary_beside(root / NAME, f"{secrets.token_hex(4)}.")
    _in_use.add(folder)
    with writing(root):
        folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_use.discard(folder)


def _remove_left_over(root: Path) -> None:
    for folder in root.glob(f".chiasm-*.{NAME}"):
        if folder not in _in_use and _is_own_folder(folder) and is_left_over(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_own_folder(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()
    except OSError:  # another server that starts now has removed it
        return False
