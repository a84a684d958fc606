"""MONAI's data lists as rows of a manifest.

A data list is a JSON object with lists of entries by their role: `training`, `validation`, `test` or `testing`.  An
entry is a file, or an object of files; `image` may list one file for each channel, and `modality` or `channel_names` of
the whole list name the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from chiasm.cohorts.cases import volume_stem
from chiasm.errors import CohortError

#: Key of a data list to the split of a manifest; what is for training may be split further.
SECTIONS: Mapping[str, str] = {"training": "", "validation": "validation", "test": "test", "testing": "test"}
NAMES = ("id", "case", "subject")  # keys that name an entry


def is_datalist(content: object) -> bool:
    """Return whether a JSON file is a data list."""
    return isinstance(content, Mapping) and any(isinstance(content.get(key), list) for key in SECTIONS)


def rows_of(content: Mapping[str, object], path: Path) -> list[dict[str, object]]:
    """Return the rows of a manifest with the content of a data list.

    Args:
        content: Of the file.
        path: The file.

    Raises:
        CohortError: If an entry names no file.
    """
    channels = _channels(content)
    listed = [(key, entry) for key in SECTIONS for entry in _entries(content, key)]
    has_validation = any(key == "validation" for key, _ in listed)
    rows: list[dict[str, object]] = []
    for key, entry in listed:
        split = "train" if key == "training" and has_validation else SECTIONS[key]
        files = dict(_files(entry, channels))
        first = next(iter(files.values()), "")
        name = _name(entry, first)
        if not name:
            raise CohortError(
                "has an entry without a file",
                path=path,
                reason="datalist",
                found=str(entry)[:80],
                expected='{"image": "a.nii.gz", "label": "b.nii.gz"}',
            )
        rows.append({"subject": name, "split": split, **files})
    return rows


def _entries(content: Mapping[str, object], key: str) -> Sequence[object]:
    entries = content.get(key)
    return entries if isinstance(entries, list) else ()


def _channels(content: Mapping[str, object]) -> Sequence[str]:
    """Return the names of the channels of `image`, in order; empty if the list does not name them."""
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, Mapping):
        return ()
    return [str(names[key]).lower() for key in sorted(names, key=lambda key: (len(str(key)), str(key)))]


def _files(entry: object, channels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the files of an entry with their roles; skip other values, such as a fold."""
    if isinstance(entry, str):
        entry = {"image": entry}
    for key, value in entry.items() if isinstance(entry, Mapping) else ():
        if key == "image" and isinstance(value, list):
            names = channels if len(channels) == len(value) else [f"image{number}" for number in range(len(value))]
            yield from zip(names, map(str, value), strict=True)
        elif isinstance(value, str) and key not in NAMES:
            yield (_image_name(channels) if key == "image" else str(key)), value


def _image_name(channels: Sequence[str]) -> str:
    return channels[0] if len(channels) == 1 else "source"


def _name(entry: object, first: str) -> str:
    """Return the name of a case: the name in its entry, or that of its first file."""
    given = next((entry[key] for key in NAMES if key in entry), None) if isinstance(entry, Mapping) else None
    return str(given) if given is not None else volume_stem(PurePosixPath(first).name) or ""
