"""`predictions.json`: which files a prediction wrote, from which inputs, with which model.

Evaluation reads it, and so can any script; nothing here loads torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from chiasm.errors import RunError
from chiasm.storage import read_json, write_json

FILE = "predictions.json"
NOTICE = "Synthetic images for research; not for diagnostic use."

Role = Literal["train", "validation", "test", "sealed", "new"]


@dataclass(frozen=True)
class Entry:
    """One predicted case; files lie beside the manifest.

    Attributes:
        case: Its id.
        role: In the run's split; "new" for a case that the run never saw.
        sources: Files that went in.
        image: The synthetic image.
        mask: Where the networks were asked.
        reliability: Expected absolute error, or None.
        warnings: What a reader of the image must know.
    """

    case: str
    role: Role
    sources: tuple[str, ...]
    image: str
    mask: str
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
        notice: What the images are not for.
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
    notice: str = NOTICE


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `predictions.json`, whole or not at all.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    write_json(folder / FILE, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder that `chiasm predict` wrote.

    Raises:
        RunError: If there is none, it is damaged, or names a file outside the folder.
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
    for entry in manifest.cases:
        for name in (entry.image, entry.mask, entry.reliability):
            if name is not None and (Path(name).name != name or name in ("", "..")):
                raise RunError("names a file outside its folder", path=path, reason="outside", found=name)
    return manifest
