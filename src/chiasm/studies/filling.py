"""Missing modalities of cases, predicted by a model and marked as synthetic."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from chiasm import __version__
from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import Case, Problem
from chiasm.cohorts.completed import MARK, Origin, mark_synthetic, was_made
from chiasm.errors import VolumeError
from chiasm.prediction.folders import Predicted, predict
from chiasm.prediction.manifest import NOTICE, Entry
from chiasm.prediction.model import Model, load_model
from chiasm.preparation.intensity import MapKind, fit_intensity
from chiasm.recipe import Recipe
from chiasm.volumes import Reading, read_volume
from chiasm.volumes.screening import written_suffix

FRESH = ".predicting"  # folder beside an image, where it is predicted


def predict_as_asked(
    run: Path, cases: Sequence[Case], folder: Path, recipe: Recipe, trust: Collection[str] = ()
) -> Predicted:
    """Predict cases on the hardware of a recipe, with the same engine everywhere.

    Raises:
        ChiasmError: If the model or the folder cannot be used.
    """
    settings = recipe.training
    return predict(
        run,
        cases,
        folder,
        accelerator=settings.accelerator,
        precision=settings.precision,
        engine="torch",
        trust=trust,
    )


def fill(
    cases: Sequence[Case], run: Path, folder: Path, recipe: Recipe, trust: Collection[str] = ()
) -> tuple[list[Case], list[Problem]]:
    """Predict the missing modality of each case, unless it is there already; a bad case is reported and left out.

    Args:
        cases: With the sources of the model.
        run: Folder of the model.
        folder: Each image, its expected-error map and its sidecar go to `folder/<case>/`.
        recipe: Says where networks run.
        trust: Classes of others that the model may consist of.

    Returns:
        The cases with the image, and it is said to be synthetic; and what went wrong with the others.

    Raises:
        ChiasmError: If the model or the folder cannot be used.
    """
    model = load_model(run, trust=trust)
    target = model.plan.target
    filled: list[Case] = []
    problems: list[Problem] = []
    for case in cases:
        origin = _origin(case, model)
        suffix = written_suffix(case.images[model.plan.sources[0]])  # as predict does
        image = folder / case.id / f"{case.id}_{target}{MARK}{suffix}"
        lost: list[Problem] = []
        if not was_made(image, origin):
            made = predict_as_asked(run, [case], image.with_name(FRESH), recipe, trust)
            lost = _take_over(made, case, image, origin, model.plan.target_kind)
        problems += lost
        if not lost:
            filled.append(replace(case, images={**case.images, target: image}, synthetic=(target,)))
    return filled, problems


def _origin(case: Case, model: Model) -> Origin:
    """Return the sources and the model of an image of a case."""
    seen = {name: sha256_of(case.images[name]) for name in model.plan.sources}
    return Origin(case.id, model.plan.target, seen, model.recipe.method, model.sha256, f"chiasm {__version__}")


def _take_over(made: Predicted, case: Case, image: Path, origin: Origin, kind: MapKind) -> list[Problem]:
    """Move the prediction of a case to its place and mark it; if it cannot be used, return the reason."""
    fresh = image.with_name(FRESH)
    if made.problems:
        shutil.rmtree(fresh, ignore_errors=True)
        return list(made.problems)
    entry = made.manifest.cases[0]
    flat = _flat(fresh / entry.image, fresh / str(entry.mask), kind, case.reading)
    if flat is not None:
        shutil.rmtree(fresh)
        what = f"case {case.id}: the model made nearly the same {origin.modality} everywhere; train longer or larger"
        return [Problem(image, flat, what, case.id)]
    _move(entry, fresh, image, origin)
    shutil.rmtree(fresh)
    return []


def _move(entry: Entry, fresh: Path, image: Path, origin: Origin) -> None:
    """Move an image and its expected-error map from where they were predicted, and mark them as synthetic."""
    error_map = None if entry.expected_error is None else image.with_name(entry.expected_error)
    (fresh / entry.image).replace(image)
    if error_map is not None:
        (fresh / error_map.name).replace(error_map)
    mark_synthetic(image, origin, expected_error=error_map, warnings=(NOTICE, *entry.warnings))


def _flat(image: Path, mask: Path, kind: MapKind, reading: Reading) -> str | None:
    """Say why a later training could not scale an image, such as that of a collapsed network; None if it could."""
    inside = read_volume(mask, labels=True, reading=reading).array > 0
    try:
        fit_intensity(read_volume(image, allow_constant=True, reading=reading).array, inside, kind)
    except VolumeError as error:
        return error.reason
    return None
