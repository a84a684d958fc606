"""`chiasm plan`: from a folder of pairs to the recipe, the split and the plan of a run folder.

The same recipe and the same cases find what is written already and change
nothing; another recipe, or other cases, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import Case, Cohort, Problem, reading_of, with_reading
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.gathering import notes_in_lines
from chiasm.cohorts.relatives import with_subjects
from chiasm.cohorts.splits import (
    ROLES,
    Folds,
    Split,
    assign_folds,
    check_same_split,
    choose_models,
    leave_one_site_out,
    make_part,
    make_split,
    sites_of,
    with_fewer_training,
    write_splits,
)
from chiasm.errors import ChiasmError, CohortError, RunError
from chiasm.locks import locked
from chiasm.names import amount
from chiasm.on_demand import PartOf
from chiasm.preparation.arrays import Say
from chiasm.preparation.examination import ExaminedCohort, describe_displaced, examine_cohort
from chiasm.preparation.patches import EMPTY
from chiasm.preparation.plan import Plan, read_plan, write_plan
from chiasm.preparation.planning import continue_plan, make_plan
from chiasm.preparation.unpaired import describe_unpaired, find_unpaired, refuse_duplicates
from chiasm.progress import in_lines
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.registration.cohort import AlignedCohort, align_cohort, describe_movement
from chiasm.training.finished import Run, find_finished, is_finished
from chiasm.training.run_folder import check_run_folder


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
        found = find_cases(data, recipe, folder, layout, selection)
        return plan_cases(found, recipe, folder, say, cache, Wishes()).run


def find_cases(
    data: Path | Cohort, recipe: Recipe, folder: Path, layout: str | None, selection: Selection | None
) -> Cohort:
    """Find the cases, after the recipe has been checked against itself and against what the folder holds.

    Files are chosen and read as the recipe says.

    Raises:
        ChiasmError: If the data, the recipe or the folder cannot be used.
    """
    from chiasm.training.players import check_players

    check_players(recipe)
    return _find_known(data, recipe, folder, layout, selection)


def resolve_models(
    data: Path | Cohort,
    recipe: Recipe,
    folder: Path,
    layout: str | None = None,
    selection: Selection | None = None,
) -> tuple[Recipe, Path | Cohort]:
    """Find the number of models where the recipe leaves it to the cohort.

    Several share a cohort of few subjects where each of them needs few steps, because it starts from weights that ship.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for.
        folder: The run folder; what an earlier call chose there holds.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.

    Returns:
        The recipe with a number, and the cases if they had to be found for it.

    Raises:
        ChiasmError: If the data cannot be used.
    """
    if recipe.split.models != "auto":
        return recipe, data
    if (folder / "recipe.toml").is_file():
        return with_split(recipe, models=read_recipe(folder / "recipe.toml").split.models), data
    from chiasm.training.pretrained import may_start

    if recipe.training.devices > 1 or not may_start(recipe):  # several processes train one model
        return with_split(recipe, models=1), data
    cohort = cohort_of(data, recipe, layout, selection)
    paired = select_cases(cohort, recipe.data.sources, recipe.data.target)
    return with_split(recipe, models=choose_models("auto", paired.cases)), cohort


def with_split(recipe: Recipe, **changes: object) -> Recipe:
    """Return a recipe with other settings of its split."""
    return recipe.model_copy(update={"split": recipe.split.model_copy(update=changes)})


def find_finished_run(
    data: Path | Cohort, recipe: Recipe, folder: Path, layout: str | None, selection: Selection | None, say: Say
) -> Run | None:
    """Return the run of a folder where `train` would find nothing to do; None too where it would refuse.

    Nothing that learns is imported, so that a command that is repeated ends at once.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for.
        folder: The run folder.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        say: Called with what was left out, where the run is finished.
    """
    if not is_finished(folder):
        return None
    lines: list[str] = []
    try:
        with locked(folder):
            found = _find_known(data, recipe, folder, layout, selection)
            done = find_finished(folder, found, lines.append)
    except ChiasmError:
        return None
    for line in lines if done is not None else ():
        say(line)
    return done


def _find_known(
    data: Path | Cohort, recipe: Recipe, folder: Path, layout: str | None, selection: Selection | None
) -> Cohort:
    """Find the cases, after the folder has been checked."""
    check_run_folder(folder, data.root if isinstance(data, Cohort) else data)
    check_recipe(folder, recipe)
    return cohort_of(data, recipe, layout, selection)


def cohort_of(data: Path | Cohort, recipe: Recipe, layout: str | None, selection: Selection | None) -> Cohort:
    """Find the cases of a folder, or take those that were found already; read and assigned as the recipe says.

    Raises:
        ChiasmError: If the data cannot be used.
    """
    if isinstance(data, Cohort):
        return with_subjects(with_reading(data, reading_of(recipe.data)), recipe.split.subject_pattern)
    return find_cohort(data, layout=layout, selection=selection_of(recipe, selection))


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that was started with another recipe.

    Raises:
        RunError: If it was; the message names each setting.
    """
    path = folder / "recipe.toml"
    if not path.exists():
        return
    before, now = _list_settings(read_recipe(path)), _list_settings(recipe)
    changed = [f"{name} was {before[name]!r} and is {value!r}" for name, value in now.items() if before[name] != value]
    if changed:
        raise RunError(
            f"was started with another recipe: {'; '.join(changed)}",
            path=folder,
            reason="other-recipe",
            hint="Give another folder with -o, or the options it was started with.",
        )


