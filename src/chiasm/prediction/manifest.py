"""`predictions.json`: which files a prediction wrote, from which inputs, with which model.

Evaluation reads it, and so can any script; nothing here loads torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from chiasm.cohorts.cases import is_safe_id
from chiasm.errors import RunError
from chiasm.storage import read_json, write_json

FILE = "predictions.json"
NOTICE = "Synthetic images for research; not for diagnostic use."

Role = Literal["train", "validation", "test", "sealed", "new"]
Container = Literal["volume", "dicom"]


@dataclass(frozen=True)
class Entry:
    """One predicted case; files lie beside the manifest.

    Attributes:
        case: Its id.
        role: In the run's split; "new" for a case that the run never saw.
        sources: Files that went in.
        image: The synthetic image: a file, or the folder of a DICOM series.
        mask: Where the networks were asked, or None where the image is a DICOM series.
        reliability: Expected absolute error, or None.
        warnings: What a reader of the image must know.
    """

    case: str
    role: Role
    sources: tuple[str, ...]
    image: str
    mask: str | None
    reliability: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """One case that could not be predicted."""

    case: str | None
    file: str
    reason: str
    message: str


@dataclass(frozen=True)
class Manifest:
    """What a prediction left behind.

    Attributes:
        model: Folder of the model, absolute.
        sha256: Of its weights.
        method: Arm.
        seed: Of its training.
        fold: Of its split.
        sources: Modalities that went in.
        target: The modality that came out.
        unit: Of the images and reliability maps.
        cases: What was predicted.
        failed: What was not.
        container: "volume" for one file an image, "dicom" for series and parametric maps.
        notice: What the images are not for.
        degraded: Whether sources had thin slices that were made thick first (super-resolution).
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
    try:
        manifest = TypeAdapter(Manifest).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"is damaged: {where}: {first['msg']}", path=path, reason="damaged") from error
    counts = Counter(entry.case for entry in manifest.cases)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise RunError("names a case twice", path=path, reason="duplicate", found=twice[0])
    for entry in manifest.cases:
        if not is_safe_id(entry.case):
            raise RunError("names a case as no file may be called", path=path, reason="unsafe-id", found=entry.case)
        for name in (entry.image, entry.mask, entry.reliability):
            depth = 2 if manifest.container == "dicom" else 1
            if name is not None and not (_is_inside(name, depth) and _stays(folder, name)):
                raise RunError("names a file outside its folder", path=path, reason="outside", found=name)
    return manifest


def _is_inside(name: str, depth: int) -> bool:
    path = PurePosixPath(name)
    plain = name == path.as_posix() != "." and "\\" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and len(path.parts) <= depth


def _stays(folder: Path, name: str) -> bool:
    """Tell whether a name beside the manifest, followed through links, ends in its folder."""
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        return False
