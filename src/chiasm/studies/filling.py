"""Missing modalities of cases, made by a model and marked as synthetic."""

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
from chiasm.prediction.folders import predict
from chiasm.prediction.manifest import NOTICE
from chiasm.prediction.model import load_model
from chiasm.preparation.intensity import MapKind, fit_intensity
from chiasm.recipe import Recipe
from chiasm.volumes import Reading, read_volume
from chiasm.volumes.screening import written_suffix


def fill(
    cases: Sequence[Case], run: Path, folder: Path, recipe: Recipe, trust: Collection[str] = ()
) -> tuple[list[Case], list[Problem]]:
    """Make the missing modality of each case, unless it is there already; a bad case is named and the others go on.

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
    sources, target = model.plan.sources, model.plan.target
    filled: list[Case] = []
    problems: list[Problem] = []
    for case in cases:
        suffix = written_suffix(case.images[sources[0]])  # as predict does
        image = folder / case.id / f"{case.id}_{target}{MARK}{suffix}"
        seen = {name: sha256_of(case.images[name]) for name in sources}
        origin = Origin(case.id, target, seen, model.recipe.method, model.sha256, f"chiasm {__version__}")
        if not was_made(image, origin):
            fresh = folder / case.id / ".predicting"
            settings = recipe.training
            made = predict(
                run,
                [case],
                fresh,
                accelerator=settings.accelerator,
                precision=settings.precision,
                engine="torch",
                trust=trust,
            )
            problems += made.problems
            if made.problems:
                shutil.rmtree(fresh, ignore_errors=True)
                continue
            entry = made.manifest.cases[0]
            if flat := _flat(fresh / entry.image, fresh / str(entry.mask), model.plan.target_kind, case.reading):
                message = f"case {case.id}: the model made nearly the same {target} everywhere; train longer or larger"
                problems.append(Problem(image, flat, message, case.id))
                shutil.rmtree(fresh)
                continue
            error_map = None if entry.expected_error is None else image.with_name(entry.expected_error)
            (fresh / entry.image).replace(image)
            if error_map is not None:
                (fresh / error_map.name).replace(error_map)
            mark_synthetic(image, origin, expected_error=error_map, warnings=(NOTICE, *entry.warnings))
            shutil.rmtree(fresh)
        filled.append(replace(case, images={**case.images, target: image}, synthetic=(target,)))
    return filled, problems


def _flat(image: Path, mask: Path, kind: MapKind, reading: Reading) -> str | None:
    """Say why a later training could not scale an image, as of a network that collapsed; None where it could."""
    inside = read_volume(mask, labels=True, reading=reading).array > 0
    try:
        fit_intensity(read_volume(image, allow_constant=True, reading=reading).array, inside, kind)
    except VolumeError as error:
        return error.reason
    return None
