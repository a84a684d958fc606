"""Auto-context: a stage that sees the source and the image that the stage before made from it.

A network predicts its own training cases too well, and a next stage trained on such contexts would learn to copy them.
So the context of a training case is always out of fold: the training subjects are assigned to inner folds, and a
network that was trained without a subject's fold predicts its cases; the tables that it starts from (the look-up, means
and SDs) are fitted without that fold too.  A last network of the stage is trained on all of them; it predicts
validation cases, and at inference every new one.

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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from chiasm.cohorts.splits import assign_folds
from chiasm.names import amount
from chiasm.prediction.engines import Engine
from chiasm.prediction.passes import predict_stage
from chiasm.preparation.arrays import PreparedCase, read_context, write_context
from chiasm.preparation.fingerprint import VOXELS
from chiasm.preparation.plan import Plan
from chiasm.preparation.planning import fit_tables
from chiasm.recipe import Recipe
from chiasm.training.loop import learn
from chiasm.training.session import LearningCases, Session


class CascadePart(NamedTuple):
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
class Cascade:
    """The cases and the earlier generators of the last stage.

    Attributes:
        cases: Training cases, with out-of-fold contexts, and validation cases, with contexts of the networks that ship.
        earlier: Generators of all stages but the last, in evaluation mode.
    """

    cases: LearningCases
    earlier: tuple[nn.Module, ...] = ()


def list_parts(recipe: Recipe) -> list[CascadePart]:
    """Divide the recipe's steps among the trainings of its stages, in their order.

    The trainings of an earlier stage are equally long.  The last stage has the rest, which is an equal share of the
    stages or a few steps more.

    >>> from chiasm.methods import make_recipe
    >>> asked = make_recipe("A1", settings=["generator.stages=2", "schedule.steps=1000"])
    >>> [(part.stage, part.fold, part.steps) for part in list_parts(asked)]
    [(1, 0, 166), (1, 1, 166), (1, None, 166), (2, None, 502)]
    """
    settings, steps = recipe.generator, recipe.schedule.steps
    folds = [*range(settings.inner_folds), None]
    share = steps // (settings.stages * len(folds))
    places = [(stage, fold) for stage in range(1, settings.stages) for fold in folds]
    parts = [CascadePart(stage, fold, index * share, share) for index, (stage, fold) in enumerate(places)]
    return [*parts, CascadePart(settings.stages, None, len(parts) * share, steps - len(parts) * share)]


def recipe_of(recipe: Recipe, part: CascadePart) -> Recipe:
    """Return the recipe of one training: its share of the steps, one stage, and a refiner only in the last."""
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


def refitted(plan: Plan, cases: Sequence[PreparedCase]) -> Plan:
    """Fit the tables with which a network starts on other cases: the look-up, and each channel's mean and SD.

    Args:
        plan: What prepared cases do not show stays as it is.
        cases: Of which at most `VOXELS` voxels each are taken, evenly spread.
    """
    samples: list[list[NDArray[np.float32]]] = [[] for _ in (*plan.sources, plan.target)]
    for case in cases:
        inside = np.flatnonzero(np.asarray(case.mask))
        places = np.unravel_index(inside[:: max(1, len(inside) // VOXELS)], case.mask.shape)
        for channel, image in enumerate((*case.source[: len(plan.sources)], case.target)):
            samples[channel].append(np.asarray(image[places]))
    return replace(plan, **fit_tables([np.concatenate(values) for values in samples]))


def train_cascade(recipe: Recipe, plan: Plan, cases: LearningCases, folder: Path, session: Session) -> Cascade:
    """Train all stages except the last, and give every case the context that the last one needs.

    `folder/stages/STAGE/` keeps the finished work: checkpoints of each training, and the contexts.

    Args:
        recipe: With more than one stage.
        plan: Of the first stage.
        cases: Prepared training cases, and validation cases, which no network is trained on.
        folder: The run folder.
        session: Devices, and whom to report to.

    Raises:
        CohortError: If there are fewer training subjects than inner folds.
        RunError: As `learn`.
        Interrupted: As `learn`.
    """
    sites = {case.subject: case.site for case in cases.training}
    folds = assign_folds(sites, recipe.generator.inner_folds, recipe.split.seed)
    bare = {case.id: case for case in (*cases.training, *cases.validation)}
    seen, earlier, contexts = cases, list[nn.Module](), dict[str, PreparedCase]()
    for part in list_parts(recipe)[:-1]:
        role = _role(part, seen, folds, plan)
        place = folder / "stages" / str(part.stage)
        files = _ContextFiles(place / "contexts", plan, {case.id: bare[case.id] for case in role.predicted})
        missing = _find_missing(files, part.stage, session)
        if missing or part.fold is None:
            generator = _learn_part(recipe, part, role, seen.validation, place, session)
            _write_contexts(generator, role, missing, files, recipe, session)
        contexts |= files.read()
        if part.fold is None:
            earlier.append(generator)
            seen = LearningCases(*([contexts[case.id] for case in some] for some in cases))
    return Cascade(seen, tuple(earlier))


@dataclass(frozen=True)
class _ContextFiles:
    """The files with the images that one training made of its cases.

    Attributes:
        folder: Where they lie.
        plan: Of the first stage.
        cases: Without context, by name.
    """

    folder: Path
    plan: Plan
    cases: Mapping[str, PreparedCase]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def has(self, name: str) -> bool:
        return read_context(self.cases[name], self.path(name), self.plan) is not None

    def read(self) -> dict[str, PreparedCase]:
        """Return all cases with their contexts."""
        found = {name: read_context(case, self.path(name), self.plan) for name, case in self.cases.items()}
        return {name: case for name, case in found.items() if case is not None}

    def write(self, name: str, made: NDArray[np.float32]) -> None:
        write_context(self.cases[name], made, self.path(name), self.plan)


def _find_missing(files: _ContextFiles, stage: int, session: Session) -> list[str]:
    """Name the cases whose context is missing or damaged; warn of damaged ones."""
    missing = [name for name in files.cases if not files.has(name)]
    for name in missing:
        if (path := files.path(name)).exists():
            session.say(f"{path}: what stage {stage} made is damaged, and is made anew")
    session.fabric.barrier()  # nobody writes before everybody has looked
    return missing


def _write_contexts(
    generator: nn.Module,
    role: _Role,
    missing: Sequence[str],
    files: _ContextFiles,
    recipe: Recipe,
    session: Session,
) -> None:
    """Write a network's images of the cases without a context, on the first process; the others wait."""
    if session.is_first_process:
        for case in role.predicted:
            if case.id in missing:
                files.write(case.id, _predict(generator, case, role.plan, session.engine(recipe)))
    session.fabric.barrier()


