"""`predictions.json`: which files a prediction wrote, from which inputs, with which model.

It is written after each case, so a killed command can resume.  Paths are relative to its folder, so a whole tree can be
moved.  Evaluation reads it, and so can any script; this module does not load torch.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, cast, get_args

from pydantic import AliasChoices, BeforeValidator, Field

from chiasm.checksums import sha256_of
from chiasm.errors import RunError, shortened, unknown
from chiasm.names import is_plain, is_safe_id
from chiasm.records import read_record
from chiasm.storage import write_json
from chiasm.volumes.masks import Rule

FILE = "predictions.json"
NAMED = 3  # of many cases
NOTICE = "Synthetic images for research; not for diagnostic use."

Role = Annotated[
    Literal["train", "validation", "out-of-fold", "test", "locked", "new"],
    BeforeValidator(lambda role: "locked" if role == "sealed" else role),  # its name in version 0.1
]
Container = Literal["volume", "nifti", "metaimage", "nrrd", "mgz", "dicom"]
#: Suffix of a volume by its container; "volume" is the format of the source.
SUFFIXES = {"nifti": ".nii.gz", "metaimage": ".mha", "nrrd": ".nrrd", "mgz": ".mgz"}


def container_named(name: str) -> Container:
    """Return the file format of this name.

    Raises:
        RecipeError: If there is none of this name.
    """
    if name not in get_args(Container):
        raise unknown("format", name, get_args(Container))
    return cast("Container", name)


@dataclass(frozen=True)
class Entry:
    """One predicted case; files lie beside the manifest.

    Attributes:
        case: Its id.
        role: In the run's split; "out-of-fold" for a case of one of several models that did not learn from it; "new"
            for a case that the run never saw.
        sources: Files that went in, from the manifest's folder.
        image: The synthetic image: a file, or the folder of a DICOM series.
        mask: Where the networks were asked, or None where the image is a DICOM series.
        expected_error: Expected absolute error, or None.
        warnings: What a reader of the image must know.
        sha256: Every file that was written to its digest; empty in manifests of earlier versions.
        inputs: Digest of the contents of all files that went in; empty likewise.
        mask_rule: What the mask was found by: "given" for a file, "nonzero" or "body"; empty likewise.
        engine: What computed the networks: its name, version and precision; empty likewise.
        spread: Standard deviation of the images of several models, or None.
    """

    case: str
    role: Role
    sources: tuple[str, ...]
    image: str
    mask: str | None
    expected_error: Annotated[str | None, Field(validation_alias=AliasChoices("expected_error", "reliability"))]
    warnings: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)
    inputs: str = ""
    mask_rule: Rule | Literal[""] = ""
    engine: str = ""
    spread: str | None = None

    @property
    def was_seen(self) -> bool:
        """Whether the case was used in training."""
        return self.role in ("train", "validation")


def warn_of_seen(seen: Collection[str], count: int) -> Iterator[str]:
    """Say how many of `count` cases were used in training, and the first of them; nothing where none was.

    >>> list(warn_of_seen(["a", "b", "c", "d"], 5))
    ['4 of 5 cases were used in training, so these results do not hold for new patients: a, b, c, ...']
    """
    if seen:
        some = ", ".join([*itertools.islice(seen, NAMED), *(["..."] if len(seen) > NAMED else [])])
        yield (
            f"{len(seen)} of {count} cases were used in training, so these results do not hold for new patients: {some}"
        )


@dataclass(frozen=True)
class Failure:
    """One case that could not be predicted."""

    case: str | None
    file: str
    reason: str
    message: str


@dataclass(frozen=True)
class Member:
    """One of several models whose images were averaged.

    Attributes:
        model: Its folder, from the manifest's folder.
        sha256: Of its card.
        method: Arm.
        seed: Of its training.
        fold: Of its split.
    """

    model: str
    sha256: str
    method: str
    seed: int
    fold: int


@dataclass(frozen=True)
class Manifest:
    """The content of `predictions.json`.

    Attributes:
        model: Folder of the model, from the manifest's folder; of several the first one, whose unit holds.
        sha256: Of its card `model.toml`, which names every file of the model with its own; of several the sha256 of
            theirs, one a line.
        method: Arm.
        seed: Of its training.
        fold: Of its split.
        sources: Modalities that went in.
        target: The modality that came out.
        unit: Of the images and expected-error maps.
        cases: What was predicted.
        failed: What was not.
        container: One file an image, in the format of the source ("volume") or in one of `SUFFIXES`; "dicom" for series
            and parametric maps.
        notice: What the images are not for.
        degraded: Whether sources had thin slices that were made thick first (super-resolution).
        options: What else the images depend on, by name.
        pending: Cases that were not done yet when it was written.
        written_in: The folder that it was written in, absolute: where paths start if the folder was copied alone.
        models: Every model, where the images are means over several; empty for one.
    """

    model: str
    sha256: str
    method: str
    seed: int
    fold: int
    sources: tuple[str, ...]
    target: str
    unit: str
    cases: tuple[Entry, ...]
    failed: tuple[Failure, ...]
    container: Container = "volume"
    notice: str = NOTICE
    degraded: bool = False
    options: Mapping[str, bool | str] = field(default_factory=dict)
    pending: tuple[str, ...] = ()
    written_in: str = ""
    models: tuple[Member, ...] = ()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `predictions.json`, whole or not at all.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    write_json(folder / FILE, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder that `chiasm predict` wrote.

    Raises:
        RunError: If there is none, it is damaged, names a case twice, or a file outside the folder.
    """
    path = folder / FILE
    if not path.exists():
        raise RunError(
            f"holds no {FILE}",
            path=folder,
            reason="no-predictions",
            hint="Give the folder that chiasm predict wrote.",
        )
    manifest = read_record(path, Manifest, "damaged")
    _check_unique(path, manifest.cases)
    _check_words(path, manifest)
    for entry in manifest.cases:
        _check_entry(path, entry, depth=2 if manifest.container == "dicom" else 1)
    return manifest


