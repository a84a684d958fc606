"""`chiasm complete`: synthesise missing modalities, mark them, and measure whether they help a later model.

The folder of a completion holds `run/` (the completion model), `cohort/` (the completed cohort, which every verb
reads), `utility/` and `completion.json`.

`utility` measures the gain of completion on test subjects that no model has seen.

Reference:
    Li et al., Deep Learning Based Imaging Data Completion for Improved Brain
    Disease Diagnosis, MICCAI 2014, doi:10.1007/978-3-319-10443-0_39.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from chiasm import __version__
from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import Case, Cohort, Problem, grouped, subjects_of
from chiasm.cohorts.completed import copy_case, write_completed
from chiasm.cohorts.dicom_patients import Selection, marks_on
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.gathering import notes_in_lines
from chiasm.errors import CohortError, RecipeError, VolumeError
from chiasm.evaluation.rows import Row
from chiasm.evaluation.statistics import Comparison
from chiasm.locks import locked
from chiasm.outputs import refuse_data_folder, refuse_foreign, refuse_inputs, refuse_links
from chiasm.prediction.manifest import NOTICE
from chiasm.prediction.model_files import find_model, named_classes
from chiasm.progress import StepProgress
from chiasm.recipe import Recipe
from chiasm.storage import write_json, write_text
from chiasm.studies.filling import fill
from chiasm.studies.utility import (
    FEWEST_SUBJECTS,
    TRAININGS,
    WITH,
    WITHOUT,
    Fold,
    Task,
    UtilityRun,
    assign,
    choose_task,
    compare_utility,
    measure,
    recipe_of,
)
from chiasm.training.players import check_players
from chiasm.training.run import train

Say = Callable[[str], None]
FILES = ("completion.json", "completion.md")  # the first is the mark of a completion's folder
FOLDERS = ("cohort", "run", "utility")


@dataclass(frozen=True)
class Survey:
    """The missing images of a cohort, and how the gain of completion is measured.

    Attributes:
        pairs: Cases with the sources and the target.
        gaps: Cases with the sources alone.
        lacking: Cases without the target that also lack a source; they are left as they are.
        task: Of the later model; None if no utility is measured.
        folds: Of the utility.
    """

    pairs: tuple[Case, ...]
    gaps: tuple[Case, ...]
    lacking: tuple[Problem, ...]
    task: Task | None
    folds: tuple[Fold, ...]

    def cells(self, recipe: Recipe, seeds: Iterable[int]) -> list[UtilityRun]:
        """List the measurements: each fold with each seed."""
        if self.task is None:
            return []
        return [UtilityRun(fold, self.task, recipe, seed) for fold, seed in product(self.folds, seeds)]


@dataclass(frozen=True)
class Completed:
    """The result of a completion.

    Attributes:
        folder: Holds `completion.json` and all else.
        cohort: Folder of the completed cohort.
        cases: Ids of the cases that were completed.
        comparisons: With against without; the declared one first; none where no utility was asked for.
        rows: Scores of both, case by case.
        lines: What came of it, in words.
        problems: Cases that were not completed or not used, with reasons.
    """

    folder: Path
    cohort: Path
    cases: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    rows: tuple[Row, ...]
    lines: tuple[str, ...]
    problems: tuple[Problem, ...]


def complete(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    utility: str = "auto",
    seeds: int = 1,
    layout: str | None = None,
    selection: Selection | None = None,
    trust: str | Collection[str] = (),
    say: Say = print,
    progress: StepProgress | None = None,
) -> Completed:
    """Synthesise a missing modality, mark the images, and measure the gain of a later model; the same call resumes.

    Args:
        data: Folder or manifest; nothing in it is changed.
        recipe: Says sources, target, method, size and seed; its folds are those of the utility.
        out: Folder for the results.
        utility: Modality that the later model makes; "auto" for a third one that cases have, or else the first
            source; "none" to measure nothing.
        seeds: Over how many seeds the utility is measured, from the recipe's on.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken.
        trust: Classes of others that a model may consist of, beside the recipe's own, as ``package.module:Class``.
        say: Called with lines for the user.
        progress: Called after each training step.

    Raises:
        ChiasmError: If nothing is missing, too few cases are complete, or data, recipe or folder cannot be used.
        Interrupted: If the work was asked to stop.
    """
    _check_request(recipe, seeds)
    trusted = (*named_classes(trust), recipe.generator.network)
    found = _scans(find_cohort(data, layout=layout, selection=selection_of(recipe, selection)))
    for line in notes_in_lines(found.notes):
        say(line)
    survey_cohort(found, recipe, utility)  # what can be refused is refused before the folder is touched
    with locked(out):
        _check_folder(out, data if isinstance(data, Path) else data.root, found)
        cohort, problems = _copied(found, root := out / "cohort")
        survey = survey_cohort(cohort, recipe, utility)
        chosen = range(recipe.training.seed, recipe.training.seed + seeds)
        cells = survey.cells(recipe, chosen)
        shares = _shares(progress, 1 + TRAININGS * len(cells))
        asked = Task(recipe.data.sources, recipe.data.target)
        say(f"{asked}: {len(survey.pairs)} cases to learn from, {len(survey.gaps)} to complete")
        learning, own = replace(cohort, cases=survey.pairs, problems=()), recipe_of(recipe, asked, chosen[0])
        run = train(learning, own, out / "run", say=say, progress=shares[0], cache=out / "cache")
        filled, failed = fill(survey.gaps, out / "run", root, recipe, trusted)
        _write_cohort(cohort, filled, root)
        rows, unmeasured = _measure_all(cells, cohort, out, shares[1:], trusted, say)
        kinds = (found.problems, problems, survey.lacking, run.problems, failed, unmeasured)
        problems = list(dict.fromkeys(chain(*kinds)))
        comparisons = compare_utility(rows, cohort.regions, subjects_of(cohort.cases))
        lines = describe(survey, filled, comparisons, root, {problem.case for problem in problems})
        made = tuple(case.id for case in filled)
        done = Completed(out, root, made, comparisons, tuple(rows), lines, tuple(problems))
        _write(done, survey, recipe, chosen)
    return done


def _write_cohort(cohort: Cohort, filled: Sequence[Case], root: Path) -> None:
    """Write the completed cohort, with the completed cases in place of those with gaps."""
    made = {case.id: case for case in filled}
    write_completed(root, [made.get(case.id, case) for case in cohort.cases], cohort.regions)


def _measure_all(
    cells: Sequence[UtilityRun],
    cohort: Cohort,
    out: Path,
    progress: Sequence[StepProgress | None],
    trust: Collection[str],
    say: Say,
) -> tuple[list[Row], list[Problem]]:
    """Measure each fold with each seed; `progress` counts all their trainings."""
    rows: list[Row] = []
    problems: list[Problem] = []
    folds = len({cell.fold.number for cell in cells})
    for cell, *progresses in zip(cells, *(progress[number::TRAININGS] for number in range(TRAININGS)), strict=True):
        say(f"utility, fold {cell.fold.number + 1} of {folds}, seed {cell.seed}: {cell.task}")
        scored, failed = measure(cell, cohort, out, progresses, trust=trust)
        rows += scored
        problems += failed
    return rows, problems


def _check_request(recipe: Recipe, seeds: int) -> None:
    """Refuse a request that no completion can fulfil."""
    if seeds < 1:
        raise RecipeError("the utility needs a seed", reason="seeds", found=seeds, expected="1 or more")
    if recipe.training.devices > 1:  # every process would start anew, from the command on
        raise RecipeError("a completion trains on one device", reason="devices", found=recipe.training.devices)
    check_players(recipe)


def _check_folder(out: Path, data: Path, found: Cohort) -> None:
    """Refuse a folder in which a completion would replace other files, and mark it as the folder of a completion.

    Raises:
        RunError: If it is or holds the data, or holds other files with the names of the completion's own.
    """
    refuse_data_folder(out, [data])
    scans = [path for case in found.cases for path in (*case.images.values(), case.mask, case.labels)]
    refuse_inputs(map(out.joinpath, (*FILES, *FOLDERS)), [data, *scans], what="the completion")
    refuse_links(out, FOLDERS)
    if not _is_completion(out):
        refuse_foreign(out, (*FILES, *(f"{name}/*" for name in FOLDERS)))
        write_json(out / FILES[0], {"finished": False})


def _is_completion(out: Path) -> bool:
    """Return whether a completion wrote in a folder; an interrupted one may have left only its run."""
    return (out / FILES[0]).is_file() or (out / "run" / "recipe.toml").is_file()


def _scans(cohort: Cohort) -> Cohort:
    """Leave out synthetic images, even if they are allowed: no image is completed from them."""
    scans = map(_without_made, cohort.cases)
    return replace(cohort, cases=tuple(case for case in scans if case.images))


def _without_made(case: Case) -> Case:
    """Leave out the synthetic images of a case."""
    images = {name: path for name, path in case.images.items() if "synthetic" not in marks_on(case, name)}
    return replace(case, images=images, synthetic=())


def survey_cohort(cohort: Cohort, recipe: Recipe, utility: str) -> Survey:
    """Return the cases that a completion learns from, those that it completes, and how the gain is measured.

    Raises:
        CohortError: If a modality is unknown, nothing is missing, or too few subjects are complete.
        RecipeError: If the later model cannot be trained as asked.
    """
    sources, target = recipe.data.sources, recipe.data.target
    pairs = select_cases(cohort, sources, target).cases
    open_cases = [case for case in cohort.cases if target not in case.images]
    fillable = grouped(open_cases, lambda case: set(sources) <= set(case.images))
    gaps = tuple(fillable.get(True, ()))
    lacking = tuple(_lacking(case, recipe) for case in fillable.get(False, ()))
    _check_enough(pairs, gaps, recipe, cohort.root)
    task = choose_task(pairs, gaps, recipe, utility)
    return Survey(pairs, gaps, lacking, task, () if task is None else assign(pairs, gaps, task, recipe))


def _check_enough(pairs: Sequence[Case], gaps: Sequence[Case], recipe: Recipe, root: Path) -> None:
    """Refuse a cohort with nothing to complete, or too little to learn it from."""
    sources, target = recipe.data.sources, recipe.data.target
    if not gaps:
        raise CohortError(
            f"there is nothing to complete: no case has {' and '.join(sources)} and lacks {target}",
            path=root,
            reason="nothing-missing",
            found=f"{len(pairs)} cases with both",
        )
    if (people := len({case.subject for case in pairs})) < FEWEST_SUBJECTS:
        raise CohortError(
            f"too few subjects have {' and '.join(sources)} and {target} to learn from",
            path=root,
            reason="too-few-pairs",
            found=people,
            expected=f"at least {FEWEST_SUBJECTS}",
        )


def _lacking(case: Case, recipe: Recipe) -> Problem:
    """Report a case that cannot be completed because it also lacks a source."""
    absent = " and no ".join(set(recipe.data.sources) - set(case.images))
    message = f"case {case.id} has no {recipe.data.target} and no {absent}: left as it is"
    return Problem(next(iter(case.images.values())).parent, "missing-modality", message, case.id)


def describe(
    survey: Survey, filled: Sequence[Case], comparisons: Sequence[Comparison], root: Path, lost: Collection[str | None]
) -> tuple[str, ...]:
    """Describe in lines what was completed and whether a later model gains, with or without a gain."""
    lines = (f"{len(filled)} of {len(survey.gaps)} cases completed: {root}",)
    if survey.task is None:
        return lines
    if not comparisons:
        return (*lines, f"utility, {survey.task}: not measured, no completed case could be used")
    first = comparisons[0]
    return (
        *lines,
        f"utility, {survey.task}: {_training_cases(survey.folds, lost)}; "
        f"{first.subjects} test subjects in {len(survey.folds)} folds, {first.seeds} seeds",
        f"mae without {first.mean_against:.4g}, with {first.mean:.4g} {first.unit}",
        first.verdict,
    )


def _training_cases(folds: Sequence[Fold], lost: Collection[str | None]) -> str:
    """State the number of training cases of the later models."""
    real = [sum(case.split == "train" for case in fold.real) for fold in folds]
    more = [sum(case.id not in lost for case in fold.gaps) for fold in folds]
    return f"{_span(real)} real training cases, {_span(more)} completed ones more"


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _write(done: Completed, survey: Survey, recipe: Recipe, seeds: Iterable[int]) -> None:
    """Write `completion.json` for programs and `completion.md` for people."""
    pairs = _paired(done.rows)
    content = {
        "software": f"chiasm {__version__}",
        "source": recipe.data.sources,
        "target": recipe.data.target,
        "method": recipe.method,
        "model": sha256_of(find_model(done.folder / "run") / "weights.safetensors"),
        "completed": done.cases,
        "problems": [{"case": one.case, "reason": one.reason, "message": one.message} for one in done.problems],
        "utility": _utility(done, survey, list(seeds), pairs),
    }
    write_json(done.folder / FILES[0], content)
    title = str(Task(recipe.data.sources, recipe.data.target))
    write_text(done.folder / FILES[1], "\n".join([f"# {title}", "", *_items(done), *_table(pairs), "", NOTICE]) + "\n")


def _items(done: Completed) -> list[str]:
    """List the results as lines of Markdown."""
    verdicts, messages = (one.verdict for one in done.comparisons[1:]), (one.message for one in done.problems)
    return [f"- {line}" for line in (*done.lines, *verdicts, *messages)]


def _utility(
    done: Completed, survey: Survey, seeds: list[int], pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Collect the measurements, with the cases of each fold; None if nothing was measured."""
    if survey.task is None:
        return None
    roles = ("pairs", "real", "gaps", "test")
    return {
        "source": survey.task.sources,
        "target": survey.task.target,
        "seeds": seeds,
        "folds": [{name: [case.id for case in getattr(fold, name)] for name in roles} for fold in survey.folds],
        "comparisons": [_plain(asdict(one)) for one in done.comparisons],
        "cases": pairs,
    }


