"""Output folders: a command replaces only files that chiasm wrote there, never an input, never through a link.

Every verb calls these functions before its slow work.  `refuse_inputs` and `refuse_data_folder` protect the files that
the command reads; `refuse_foreign` and `refuse_links` protect other files in the folder.  `remove_files` removes files
by name and keeps all others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from chiasm.errors import RunError
from chiasm.storage import writing

MODEL_CARD = "model.toml"  # the file that makes a folder a model folder
NAMED = 3  # files that a message names
ELSEWHERE = "Choose another folder with -o."


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path | None], *, what: str = "the result") -> None:
    """Refuse to replace a file that the command reads, or a folder that holds one.

    Args:
        outputs: Files and folders that will be replaced or removed; they may be missing.
        inputs: Files and folders that are read.  Links and other spellings of a path count as what they lead to.
        what: What would replace the input, for the message.

    Raises:
        RunError: If an output is an input, or a folder that holds one.
    """
    read = [path for path in inputs if path is not None]
    for output in outputs:
        if any(_would_replace(output, path) for path in read):
            raise RunError(
                f"belongs to the data, and {what} would replace it",
                path=output,
                reason="input",
                hint="Give another place with -o.",
            )


def _would_replace(output: Path, path: Path) -> bool:
    return _is_same(output, path) or _holds(output, path)


def refuse_data_folder(out: Path, data: Iterable[Path]) -> None:
    """Refuse a folder of results that is the folder of data itself.

    Raises:
        RunError: If it is one of `data`.
    """
    if any(_is_same(out, path) for path in data):
        raise RunError("is the folder of the data, where results do not go", path=out, reason="input", hint=ELSEWHERE)


def refuse_model_folder(out: Path) -> None:
    """Refuse a model folder as a folder of results: only training writes it, and always as a whole.

    Raises:
        RunError: If it holds the card of a model.
    """
    if (out / MODEL_CARD).is_file():
        raise RunError("is a model folder, where results do not go", path=out, reason="model-folder", hint=ELSEWHERE)


def refuse_foreign(folder: Path, names: Iterable[str], *, way_out: str = "") -> None:
    """Refuse a folder that holds other files with the names that a command will write.

    Args:
        folder: Of the results; it may be missing.
        names: Of files and folders that the command will write, and that it did not write yet; patterns are allowed.
        way_out: What a user can do beside choosing another folder, as a sentence.

    Raises:
        RunError: If any is there; names them.
    """
    found = [path for name in names for path in _matching(folder, name)]
    if found:
        more = f" (and {len(found) - NAMED} more)" if len(found) > NAMED else ""
        some = ", ".join(path.relative_to(folder).as_posix() for path in found[:NAMED])
        raise RunError(
            f"holds {some}{more}, which {'was' if len(found) == 1 else 'were'} not written by chiasm for these results",
            path=folder,
            reason="occupied",
            hint=f"{ELSEWHERE} {way_out}".strip(),
        )


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links where a command replaces or removes files: their targets belong to others.

    Raises:
        RunError: If one of the places is a link.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise RunError(
                "is a link, and chiasm replaces nothing through a link",
                path=folder / name,
                reason="link",
                hint="Remove the link, or choose another folder with -o.",
            )


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files that chiasm wrote, and folders that become empty; all other files stay.

    Args:
        folder: Of the results.
        names: Of the files, from the folder.  Those that are missing or lie behind a link are passed over.

    Raises:
        ChiasmError: If a file cannot be removed.
    """
    own = [path for name in names if (path := folder / name).is_file() and not _is_behind_link(path, folder)]
    for path in own:
        with writing(path):
            path.unlink()
    _remove_empty({parent for path in own for parent in _between(path, folder)})


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(folders, key=lambda one: len(one.parts), reverse=True):  # what a folder holds before it
        if not any(folder.iterdir()):
            folder.rmdir()


def _between(path: Path, folder: Path) -> list[Path]:
    """List the folders between a file and the folder of the results."""
    return [above for above in path.parents if above.is_relative_to(folder) and above != folder]


def _is_behind_link(path: Path, folder: Path) -> bool:
    return any(place.is_symlink() for place in (path, *_between(path, folder)))


def _matching(folder: Path, name: str) -> list[Path]:
    if any(letter in name for letter in "*?["):
        return sorted(folder.glob(name))
    return [folder / name] if os.path.lexists(folder / name) else []


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is missing
        return False


def _holds(folder: Path, path: Path) -> bool:
    """Return whether a folder holds a path, as it is written or as its links lead."""
    if not folder.is_dir():
        return False
    top = folder.resolve()
    return any(place.is_relative_to(top) for place in (path.resolve(), path.parent.resolve() / path.name))
