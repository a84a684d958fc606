"""`chiasm plan` and `chiasm train`: from a folder of pairs to a run folder that explains itself.

A run folder holds `recipe.toml`, `plan.toml`, `splits.json`, `environment.json`,
`log.jsonl`, `checkpoints/`, and `model/`, the shippable part; `finished.json` is
written last.  The same command again resumes; another recipe in the same folder
is refused.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chiasm.cohorts.cases import Case, Cohort, Problem, reading_of, with_reading
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.gathering import tell_notes
from chiasm.cohorts.relatives import with_subjects
from chiasm.cohorts.splits import (
    ROLES,
    Split,
    deal_folds,
    leave_one_site_out,
    make_split,
    read_splits,
    sites_of,
    write_splits,
)
from chiasm.errors import CohortError, RunError
from chiasm.locks import locked
from chiasm.prediction.baselines import CARD, TENSORS, fit_baselines, save_baselines
from chiasm.prediction.calibration import fit_calibration
from chiasm.prediction.engines import Engine, pick_precision
from chiasm.prediction.model import Model, save_model
from chiasm.prediction.model_files import check_files
from chiasm.preparation.arrays import PreparedCase, prepare_cohort
from chiasm.preparation.examination import ExaminedCohort, examine_cohort
from chiasm.preparation.plan import FITTED, Plan, read_plan, write_plan
from chiasm.preparation.planning import make_plan
from chiasm.preparation.unpaired import find_unpaired, refuse_duplicates, tell_unpaired
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.registration.cohort import Together, align_cohort, tell_movement
from chiasm.storage import make_folder, write_json
from chiasm.training.cascade import Cascade, list_parts, recipe_of, train_cascade
from chiasm.training.cost import estimate_cost
from chiasm.training.finished import read_finished, write_finished
from chiasm.training.loop import AnyLearner, learn, make_fabric
from chiasm.training.players import check_players, patch_needs
from chiasm.training.run_folder import check_model_place, check_run_folder, remove_baselines
from chiasm.training.session import LearningCases, Progress, Say, Session


@dataclass(frozen=True)
class Run:
    """What a training left behind.

    Attributes:
        folder: The run folder.
        plan: What followed from the data.
        split: Case ids by role.
        problems: Cases and files that were not used, with reasons.
    """

    folder: Path
    plan: Plan
    split: Split
    problems: tuple[Problem, ...]


def plan_run(
    data: Path | Cohort,
    recipe: Recipe,
    folder: Path,
    *,
    say: Say = print,
    layout: str | None = None,
    selection: Selection | None = None,
    cache: Path | None = None,
) -> Run:
    """Screen a cohort, split it, choose how to train, and write all of it down.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for.
        folder: The run folder; made if missing.
        say: Called with lines for the user.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        cache: Where registered volumes are kept, if not in `folder`.

    Raises:
        CohortError: If the folder has no usable cases, too few for the split,
            or one subject's voxels under two names.
        RecipeError: As `check_players`.
        RunError: If the folder holds a run of another recipe, the data, or files of somebody else.
    """
    with locked(folder):
        found = _found(data, recipe, folder, layout, selection)
        return _plan(found, recipe, folder, say, cache)[0]


def _plan(found: Cohort, recipe: Recipe, folder: Path, say: Say, cache: Path | None) -> tuple[Run, Cohort]:
    """Do the work of `plan_run`; return the usable cases too, as they are trained on, and those of one side alone."""
    cohort = select_cases(found, recipe.data.sources, recipe.data.target)
    wanted = ", ".join(recipe.data.sources)
    wanted += f" and {recipe.data.target}" if recipe.data.target not in recipe.data.sources else ""
    say(f"{len(cohort.cases)} cases with {wanted} ({cohort.layout})")
    for line in tell_notes(found.notes):
        say(line)
    asked = {*recipe.data.sources, recipe.data.target}
    if made_up := sum(bool(asked & set(case.synthetic)) for case in cohort.cases):
        say(f"of these {made_up} with images that were made, not acquired")
    together = _bring_together(cohort, recipe, registered_in(folder, recipe, cache), say)
    cohort = together.cohort
    examined = examine_cohort(cohort, recipe.data)
    usable = examined.cohort.cases
    problems = [*together.problems, *examined.problems]
    refuse_duplicates(examined.cases, examined.cohort, recipe.data.modalities)
    settings = recipe.split
    shares = {"validation": settings.validation, "sealed": settings.sealed}
    if settings.by == "site":
        sites = sites_of(usable)
        if len(sites) != settings.folds:
            raise CohortError(
                "folds by site need one fold for each site",
                path=cohort.root,
                reason="sites",
                found=f"{settings.folds} folds",
                expected=f"{len(sites)}: {', '.join(sites)}",
            )
        split = leave_one_site_out(usable, sites[settings.fold], seed=settings.seed, **shares)
    else:
        split = make_split(usable, folds=settings.folds, fold=settings.fold, seed=settings.seed, **shares)
    if recipe.generator.stages > 1:
        learning = {case.subject: case.site for case in usable if case.id in split.train}
        deal_folds(learning, recipe.generator.inner_folds, settings.seed)
    paired = paired_names(recipe, split)
    path = folder / "splits.json"
    if path.exists() and read_splits(path).split != split:
        raise RunError(
            "was written for other cases than the data folder now holds",
            path=path,
            reason="other-cases",
            hint="Start a new run with another -o, or bring the data back as it was.",
        )
    say("split by subject: " + ", ".join(f"{len(names)} {role}" for role in ROLES if (names := getattr(split, role))))
    alone, unreadable = _find_unpaired(found, recipe, split, examined, say)
    unpaired = (*(name for name in split.train if name not in paired), *(case.id for case in alone))
    unpaired = unpaired if recipe.optimiser.kind == "admm" else ()
    served = {case.id for case in alone}
    missing = [problem for problem in cohort.problems if problem.case not in served]
    usable_cohort = replace(cohort, cases=(*usable, *alone), problems=(*missing, *problems, *unreadable))
    for problem in usable_cohort.problems:
        say(problem.line)
    made = (folder / "plan.toml").exists()
    if made:
        plan = read_plan(folder / "plan.toml")
        if plan.unpaired != unpaired:
            raise RunError(
                "was made with other unpaired images than the data folder now holds",
                path=folder / "plan.toml",
                reason="other-cases",
                found=", ".join(unpaired) or "none",
                expected=", ".join(plan.unpaired) or "none",
                hint="Start a new run with another -o, or bring the data back as it was.",
            )
    else:
        facts = {name: one.facts for name, one in examined.cases.items() if one.facts is not None}
        plan = make_plan(
            recipe, usable_cohort, paired, needs=patch_needs(recipe), moved_mm=together.moved_mm, examined=facts
        )
        plan = replace(plan, expected=estimate_cost(recipe, plan), unpaired=unpaired)
    write_recipe(folder / "recipe.toml", recipe)  # from here on the folder is this recipe's
    hashes = {name: one.images[recipe.data.sources[0]].voxels for name, one in examined.cases.items()}
    write_splits(path, split, hashes, usable)
    if not made:
        write_plan(folder / "plan.toml", plan)
    return Run(folder, plan, split, usable_cohort.problems), usable_cohort


def _find_unpaired(
    found: Cohort, recipe: Recipe, split: Split, examined: ExaminedCohort, say: Say
) -> tuple[list[Case], list[Problem]]:
    """Find the cases of which one side is there, for the method that learns from such; none for all others."""
    if recipe.optimiser.kind != "admm":
        return [], []
    usable = examined.cohort.cases
    held_out = {name: examined.cases[name] for name in (*split.validation, *split.test, *split.sealed)}
    tested = {case.site for case in usable if case.id in split.test}
    elsewhere = {case.site for case in usable if case.site} - tested if recipe.split.by == "site" else None
    alone, unreadable = find_unpaired(found, recipe.data, held_out=held_out, elsewhere=elsewhere)
    if alone:
        told = tell_unpaired(alone, recipe.data.sources, recipe.data.target)
        say(f"{len(alone)} images serve without a partner: {told}")
    return alone, unreadable


def registered_in(folder: Path, recipe: Recipe, cache: Path | None = None) -> Path:
    """Return where the registered volumes of a run lie: in its folder, or by kind in a cache that runs share."""
    return folder / "registered" if cache is None else cache / f"registered-{recipe.data.registration}"


def _bring_together(cohort: Cohort, recipe: Recipe, folder: Path, say: Say) -> Together:
    """Register every case as the recipe says, and say how far they were moved."""
    kind, names = recipe.data.registration, (*recipe.data.sources, recipe.data.target)
    together = align_cohort(
        cohort, names, kind, folder, lambda done, of, case: say(f"registering {case} ({done + 1} of {of})")
    )
    if together.moved_mm:
        say(f"{kind} registration to {names[0]}: {tell_movement(together.moved_mm)}")
    return together


def train(
    data: Path | Cohort,
    recipe: Recipe,
    folder: Path,
    *,
    say: Say = print,
    progress: Progress | None = None,
    layout: str | None = None,
    selection: Selection | None = None,
    cache: Path | None = None,
    start: Path | None = None,
    until: int | None = None,
) -> Run:
    """Plan, prepare and train; the same call again resumes where it stopped, and ends at once when all is done.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for.
        folder: The run folder.
        say: Called with lines for the user.
        progress: Called after each step.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        cache: Where prepared and registered volumes are kept; `folder/cache` and `folder/registered` by default.
        start: Run folder of a warm-up to go on from.
        until: Stop after as many steps and write no model: a warm-up.

    Returns:
        The run; its `problems` name every case that was left out.

    Raises:
        ChiasmError: If the data, the recipe or the folder cannot be used.
        Interrupted: If the run was asked to stop.
        ValueError: If a recipe with stages is to share a warm-up.
    """
    if recipe.generator.stages > 1 and (start is not None or until is not None):
        raise ValueError("a cascade of stages has no warm-up to share")
    fabric = make_fabric(recipe)
    fabric.launch()
    lead = fabric.global_rank == 0
    quiet: Say = say if lead else _silence
    make_folder(folder)
    with locked(folder) if lead else nullcontext():
        with fabric.rank_zero_first():
            found = _found(data, recipe, folder, layout, selection)
            done = None if until is not None else _finished(folder, found, quiet)
            if done is not None:
                return done
            check_model_place(folder)
            run, cohort = _plan(found, recipe, folder, quiet, cache)
            cases = {case.id: case for case in cohort.cases}
            paired = paired_names(recipe, run.split)
            names = (*paired, *run.plan.unpaired)
            learning = [cases[name] for name in (*names, *run.split.validation)]
            prepared, problems = prepare_cohort(learning, run.plan, cache or folder / "cache", warn=quiet)
        by_id = {case.id: case for case in prepared}
        training = [by_id[name] for name in names if name in by_id]
        validation = [by_id[name] for name in run.split.validation if name in by_id]
        for problem in problems:
            quiet(problem.line)
        if not training:
            detail = f"; the first: {problems[0].message}" if problems else ""
            raise CohortError(f"no training case could be prepared{detail}", path=cohort.root, reason="no-cases")
        if lead:
            write_json(folder / "environment.json", environment())
        cost = estimate_cost(recipe, run.plan)
        quiet(
            f"{recipe.method} ({recipe.size}): {recipe.schedule.steps} steps, about {in_minutes(cost.minutes)} "
            f"and {cost.memory_mb / 1024:.1f} GB"
        )
        session = Session(fabric, quiet, progress if lead else None)
        cascade, last = Cascade(LearningCases(training, validation)), list_parts(recipe)[-1]
        if recipe.generator.stages > 1:
            cascade = train_cascade(recipe, run.plan, cascade.cases, folder, session)
            quiet(f"stage {last.stage} of {last.stage}: {last.steps} steps on {len(training)} cases")
            session = session.counting_from(last.first, recipe.schedule.steps)
        learner = learn(
            recipe_of(recipe, last) if cascade.earlier else recipe,
            replace(run.plan, context=bool(cascade.earlier)),
            cascade.cases,
            folder,
            session,
            start=start,
            until=until,
        )
        if lead:
            _make_baselines([case for case in training if case.id in paired], folder, start)
            if until is None:
                model = replace(learner.model(), recipe=recipe, earlier=cascade.earlier)
                finish(learner, model, cascade.cases.validation, folder, say=quiet)
                write_finished(folder, (case.id for case in found.cases), (*run.problems, *problems))
        fabric.barrier()
    return replace(run, problems=(*run.problems, *problems))


def _found(
    data: Path | Cohort, recipe: Recipe, folder: Path, layout: str | None, selection: Selection | None
) -> Cohort:
    """Find the cases, after the recipe has been checked against itself and against what the folder holds.

    Files are chosen and read as the recipe says.
    """
    check_players(recipe)
    check_run_folder(folder, data.root if isinstance(data, Cohort) else data)
    _check_recipe(folder, recipe)
    if isinstance(data, Cohort):
        return with_subjects(with_reading(data, reading_of(recipe.data)), recipe.split.subject_pattern)
    return find_cohort(data, layout=layout, selection=selection_of(recipe, selection))


def _finished(folder: Path, found: Cohort, say: Say) -> Run | None:
    """Return a run that is finished already; None where there is something to do.

    Raises:
        RunError: If its plan or its split was changed.
    """
    problems = read_finished(folder, (case.id for case in found.cases))
    if problems is None:
        return None
    missing = [name for name in ("plan.toml", "splits.json") if not (folder / name).exists()]
    if missing:  # as where a message asked to delete a damaged one
        say(f"warning: {folder}: {' and '.join(missing)} is made anew")
        return None
    try:
        check_files(folder / "model")
    except RunError as error:
        say(f"warning: {error.path}: {error.what}; the model is written anew")
        return None
    run = Run(folder, read_plan(folder / "plan.toml"), read_splits(folder / "splits.json").split, problems)
    remove_baselines(folder)  # of a kill after the model was written
    for problem in problems:
        say(problem.line)
    say(f"finished already: {folder / 'model'}")
    return run


def _make_baselines(training: Sequence[PreparedCase], folder: Path, start: Path | None) -> None:
    """Fit the naive baselines to the training cases, or take those of the warm-up, which had the same ones."""
    ready = None if start is None else start / "baselines"
    if ready is not None and ready.is_dir():
        shutil.copytree(ready, folder / "baselines", dirs_exist_ok=True)
    else:
        save_baselines(folder / "baselines", fit_baselines(training))


def finish(learner: AnyLearner, model: Model, validation: Sequence[PreparedCase], folder: Path, *, say: Say) -> None:
    """Calibrate the reliability map on validation cases and write `model/`.

    Without a validation case the map is left uncalibrated, and says so when it is used.

    Args:
        learner: After its last step.
        model: What it ships.
        validation: With the contexts that its last stage sees.
        folder: The run folder.
        say: Called with lines for the user.
    """
    settings = learner.recipe.training
    engine = Engine(learner.fabric.device, pick_precision(settings.precision, settings.accelerator))
    if model.local_judge is not None and validation:
        scores, errors = [], []
        for case in validation:
            maps, mask = learner.maps(case, engine), np.asarray(case.mask)
            assert maps.raw_error is not None
            scores.append(maps.raw_error[mask])
            errors.append(np.abs(maps.prediction - np.asarray(case.target))[mask])
        calibration = fit_calibration(
            np.concatenate(scores), np.concatenate(errors), fitted_on=tuple(case.id for case in validation)
        )
        model = replace(model, calibration=calibration)
        if not calibration.informative:
            say("warning: on validation cases the reliability map does not follow the true error")
    extras = [folder / "splits.json", folder / "baselines" / TENSORS, folder / "baselines" / CARD]
    save_model(folder / "model", model, {path.name: path for path in extras})
    remove_baselines(folder)
    say(f"model: {folder / 'model'}")


def paired_names(recipe: Recipe, split: Split) -> tuple[str, ...]:
    """Return the training cases that count as pairs: all of them, or the first as many as the recipe says.

    Raises:
        CohortError: If the split has fewer.
    """
    asked, there = recipe.training.pairs, split.train
    if asked > len(there):
        raise CohortError(
            f"{asked} pairs were asked for, and the split has too few training cases",
            reason="too-few-pairs",
            found=f"{len(there)}: {', '.join(there)}",
            hint=f"Set training.pairs to {len(there)} or less, or to 0 for all of them.",
        )
    return tuple(there[:asked]) if asked else tuple(there)


def environment() -> dict[str, object]:
    """Return the versions and the machine that a run depends on."""
    names = ("chiasm", "torch", "lightning-fabric", "numpy", "scipy", "nibabel", "SimpleITK", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.toml"
    if not path.exists():
        return
    before, now = (json.loads(r.model_dump_json()) for r in (read_recipe(path), recipe))
    changed = [
        f"{section}.{name} was {before[section][name]!r} and is {value!r}"
        for section, fields in now.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if before[section][name] != value
    ]
    changed += [f"{n} was {before[n]!r} and is {now[n]!r}" for n in ("method", "size") if before[n] != now[n]]
    if changed:
        raise RunError(
            f"was started with another recipe: {'; '.join(changed)}",
            path=folder,
            reason="other-recipe",
            hint="Give another folder with -o, or the options it was started with.",
        )


def describe(recipe: Recipe, plan: Plan) -> list[str]:
    """Tell a plan in lines: each choice with its reason, then time and memory."""
    lines = []
    for name, reason in plan.reasons.items():
        value = getattr(plan, name)
        short = name in FITTED or name == "trained_on"
        lines.append(f"{name}: {reason}" if short else f"{name} = {_plain(value)}: {reason}")
    cost = plan.expected or estimate_cost(recipe, plan)
    lines.append(
        f"{recipe.method} ({recipe.size}), {recipe.schedule.steps} steps: about {in_minutes(cost.minutes)} "
        f"and {cost.memory_mb / 1024:.1f} GB"
    )
    return lines


def in_minutes(minutes: float) -> str:
    """Say a duration in words.

    >>> in_minutes(0.2), in_minutes(7.2), in_minutes(200)
    ('less than a minute', '7 min', '3.3 h')
    """
    if minutes < 1:
        return "less than a minute"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _plain(value: object) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _silence(line: str) -> None:
    """Say nothing: only the first process speaks."""
    del line