def _table(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Set both errors of each test case and seed as lines of a Markdown table; none without any."""
    if not pairs:
        return []
    body = [f"| {p['case']} | {p['seed']} | {p[WITHOUT]:.4g} | {p[WITH]:.4g} | {p['unit']} |" for p in pairs]
    return ["", "| test case | seed | mae without | mae with | unit |", "|---|---|---|---|---|", *body]


def _paired(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Put both scores of each test case and seed side by side: MAE in the mask."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in rows:
        if (row.region, row.metric) == ("mask", "mae"):
            names = {"case": row.case, "fold": row.fold, "seed": row.seed, "unit": row.unit}
            found.setdefault((row.case, row.fold, row.seed), names)[row.method] = row.value
    return list(found.values())


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turn NaN and infinity, which JSON does not have, into null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _copied(cohort: Cohort, root: Path) -> tuple[Cohort, list[Problem]]:
    """Copy all cases; one that cannot be read is named and left out."""
    cases: list[Case] = []
    problems: list[Problem] = []
    for case in cohort.cases:
        try:
            cases.append(copy_case(case, root))
        except VolumeError as error:
            path = error.path or next(iter(case.images.values()))
            problems.append(Problem(path, error.reason, f"case {case.id}: {error}", case.id))
    return replace(cohort, root=root, layout="completed", cases=tuple(cases), problems=()), problems


def _shares(progress: StepProgress | None, trainings: int) -> list[StepProgress | None]:
    """Return a progress function for each of several equal trainings."""
    return [_share(progress, number, trainings) for number in range(trainings)]


def _share(progress: StepProgress | None, number: int, trainings: int) -> StepProgress | None:
    """Report the progress of one of several equal trainings as that of all."""
    if progress is None:
        return None

    def reported(done: int, total: int, values: Mapping[str, float]) -> None:
        work = (number + values.get("work", done / max(total, 1))) / trainings
        progress(number * total + done, trainings * total, {**values, "work": work})

    return reported