def folders_of(predictions: Iterable[Path]) -> list[Path]:
    """Return folders that hold a manifest; for the folder of several models' predictions, those numbered in it.

    Args:
        predictions: Folders; one that holds no manifest at all stays, to be refused.

    Raises:
        ValueError: If there is none.
    """
    found = []
    for folder in predictions:
        numbered = (folder / str(number) for number in itertools.count(1))
        within = list(itertools.takewhile(lambda one: (one / FILE).is_file(), numbered))
        found += within if within and not (folder / FILE).is_file() else [folder]
    if not found:
        raise ValueError("no folder of predictions is given")
    return found


def _check_unique(path: Path, entries: Sequence[Entry]) -> None:
    counts = Counter(entry.case for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise RunError("names a case twice", path=path, reason="duplicate", found=twice[0])


def _check_words(path: Path, manifest: Manifest) -> None:
    """Refuse names of method, modalities and unit that are not safe in a file or table."""
    words = (manifest.method, *manifest.sources, manifest.target)
    strange = [*itertools.filterfalse(is_safe_id, words), *itertools.filterfalse(is_plain, [manifest.unit])]
    if strange:
        raise RunError(
            "holds a word that no file or table may hold", path=path, reason="unsafe-id", found=shortened(strange[0])
        )


def _check_entry(path: Path, entry: Entry, *, depth: int) -> None:
    """Refuse a case whose name is not safe for a file, and files in other or too deep places."""
    if not is_safe_id(entry.case):
        found = shortened(entry.case)
        raise RunError("gives a case a name that a file cannot have", path=path, reason="unsafe-id", found=found)
    for name in _names_of(entry):
        if not (_is_inside(name, depth) and _stays(path.parent, name)):
            raise RunError("names a file outside its folder", path=path, reason="outside", found=name)


def _names_of(entry: Entry) -> list[str]:
    """List image, mask, expected-error map and spread, if they exist."""
    return [name for name in (entry.image, entry.mask, entry.expected_error, entry.spread) if name is not None]


def relative(path: Path, folder: Path) -> str:
    """Return a path relative to the folder of a manifest, which exists."""
    return Path(os.path.relpath(path.absolute(), folder.resolve())).as_posix()


def find_path(folder: Path, manifest: Manifest, name: str) -> Path:
    """Return the place that a manifest names, from its folder or from where it was written."""
    here = folder / name  # manifests of earlier versions name absolute paths
    return here if here.exists() or not manifest.written_in else Path(manifest.written_in) / name


def files_of(folder: Path, entry: Entry) -> list[str]:
    """List the files of an entry that lie in the folder; of a DICOM series all its slices."""
    files = itertools.chain.from_iterable(_files_at(folder / name) for name in _names_of(entry))
    return [file.relative_to(folder).as_posix() for file in files if file.is_file()]


def _files_at(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.is_dir() else [place]


def digests(folder: Path, entry: Entry) -> dict[str, str]:
    """Return the sha256 of each file of an entry that lies in the folder."""
    return {name: sha256_of(folder / name) for name in files_of(folder, entry)}


def check_files(folder: Path, entry: Entry) -> None:
    """Refuse files that changed since the prediction; earlier versions stored no digests to compare.

    Raises:
        RunError: If a file is missing, was changed or was added; names it.
    """
    if not entry.sha256:
        return
    there = digests(folder, entry)
    for name in sorted({*there, *entry.sha256}):
        if there.get(name) != entry.sha256.get(name):
            what = "was changed after" if name in there else "was removed after"
            raise RunError(
                f"{what} chiasm predict wrote it",
                path=folder / name,
                reason="changed",
                hint="Run chiasm predict again to make it anew.",
            )


def _is_inside(name: str, depth: int) -> bool:
    path = PurePosixPath(name)
    plain = name == path.as_posix() != "." and "\\" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and len(path.parts) <= depth


def _stays(folder: Path, name: str) -> bool:
    """Return whether a name beside the manifest, followed through links, ends in its folder."""
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        return False
