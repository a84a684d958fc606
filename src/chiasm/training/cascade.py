"""Auto-context: a stage that sees, beside the source, what the stage before it made of that source.

A network that predicts the very cases it was trained on makes them too well,
and a next stage trained on such contexts would learn to copy them.  So the
context of a training case is always out of fold: the training subjects are
dealt into inner folds, and a network that was trained without a subject's fold
predicts its cases; the tables that it starts from (the look-up, means and SDs) are
fitted without that fold too.  A last network of the stage is trained on all of
them; it predicts validation cases, and at inference every new one.

    stage 1   without fold 0 -> contexts of fold 0      |
              without fold 1 -> contexts of fold 1      |  each steps / (stages * (folds + 1)) steps
              all            -> contexts of new cases   |
    stage 2   all, with contexts -> the image              what is left of the steps

The recipe's steps are those of all trainings together, so that an arm with
stages costs what an arm without costs.  With three stages or more the second's
inner networks are trained on contexts that come from networks which saw the
held-out fold; directly, no context comes from a network that saw its case.  Which
kind of intensity map a modality has is chosen once, on all training cases.

Reference:
    Nie et al., arXiv:1612.05362, section on auto-context; Tu and Bai, Auto-context,
    IEEE TPAMI 32(10), 2010; out of fold: Wolpert, Stacked generalization, 1992.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from chiasm.cohorts.splits import deal_folds
from chiasm.prediction.engines import Engine, pick_precision
from chiasm.prediction.synthesis import predict_stage
from chiasm.preparation.arrays import PreparedCase, read_context, write_context
from chiasm.preparation.fingerprint import VOXELS
from chiasm.preparation.plan import Plan
from chiasm.preparation.planning import fit_tables
from chiasm.recipe import Recipe
from chiasm.training.loop import Progress, learn

Say = Callable[[str], None]


class Part(NamedTuple):
    """One training of a cascade.

    Attributes:
        stage: Counted from 1.
        fold: The inner fold that it does not see; None: it sees all training cases.
        first: Steps that the trainings before it did.
        steps: Its own.
    """

    stage: int
    fold: int | None
    first: int
    steps: int


@dataclass(frozen=True)
class Climbed:
    """What the last stage goes on from.

    Attributes:
        training: Training cases, with out-of-fold contexts.
        validation: Validation cases, with contexts of the networks that ship.
        earlier: Generators of all stages but the last, in evaluation mode.
    """

    training: list[PreparedCase]
    validation: list[PreparedCase]
    earlier: tuple[nn.Module, ...]


def list_parts(recipe: Recipe) -> list[Part]:
    """Share the recipe's steps among the trainings of its stages, in their order.

    Those of an earlier stage are equally long; the last stage has the rest,
    which is its share of the stages or a few steps more.

    >>> from chiasm.methods import make_recipe
    >>> asked = make_recipe("A1", settings=["generator.stages=2", "schedule.steps=1000"])
    >>> [(part.stage, part.fold, part.steps) for part in list_parts(asked)]
    [(1, 0, 166), (1, 1, 166), (1, None, 166), (2, None, 502)]
    """
    settings, steps = recipe.generator, recipe.schedule.steps
    folds = [*range(settings.inner_folds), None]
    share = steps // (settings.stages * len(folds))
    places = [(stage, fold) for stage in range(1, settings.stages) for fold in folds]
    parts = [Part(stage, fold, index * share, share) for index, (stage, fold) in enumerate(places)]
    return [*parts, Part(settings.stages, None, len(parts) * share, steps - len(parts) * share)]


def recipe_of(recipe: Recipe, part: Part) -> Recipe:
    """Return the recipe of one training: its share of the steps, no stages of its own, a refiner in the last alone."""
    settings, share = recipe.generator, part.steps / recipe.schedule.steps
    refiner = settings.refiner if part.stage == settings.stages else ()
    validations = max(1, round(share * recipe.training.validations))
    return recipe.model_copy(
        update={
            "generator": settings.model_copy(update={"stages": 1, "refiner": refiner}),
            "schedule": recipe.schedule.model_copy(update={"steps": part.steps}),
            "training": recipe.training.model_copy(update={"validations": validations}),
        }
    )


def progress_of(recipe: Recipe, part: Part, progress: Progress | None) -> Progress | None:
    """Tell the progress of one training as that of the whole cascade; as it is where there is but one stage."""
    if progress is None or recipe.generator.stages == 1:
        return progress

    def told(done: int, _: int, figures: Mapping[str, float]) -> None:
        progress(part.first + done, recipe.schedule.steps, figures)

    return told


def refitted(plan: Plan, cases: Sequence[PreparedCase]) -> Plan:
    """Fit on other cases what a network starts from: the look-up, and each channel's mean and SD.

    Args:
        plan: What cannot be told from prepared cases stays as it is.
        cases: Of which at most `VOXELS` voxels each are taken, evenly spread.
    """
    samples: list[list[NDArray[np.float32]]] = [[] for _ in (*plan.sources, plan.target)]
    for case in cases:
        inside = np.flatnonzero(np.asarray(case.mask))
        places = np.unravel_index(inside[:: max(1, len(inside) // VOXELS)], case.mask.shape)
        for channel, image in enumerate((*case.source[: len(plan.sources)], case.target)):
            samples[channel].append(np.asarray(image[places]))
    return replace(plan, **fit_tables([np.concatenate(values) for values in samples]))


def climb(
    recipe: Recipe,
    plan: Plan,
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    folder: Path,
    *,
    fabric: Fabric,
    progress: Progress | None = None,
    warn: Say,
    say: Say,
) -> Climbed:
    """Train all stages but the last, and give every case the context that the last one needs.

    What is done already is found in `folder/stages/STAGE/`: checkpoints of each
    training, and the contexts.

    Args:
        recipe: With more than one stage.
        plan: Of the first stage.
        training: Prepared training cases.
        validation: Prepared validation cases, which no network is trained on.
        folder: The run folder.
        fabric: From `make_fabric`, launched.
        progress: Called after each step with steps done, all steps of all stages, figures.
        warn: Called with what a user must know.
        say: Called as each training begins.

    Raises:
        CohortError: If there are fewer training subjects than inner folds.
        RunError: As `learn`.
        Interrupted: As `learn`.
    """
    folds = deal_folds({case.subject: case.site for case in training}, recipe.generator.inner_folds, recipe.split.seed)
    engine = Engine(fabric.device, pick_precision(recipe.training.precision, recipe.training.accelerator))
    seen, judged, earlier = list(training), list(validation), list[nn.Module]()
    contexts: dict[str, PreparedCase] = {}
    for part in list_parts(recipe)[:-1]:
        place = folder / "stages" / str(part.stage)
        held = set() if part.fold is None else set(folds[part.fold])
        shown = [case for case in seen if case.subject not in held]
        here = replace(refitted(plan, shown) if held else plan, context=part.stage > 1)
        asked = judged if part.fold is None else [case for case in seen if case.subject in held]
        files = {case.id: place / "contexts" / f"{case.id}.npy" for case in asked}
        bare = {case.id: case for case in (*training, *validation)}
        missing = [case for case in asked if read_context(bare[case.id], files[case.id], plan) is None]
        for case in missing:
            if files[case.id].exists():
                warn(f"{files[case.id]}: what stage {part.stage} made is damaged, and is made anew")
        fabric.barrier()  # nobody writes before everybody has looked
        if missing or part.fold is None:
            without = "" if part.fold is None else f", without inner fold {part.fold + 1} of {len(folds)}"
            say(f"stage {part.stage} of {recipe.generator.stages}: {part.steps} steps on {len(shown)} cases{without}")
            learner = learn(
                recipe_of(recipe, part),
                here,
                shown,
                judged,
                place / ("all" if part.fold is None else f"without-{part.fold}"),
                fabric=fabric,
                progress=progress_of(recipe, part, progress),
                warn=warn,
            )
            generator = learner.model().generator
            for case in missing if fabric.global_rank == 0 else ():
                made = predict_stage(
                    generator, np.asarray(case.source), np.asarray(case.mask), plan=here, engine=engine
                )
                write_context(bare[case.id], made, files[case.id], plan)
            fabric.barrier()
        for name, path in files.items():
            found = read_context(bare[name], path, plan)
            assert found is not None
            contexts[name] = found
        if part.fold is None:
            earlier.append(generator)
            seen, judged = ([contexts[case.id] for case in cases] for cases in (training, validation))
    return Climbed(seen, judged, tuple(earlier))