class _Role(NamedTuple):
    """The cases that one training learns from, the cases that its network predicts, and the plan of the former."""

    shown: list[PreparedCase]
    predicted: Sequence[PreparedCase]
    plan: Plan
    without: str


def _role(part: CascadePart, seen: LearningCases, folds: Sequence[Collection[str]], plan: Plan) -> _Role:
    context = part.stage > 1
    if part.fold is None:
        return _Role(list(seen.training), seen.validation, replace(plan, context=context), "")
    held = set(folds[part.fold])
    shown = [case for case in seen.training if case.subject not in held]
    predicted = [case for case in seen.training if case.subject in held]
    without = f", without inner fold {part.fold + 1} of {len(folds)}"
    return _Role(shown, predicted, replace(refitted(plan, shown) if held else plan, context=context), without)


def _learn_part(
    recipe: Recipe, part: CascadePart, role: _Role, validation: Sequence[PreparedCase], place: Path, session: Session
) -> nn.Module:
    """Train one network of a cascade; return it as it would ship."""
    cases = amount(len(role.shown), "case")
    session.say(f"stage {part.stage} of {recipe.generator.stages}: {part.steps} steps on {cases}{role.without}")
    folder = place / ("all" if part.fold is None else f"without-{part.fold}")
    counted = session.counting_from(part.first, recipe.schedule.steps)
    learner = learn(recipe_of(recipe, part), role.plan, LearningCases(role.shown, validation), folder, counted)
    return learner.model().generator


def _predict(generator: nn.Module, case: PreparedCase, plan: Plan, engine: Engine) -> NDArray[np.float32]:
    return predict_stage(generator, np.asarray(case.source), np.asarray(case.mask), plan=plan, engine=engine)