def _list_settings(recipe: Recipe) -> dict[str, object]:
    """List every setting as SECTION.NAME, then method and size."""
    content = json.loads(recipe.model_dump_json())
    sections = {section: fields for section, fields in content.items() if isinstance(fields, dict)}
    settings = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    return settings | {name: content[name] for name in ("method", "size")}


@dataclass(frozen=True)
class PlannedRun:
    """What planning found.

    Attributes:
        run: The plan, the split, and what was left out.
        recipe: As asked for, with the steps that fit the time that was given.
        cohort: The usable cases; those with one side alone too, where the method learns from such.
        paired: Names of the training cases that count as pairs.
        is_new: Whether the plan was made now; a plan that was read may hold the forecast of another machine.
        threads: Of the CPU, on which the training is forecast and done.
    """

    run: Run
    recipe: Recipe
    cohort: Cohort
    paired: tuple[str, ...]
    is_new: bool
    threads: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all cases to learn from: the pairs, then the unpaired ones."""
        return (*self.paired, *self.run.plan.unpaired)


class Wishes(NamedTuple):
    """What a caller may ask of a new run beside its recipe.

    Attributes:
        minutes: It gets as few steps as are done in that time.
        parent: Plan of another model, whose weights go on learning or whose images are averaged with the new one's: it
            holds for all that they depend on.
        threads: Of the CPU; None leaves them to a measurement, as in `threads_for`.
    """

    minutes: float | None = None
    parent: Plan | None = None
    threads: int | None = None


class _Unpaired(NamedTuple):
    """Cases of which one side is there, and those of them that could not be read."""

    cases: tuple[Case, ...]
    unreadable: tuple[Problem, ...]


def plan_cases(
    found: Cohort,
    recipe: Recipe,
    folder: Path,
    say: Say,
    cache: Path | None,
    wishes: Wishes,
) -> PlannedRun:
    """Do the work of `plan_run` on cases that were found; the run folder is this process's own.

    Raises:
        ChiasmError: As `plan_run`.
    """
    cohort = select_cases(found, recipe.data.sources, recipe.data.target)
    _report_selection(cohort, found, recipe, say)
    aligned = _align(cohort, recipe, registered_in(folder, recipe, cache), say)
    examined = examine_cohort(aligned.cohort, recipe.data, folder, in_lines(say, "reading"))
    refuse_duplicates(examined.cases, examined.cohort, recipe.data.modalities)
    split = _split_cases(examined.cohort, recipe)
    paired = paired_names(recipe, split)
    check_same_split(folder / "splits.json", split)
    say(
        f"split by {recipe.split.by}: "
        + ", ".join(f"{len(names)} {role}" for role in ROLES if (names := getattr(split, role)))
    )
    if recipe.split.folds == "auto" and split.test:
        say(_describe_held_out(split))
    lone = _find_unpaired(found, recipe, split, examined, say)
    usable = _gather_usable(aligned, examined, lone)
    for problem in usable.problems:
        say(problem.line)
    if displaced := describe_displaced(examined.cases.values()):
        say(f"warning: {displaced}")
    unpaired = _unpaired_names(recipe, split, paired, lone)
    before = _read_plan_of_before(folder / "plan.toml", unpaired)
    plan = before or _choose_plan(recipe, usable, paired, aligned, examined, wishes.parent)
    if before is None and EMPTY in plan.reasons["patch"]:
        say(f"warning: patches of {' x '.join(map(str, plan.patch))} voxels: {plan.reasons['patch']}")
    recipe, plan, threads = _forecast(recipe, replace(plan, unpaired=unpaired), folder, say, wishes, before is None)
    write_recipe(folder / "recipe.toml", recipe)  # from here on the folder is this recipe's
    hashes = {name: one.images[recipe.data.sources[0]].voxels for name, one in examined.cases.items()}
    write_splits(folder / "splits.json", split, hashes, examined.cohort.cases)
    if before is None:
        write_plan(folder / "plan.toml", plan)
    return PlannedRun(Run(folder, plan, split, usable.problems), recipe, usable, paired, before is None, threads)


def _forecast(
    recipe: Recipe, plan: Plan, folder: Path, say: Say, wishes: Wishes, is_new: bool
) -> tuple[Recipe, Plan, int]:
    """Choose the threads, and forecast a new training on them; return recipe and plan with the steps that fit."""
    from chiasm.prediction.engines import on_threads
    from chiasm.training.cost import check_memory, estimate_cost, fit_time
    from chiasm.training.threads import threads_for

    if is_new:
        check_memory(recipe, plan)
    threads = threads_for(recipe, plan, folder, say, wishes.threads)
    if not is_new:
        return recipe, plan, threads
    with on_threads(threads):
        plan = replace(plan, expected=estimate_cost(recipe, plan))
    if wishes.minutes is not None:
        recipe, plan = fit_time(recipe, plan, wishes.minutes)
    return recipe, plan, threads


def _describe_held_out(split: Split) -> str:
    """Say which cases no weights learn from, and what that is for."""
    validating = (
        f"; {', '.join(split.validation)} for validation, which watches the training and calibrates the expected error"
    )
    return (
        f"held out: {', '.join(split.test)} for the test, so that the report shows images to which nothing was fitted"
        f"{validating if split.validation else ''} (--folds 1 tests none)"
    )


def _named_images(recipe: Recipe) -> tuple[str, ...]:
    """Return the sources, then the target, which may be one of them."""
    return (*recipe.data.sources, recipe.data.target)


def _report_selection(cohort: Cohort, found: Cohort, recipe: Recipe, say: Say) -> None:
    """Say how many cases have the images of the recipe, what was noticed, and how many images were made."""
    wanted = ", ".join(recipe.data.sources)
    wanted += f" and {recipe.data.target}" if recipe.data.target not in recipe.data.sources else ""
    say(f"{amount(len(cohort.cases), 'case')} with {wanted} ({cohort.layout})")
    for line in notes_in_lines(found.notes):
        say(line)
    asked = set(_named_images(recipe))
    if synthetic := sum(not asked.isdisjoint(case.synthetic) for case in cohort.cases):
        say(f"of these {synthetic} with images that were made, not acquired")


def _split_cases(cohort: Cohort, recipe: Recipe) -> Split:
    """Split the usable cases as the recipe says; refuse fewer training subjects than its stages need."""
    settings, cases = recipe.split, cohort.cases
    shares = {"validation": settings.validation, "locked": settings.locked}
    if settings.models not in (1, "auto"):
        split = make_part(
            cases, models=int(settings.models), part=settings.fold, seed=settings.seed, locked=settings.locked
        )
    elif settings.by == "site":
        site = _choose_site(cohort, settings.folds, settings.fold)
        split = leave_one_site_out(cases, site, seed=settings.seed, **shares)
    else:
        split = make_split(cases, folds=settings.folds, fold=settings.fold, seed=settings.seed, **shares)
    split = with_fewer_training(split, cases, settings.training_subjects, settings.seed)
    if recipe.generator.stages > 1:
        learning = {case.subject: case.site for case in cases if case.id in split.train}
        assign_folds(learning, recipe.generator.inner_folds, settings.seed)
    return split


def _choose_site(cohort: Cohort, folds: Folds, fold: int) -> str:
    """Return the site that a fold tests, where there is one fold for each site."""
    sites = sites_of(cohort.cases)
    if folds not in ("auto", len(sites)) or fold >= len(sites):
        raise CohortError(
            "folds by site need one fold for each site",
            path=cohort.root,
            reason="sites",
            found=f"{folds} folds" if folds != "auto" else f"fold {fold}",
            expected=f"{len(sites)}: {', '.join(sites)}",
        )
    return sites[fold]


def _unpaired_names(recipe: Recipe, split: Split, paired: Sequence[str], lone: _Unpaired) -> tuple[str, ...]:
    """Name what is learnt from without a partner: training cases beyond the pairs, and those of one side alone."""
    if recipe.optimiser.kind != "admm":
        return ()
    return (*(name for name in split.train if name not in paired), *(case.id for case in lone.cases))


def _gather_usable(aligned: AlignedCohort, examined: ExaminedCohort, lone: _Unpaired) -> Cohort:
    """Return all cases that can be used; what is lacking in a case that serves without a partner is no problem."""
    served = {case.id for case in lone.cases}
    missing = [problem for problem in aligned.cohort.problems if problem.case not in served]
    return replace(
        aligned.cohort,
        cases=(*examined.cohort.cases, *lone.cases),
        problems=(*missing, *aligned.problems, *examined.problems, *lone.unreadable),
    )


def _read_plan_of_before(path: Path, unpaired: tuple[str, ...]) -> Plan | None:
    """Read the plan that the folder holds already; None without one, a refusal where it has other unpaired images."""
    if not path.exists():
        return None
    plan = read_plan(path)
    if plan.unpaired != unpaired:
        raise RunError(
            "was made with other unpaired images than the data folder now holds",
            path=path,
            reason="other-cases",
            found=", ".join(unpaired) or "none",
            expected=", ".join(plan.unpaired) or "none",
            hint="Start a new run with another -o, or restore the data as it was.",
        )
    return plan


def _choose_plan(
    recipe: Recipe,
    cohort: Cohort,
    paired: Sequence[str],
    aligned: AlignedCohort,
    examined: ExaminedCohort,
    parent: Plan | None,
) -> Plan:
    facts = PartOf(examined.cases, attrgetter("facts"))
    from chiasm.training.players import patch_needs

    if parent is not None:
        return continue_plan(parent, recipe, cohort, paired, examined=facts)
    return make_plan(recipe, cohort, paired, needs=patch_needs(recipe), moved_mm=aligned.moved_mm, examined=facts)


def registered_in(folder: Path, recipe: Recipe, cache: Path | None = None) -> Path:
    """Return where the registered volumes of a run lie: in its folder, or by kind in a cache that runs share."""
    return folder / "registered" if cache is None else cache / f"registered-{recipe.data.registration}"


def _align(cohort: Cohort, recipe: Recipe, folder: Path, say: Say) -> AlignedCohort:
    """Register every case as the recipe says, and say how far they were moved."""
    kind, names = recipe.data.registration, _named_images(recipe)
    together = align_cohort(
        cohort, names, kind, folder, lambda done, of, case: say(f"registering {case} ({done + 1} of {of})")
    )
    if together.moved_mm:
        say(f"{kind} registration to {names[0]}: {describe_movement(together.moved_mm)}")
    return together


def _find_unpaired(found: Cohort, recipe: Recipe, split: Split, examined: ExaminedCohort, say: Say) -> _Unpaired:
    """Find the cases of which one side is there, for the method that learns from such; none for all others."""
    if recipe.optimiser.kind != "admm":
        return _Unpaired((), ())
    held_out = {name: examined.cases[name] for name in (*split.validation, *split.test, *split.locked)}
    elsewhere = _sites_without_tests(examined.cohort.cases, split) if recipe.split.by == "site" else None
    alone, unreadable = find_unpaired(found, recipe.data, held_out=held_out, elsewhere=elsewhere)
    if alone:
        pairing = describe_unpaired(alone, recipe.data.sources, recipe.data.target)
        say(f"{len(alone)} images serve without a partner: {pairing}")
    return _Unpaired(tuple(alone), tuple(unreadable))


def _sites_without_tests(cases: Sequence[Case], split: Split) -> set[str]:
    tested = {case.site for case in cases if case.id in split.test}
    return {case.site for case in cases if case.site} - tested


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
