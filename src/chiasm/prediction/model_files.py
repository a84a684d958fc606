"""The checks of a model folder before its files are used; this module does not load torch.

`model.toml` is the card: it names every other file with its sha256, and contains its own sha256.  Checksums find
damage. They do not show who wrote a model, so no file of it may run code: see `check_trusted`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from chiasm.checksums import has_valid_checksum, sha256_of
from chiasm.errors import RunError
from chiasm.outputs import MODEL_CARD
from chiasm.recipe import read_recipe
from chiasm.records import parse_record
from chiasm.storage import read_toml, replaced

FORMAT = 1
WEIGHTS, CARD, CALIBRATION = "weights.safetensors", MODEL_CARD, "calibration.json"
NEEDED = frozenset({WEIGHTS, "recipe.toml", "plan.toml"})
PARTS = "models"  # in the run folder of several models, which share the subjects of a cohort
MOST_FILES = 64
MOST_BYTES = 2**34  # of one file
MOST_HEADER = 2**21  # bytes of the list of tensors: 5,000 of them take 600 kB


class Card(BaseModel):
    """The content of `model.toml`.

    Attributes:
        error_scale: s of the soft targets, normalised units.
        sha256: File name to the sha256 of its bytes.
        parent: sha256 of the card of the parent model, for a finetuned model, or empty.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    error_scale: Annotated[float, Field(ge=0, le=1e6)]
    sha256: Annotated[dict[str, str], Field(max_length=MOST_FILES)]
    parent: Annotated[str, Field(max_length=64)] = ""


def find_model(path: Path) -> Path:
    """Return the model folder at `path`: `path` itself, or inside it if it is a folder of `train` or `run`.

    Raises:
        RunError: If there is none.
    """
    for folder in (path, path / "model", path / "run" / "model"):
        for candidate in (folder, replaced(folder)):  # the older one, where a kill came while it was replaced
            if (candidate / CARD).is_file():
                return candidate
    if parts := list_parts(path):
        raise RunError(
            f"is a run of {len(parts)} models, of which this command takes one",
            path=path,
            reason="several-models",
            hint=f"Give one of them, such as {parts[0]}.",
        )
    started = (path / "recipe.toml").exists()
    raise RunError(
        "is a run that has no finished model yet" if started else "holds no model",
        path=path,
        reason="no-model",
        expected="a run folder of chiasm train, or its model/ folder",
        hint="Run the same chiasm train command again to finish it." if started else None,
    )


def list_parts(path: Path) -> list[Path]:
    """Return the run folders of several models that share a cohort; none where `path` holds a single model, or nothing.

    Args:
        path: What `chiasm train` or `chiasm run` wrote.

    Raises:
        RunError: If some of the models are not finished.
    """
    run = next((one for one in (path, path / "run") if (one / PARTS / "1").is_dir()), None)
    if run is None:
        return []
    count = read_recipe(run / "recipe.toml").split.models
    parts = [run / PARTS / str(number) for number in range(1, int(count) + 1)]
    for part in parts:
        find_model(part)
    return parts


def single_runs(runs: Iterable[Path]) -> list[Path]:
    """Return the run folders of single models, in order: of a run of several models, those in it.

    Raises:
        RunError: If some models of a run are not finished.
    """
    return [one for run in runs for one in list_parts(run) or [run]]


def read_card(folder: Path) -> Card:
    """Read the card of a model folder, and check that every file it names is there, in the folder, and of a usual size.

    Files that the card does not name are ignored.

    Raises:
        RunError: If the card is damaged or of another format, or a file is missing, too large or elsewhere.
    """
    _check_place(folder, CARD)
    content = read_toml(folder / CARD)
    if content.get("format") != FORMAT:
        raise RunError(
            "was written in a format this chiasm does not know",
            path=folder / CARD,
            reason="format",
            found=content.get("format"),
            expected=FORMAT,
            hint="Use the chiasm that wrote it, or a newer one.",
        )
    if not has_valid_checksum(content):
        raise _changed(folder / CARD)
    card = parse_record(content, folder / CARD, Card, "no card of a model")
    if not card.sha256.keys() >= NEEDED:
        raise _changed(folder / CARD)
    for name in card.sha256:
        _check_place(folder, name)
    return card


def check_header(path: Path) -> None:
    """Refuse a file of weights whose list of tensors is longer than any model's.

    Raises:
        RunError: If it is.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER:
        raise RunError(
            "lists more tensors than any model has",
            path=path,
            reason="damaged",
            found=f"a header of {length:,} bytes",
            expected=f"at most {MOST_HEADER:,}",
        )


def check_files(folder: Path) -> None:
    """Check the files of a model folder against its card.

    Raises:
        RunError: As `read_card`, or if a file was changed.
    """
    card = read_card(folder)
    check_sums(folder, card, card.sha256)


def check_sums(folder: Path, card: Card, names: Iterable[str]) -> None:
    """Compare files with their sha256 in the card.

    Raises:
        RunError: If one was changed.
    """
    for name in names:
        if sha256_of(folder / name) != card.sha256[name]:
            raise _changed(folder / name)


def named_classes(trust: str | Collection[str]) -> tuple[str, ...]:
    """List the classes that a user trusts; a single one may be given without a list.

    >>> named_classes("lab.nets:Mine"), named_classes(["a:B", "c:D"])
    (('lab.nets:Mine',), ('a:B', 'c:D'))
    """
    return (trust,) if isinstance(trust, str) else tuple(trust)


def check_trusted(network: str, trust: str | Collection[str], path: Path) -> None:
    """Refuse a model whose network is code that the user did not name.

    Args:
        network: ``package.module:Class``, as the model's recipe names it.
        trust: What the user named, in the same form.
        path: The model.

    Raises:
        RunError: If the user did not name it.
    """
    if network in named_classes(trust):
        return
    raise RunError(
        f"needs the network {network}, which is not part of chiasm: loading the model would run that code",
        path=path,
        reason="untrusted",
        hint=f"The author of the model chose that code. If you trust it, name it: --trust {network}",
    )


def _check_place(folder: Path, name: str) -> None:
    """Refuse a name that is not a plain file's, a link out of the folder, and a file that is too large for a model."""
    path = folder / name
    if not _is_plain_name(name):
        raise RunError("names a file outside its folder", path=folder / CARD, reason="outside", found=repr(name))
    if not path.is_file():
        raise _changed(path)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(
            "is a link that leads out of the model's folder",
            path=path,
            reason="outside",
            hint="Copy the file itself into the folder.",
        )
    if path.stat().st_size > MOST_BYTES:
        raise RunError("is too large for a part of a model", path=path, reason="too-large", found=path.stat().st_size)


def _is_plain_name(name: str) -> bool:
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & {"/", "\\"}


def _changed(path: Path) -> RunError:
    return RunError(
        "is missing or was changed since it was written",
        path=path,
        reason="damaged",
        hint="Copy the model folder again, or run the same train command to write it anew.",
    )
