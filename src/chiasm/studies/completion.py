"""`chiasm complete`: missing modalities made, marked and put beside the scans; and whether that helps a later model.

A folder of a completion holds `run/` (the model that fills), `cohort/` (the
completed cohort, which every verb reads), `utility/` and `completion.json`.

What completion is worth is measured where nothing leaks.  Complete cases are
dealt into folds by subject.  For each fold and seed a completion model that
never saw the test subjects fills the other cases; then a later model, which
needs the modality that was missing, is trained twice with one recipe and one
plan: `without` on the cases that were complete, `with` on these and the
completed ones.  Both are scored on the test subjects' scans.

Reference:
    Li et al., Deep Learning Based Imaging Data Completion for Improved Brain
    Disease Diagnosis, MICCAI 2014, doi:10.1007/978-3-319-10443-0_39.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from chiasm import __version__
from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import MODALITIES, Case, Cohort, Problem, role_of
from chiasm.cohorts.completed import MARK, Origin, copy_case, mark_synthetic, was_made, write_completed
from chiasm.cohorts.dicom_patients import Selection, marks_on
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.gathering import tell_notes
from chiasm.cohorts.splits import ROLES, Split, make_split
from chiasm.errors import CohortError, RecipeError, VolumeError
from chiasm.evaluation.predictions import score_folder
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.evaluation.statistics import Comparison, Declared, compare_methods
from chiasm.locks import locked
from chiasm.prediction.folders import predict
from chiasm.prediction.manifest import NOTICE
from chiasm.prediction.model import load_model
from chiasm.prediction.model_files import find_model, named_classes
from chiasm.preparation.intensity import Kind, fit_intensity
from chiasm.preparation.plan import read_plan, write_plan
from chiasm.recipe import Recipe
from chiasm.storage import write_json, write_text
from chiasm.training.loop import Progress
from chiasm.training.players import check_players
from chiasm.training.run import train
from chiasm.volumes import Reading, read_volume

WITH, WITHOUT = "with", "without"
FEWEST_SUBJECTS = 2  # with both modalities: one trains and one validates
TRAININGS = 3  # of each fold and seed: the completion model and the later one twice
SHOWN = ("mae", "ssim")

Say = Callable[[str], None]


class Task(NamedTuple):
    """What the later model makes of what."""

    sources: tuple[str, ...]
    target: str

    def __str__(self) -> str:
        return f"{' + '.join(self.sources)} to {self.target}"


@dataclass(frozen=True)
class Fold:
    """Who does what in one fold of the utility.

    Attributes:
        number: Which.
        pairs: Cases that the completion model learns from, each with its role; no test subject is among them.
        real: Complete cases that the later model learns from, with their roles.
        gaps: Cases that are completed for it.
        test: Complete cases that it is scored on.
    """

    number: int
    pairs: tuple[Case, ...]
    real: tuple[Case, ...]
    gaps: tuple[Case, ...]
    test: tuple[Case, ...]


@dataclass(frozen=True)
class Survey:
    """What a cohort lacks, and how the worth of completing it is measured.

    Attributes:
        pairs: Cases with the sources and the target.
        gaps: Cases with the sources alone.
        lacking: Cases without the target that lack a source too, which are left as they are.
        task: Of the later model; None where no utility is asked for.
        folds: Of the utility.
    """

    pairs: tuple[Case, ...]
    gaps: tuple[Case, ...]
    lacking: tuple[Problem, ...]
    task: Task | None
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Completed:
    """What a completion left behind.

    Attributes:
        folder: Holds `completion.json` and all else.
        cohort: Folder of the completed cohort.
        cases: Ids of the cases that were completed.
        comparisons: With against without; the declared one first; none where no utility was asked for.
        rows: Figures of both, case by case.
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
    progress: Progress | None = None,
) -> Completed:
    """Fill a missing modality, mark what was made, and measure what it is worth; the same call again goes on.

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
    if seeds < 1:
        raise RecipeError("the utility needs a seed", reason="seeds", found=seeds, expected="1 or more")
    if recipe.training.devices > 1:  # every process would start anew, from the command on
        raise RecipeError("a completion trains on one device", reason="devices", found=recipe.training.devices)
    check_players(recipe)
    trusted = (*named_classes(trust), recipe.generator.network)
    found = _scans(find_cohort(data, layout=layout, selection=selection_of(recipe, selection)))
    for line in tell_notes(found.notes):
        say(line)
    survey_cohort(found, recipe, utility)
    with locked(out):
        root = out / "cohort"
        cohort, problems = _copied(found, root)
        survey = survey_cohort(cohort, recipe, utility)
        chosen = range(recipe.training.seed, recipe.training.seed + seeds)
        cells = [(fold, seed) for fold in survey.folds for seed in chosen]
        trainings = 1 + TRAININGS * len(cells)
        asked = Task(recipe.data.sources, recipe.data.target)
        say(f"{asked}: {len(survey.pairs)} cases to learn from, {len(survey.gaps)} to complete")
        run = train(
            replace(cohort, cases=survey.pairs, problems=()),
            recipe_of(recipe, asked, recipe.training.seed),
            out / "run",
            say=say,
            progress=_share(progress, 0, trainings),
            cache=out / "cache",
        )
        filled, failed = fill(survey.gaps, out / "run", root, recipe, trusted)
        made = {case.id: case for case in filled}
        write_completed(root, [made.get(case.id, case) for case in cohort.cases], cohort.regions)
        problems = [*found.problems, *problems, *survey.lacking, *run.problems, *failed]
        rows: list[Row] = []
        for number, (fold, seed) in enumerate(cells):
            say(f"utility, fold {fold.number + 1} of {len(survey.folds)}, seed {seed}: {survey.task}")
            shares = [_share(progress, 1 + TRAININGS * number + part, trainings) for part in range(TRAININGS)]
            assert survey.task is not None  # folds come of a task
            scored, failed = measure(fold, survey.task, recipe, seed, cohort, out, shares, trust=trusted)
            rows, problems = [*rows, *scored], [*problems, *failed]
        subjects = {case.id: case.subject for case in cohort.cases}
        comparisons = compare_utility(rows, cohort.regions, subjects)
        problems = list(dict.fromkeys(problems))
        lines = tell(survey, filled, comparisons, root, {problem.case for problem in problems})
        done = Completed(out, root, tuple(made), comparisons, tuple(rows), lines, tuple(problems))
        _write(done, survey, recipe, chosen)
    return done


def _scans(cohort: Cohort) -> Cohort:
    """Leave out images that were made, whoever allowed them: nothing is completed from those."""
    scans = [
        replace(
            case,
            images={name: path for name, path in case.images.items() if "synthetic" not in marks_on(case, name)},
            synthetic=(),
        )
        for case in cohort.cases
    ]
    return replace(cohort, cases=tuple(case for case in scans if case.images))


def survey_cohort(cohort: Cohort, recipe: Recipe, utility: str) -> Survey:
    """Say which cases a completion learns from, which it fills, and how its worth is measured.

    Raises:
        CohortError: If a modality is unknown, nothing is missing, or too few subjects are complete.
        RecipeError: If the later model cannot be as asked for.
    """
    sources, target = recipe.data.sources, recipe.data.target
    pairs = select_cases(cohort, sources, target).cases
    open_cases = [case for case in cohort.cases if target not in case.images]
    gaps = tuple(case for case in open_cases if all(name in case.images for name in sources))
    lacking = tuple(
        Problem(
            next(iter(case.images.values())).parent,
            "missing-modality",
            f"case {case.id} has no {target} and no {' and no '.join(set(sources) - set(case.images))}: left as it is",
            case.id,
        )
        for case in open_cases
        if case not in gaps
    )
    if not gaps:
        raise CohortError(
            f"there is nothing to complete: no case has {' and '.join(sources)} and lacks {target}",
            path=cohort.root,
            reason="nothing-missing",
            found=f"{len(pairs)} cases with both",
        )
    if (people := len({case.subject for case in pairs})) < FEWEST_SUBJECTS:
        raise CohortError(
            f"too few subjects have {' and '.join(sources)} and {target} to learn from",
            path=cohort.root,
            reason="too-few-pairs",
            found=people,
            expected=f"at least {FEWEST_SUBJECTS}",
        )
    task = choose_task(pairs, gaps, recipe, utility)
    return Survey(pairs, gaps, lacking, task, () if task is None else deal(pairs, gaps, task, recipe))


def choose_task(pairs: Sequence[Case], gaps: Sequence[Case], recipe: Recipe, utility: str) -> Task | None:
    """Choose what the later model makes: of all sources and the target, but for the modality itself.

    Raises:
        CohortError: If no complete case, or none with a gap, has the modality asked for.
        RecipeError: If it is the one that is completed.
    """
    if utility == "none":
        return None
    known = (*recipe.data.sources, recipe.data.target)

    def shared(name: str) -> int:
        return min(sum(name in case.images for case in cases) for cases in (pairs, gaps))

    chosen = role_of(utility)
    if utility == "auto":
        others = {name for case in gaps for name in case.images} - set(known)
        able = {name: len({case.subject for case in pairs if name in case.images}) for name in others}
        order = [*(name for name in MODALITIES if name in others), *sorted(others - set(MODALITIES))]
        usable = [name for name in order if able[name] >= max(recipe.split.folds, FEWEST_SUBJECTS)]
        chosen = max(usable, key=shared, default=recipe.data.sources[0])
    if chosen == recipe.data.target:
        raise RecipeError(
            f"{chosen} is what is completed, so a later model that makes it says nothing of its worth",
            reason="utility",
            hint="Name another modality with --utility, or none.",
        )
    if not shared(chosen):
        raise CohortError(
            f"cases with and without {recipe.data.target} do not share the modality {chosen!r}", reason="utility"
        )
    return Task(tuple(name for name in known if name != chosen), chosen)


def deal(pairs: Sequence[Case], gaps: Sequence[Case], task: Task, recipe: Recipe) -> tuple[Fold, ...]:
    """Deal complete cases into folds by subject, and let no other case of a test subject teach anything.

    Raises:
        CohortError: If there are too few subjects, or a fold has no case to complete.
        RecipeError: If there is one fold and no manifest says who is tested.
    """
    settings = recipe.split
    able = [case for case in pairs if task.target in case.images]
    fixed = any(case.split == "test" for case in able)
    if settings.folds == 1 and not fixed:
        raise RecipeError(
            "the utility needs test subjects", reason="folds", hint="Use --folds 2 or more, or --utility none."
        )
    folds = []
    for number in range(1 if fixed else settings.folds):
        split = make_split(able, folds=settings.folds, fold=number, validation=settings.validation, seed=settings.seed)
        folds.append(_fold(number, split, able, pairs, [case for case in gaps if task.target in case.images]))
        if not folds[-1].gaps:
            raise CohortError("the later model would get no completed case to train on", reason="utility")
    return tuple(folds)


def _fold(number: int, split: Split, able: Sequence[Case], pairs: Sequence[Case], gaps: Sequence[Case]) -> Fold:
    places = {name: role for role in ROLES for name in getattr(split, role)}
    roles = {case.subject: places[case.id] for case in able}

    def cast(cases: Iterable[Case], *wanted: str) -> tuple[Case, ...]:
        given = (replace(case, split=roles.get(case.subject, case.split or "train")) for case in cases)
        return tuple(case for case in given if case.split in wanted)

    learning = ("train", "validation")
    return Fold(number, cast(pairs, *learning), cast(able, *learning), cast(gaps, "train"), cast(able, "test"))


def recipe_of(recipe: Recipe, task: Task, seed: int) -> Recipe:
    """Return the recipe of one training: what it makes of what, its seed, and no test set beside the cases' roles."""
    split = {"by": "subject", "folds": 1, "fold": 0, "sealed": 0.0, "subject_pattern": ""}  # the cases know theirs
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=task._asdict()),
            "split": recipe.split.model_copy(update=split),
            "training": recipe.training.model_copy(update={"seed": seed}),
        }
    )


def fill(
    cases: Sequence[Case], run: Path, folder: Path, recipe: Recipe, trust: Collection[str] = ()
) -> tuple[list[Case], list[Problem]]:
    """Make the missing modality of each case, unless it is there already; a bad case is named and the others go on.

    Args:
        cases: With the sources of the model.
        run: Folder of the model.
        folder: Each image, its reliability map and its sidecar go to `folder/<case>/`.
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
        first = case.images[sources[0]].name.lower()
        suffix = ".mha" if first.endswith(".mha") else ".nii.gz"  # as predict does
        image = folder / case.id / f"{case.id}_{target}{MARK}{suffix}"
        seen = {name: sha256_of(case.images[name]) for name in sources}
        origin = Origin(case.id, target, seen, model.recipe.method, model.sha256, f"chiasm {__version__}")
        if not was_made(image, origin):
            fresh = folder / case.id / ".predicting"
            settings = recipe.training
            made = predict(
                run, [case], fresh, accelerator=settings.accelerator, precision=settings.precision, trust=trust
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
            error_map = None if entry.reliability is None else image.with_name(entry.reliability)
            (fresh / entry.image).replace(image)
            if error_map is not None:
                (fresh / error_map.name).replace(error_map)
            mark_synthetic(image, origin, reliability=error_map, warnings=(NOTICE, *entry.warnings))
            shutil.rmtree(fresh)
        filled.append(replace(case, images={**case.images, target: image}, synthetic=(target,)))
    return filled, problems


def _flat(image: Path, mask: Path, kind: Kind, reading: Reading) -> str | None:
    """Say why a later training could not scale an image, as of a network that collapsed; None where it could."""
    inside = read_volume(mask, labels=True, reading=reading).array > 0
    try:
        fit_intensity(read_volume(image, allow_constant=True, reading=reading).array, inside, kind)
    except VolumeError as error:
        return error.reason
    return None


def measure(
    fold: Fold,
    task: Task,
    recipe: Recipe,
    seed: int,
    cohort: Cohort,
    out: Path,
    progress: Sequence[Progress | None] = (None,) * TRAININGS,
    *,
    trust: Collection[str] = (),
) -> tuple[list[Row], list[Problem]]:
    """Train the later model with and without completed cases, and score both on the fold's test subjects.

    Args:
        fold: Who does what.
        task: Of the later model.
        recipe: Of the completion.
        seed: Of all three trainings.
        cohort: The completed one: its folder holds the test subjects' scans.
        out: The completion's folder; what was measured there already is read.
        progress: Of the three trainings.
        trust: Classes of others that a model may consist of.

    Returns:
        Rows of the methods "with" and "without", and cases that could not be used.

    Raises:
        ChiasmError: If a training fails or a file cannot be written.
    """
    place = out / "utility" / f"fold-{fold.number}-seed-{seed}-{_key(fold, task, recipe, seed)}"
    if (place / "evaluation.csv").is_file():
        return read_evaluation(place), []
    completion = recipe_of(recipe, Task(recipe.data.sources, recipe.data.target), seed)
    train(
        replace(cohort, cases=fold.pairs),
        completion,
        place / "completion",
        say=_silence,
        progress=progress[0],
        cache=out / "cache",
    )
    filled, problems = fill(fold.gaps, place / "completion", place / "made", recipe, trust)
    if not filled:
        return [], problems
    rows: list[Row] = []
    for method, more, shown in ((WITHOUT, [], progress[1]), (WITH, filled, progress[2])):
        folder, cases = place / method, (*fold.real, *more)
        if more and not (folder / "plan.toml").is_file():
            # The plan of the real cases for both: one normalisation, and errors in one unit.
            plan = read_plan(place / WITHOUT / "plan.toml")
            learning = tuple(sorted(case.id for case in cases if case.split == "train"))
            write_plan(folder / "plan.toml", replace(plan, trained_on=learning))
        asked = recipe_of(recipe, task, seed)
        run = train(replace(cohort, cases=cases), asked, folder, say=_silence, progress=shown, cache=out / "cache")
        if more and not {case.id for case in more} - {problem.case for problem in run.problems}:
            return [], [*problems, *run.problems]  # both models would be one, and their difference 0 no finding
        settings = recipe.training
        made = predict(
            folder,
            fold.test,
            folder / "predictions",
            accelerator=settings.accelerator,
            precision=settings.precision,
            trust=trust,
        )
        scored, failed, _ = score_folder(folder / "predictions", cohort.root, naive=False)
        rows += [row._replace(method=method, fold=fold.number) for row in scored]
        problems += [*run.problems, *made.problems, *failed]
    if not problems:  # else they would be forgotten
        write_evaluation(place, rows)
    return rows, problems


def _key(fold: Fold, task: Task, recipe: Recipe, seed: int) -> str:
    """Hash what a fold's figures depend on, files by content: other data are never taken for measured ones."""
    digest = hashlib.sha256(json.dumps([__version__, recipe.model_dump(mode="json"), task, seed]).encode())
    for case in (*fold.pairs, *fold.real, *fold.gaps, *fold.test):
        files = [*case.images.values(), *(file for file in (case.mask, case.labels) if file is not None)]
        digest.update(json.dumps([case.id, case.subject, case.split, *map(sha256_of, files)]).encode())
    return digest.hexdigest()[:12]


def compare_utility(
    rows: Sequence[Row], regions: Mapping[str, Sequence[int]], subjects: Mapping[str, str]
) -> tuple[Comparison, ...]:
    """Compare with against without, in pairs by subject and seed; MAE in the mask is the declared comparison."""
    declared = [Declared(WITH, WITHOUT, "mask", "mae")]
    found = compare_methods(
        rows,
        [(WITH, WITHOUT)],
        metrics=SHOWN,
        regions=("mask", "healthy", *regions),
        declared=declared,
        subjects=subjects,
    )
    return tuple(found)


def tell(
    survey: Survey, filled: Sequence[Case], comparisons: Sequence[Comparison], root: Path, lost: Collection[str | None]
) -> tuple[str, ...]:
    """Say in lines what was completed and what it is worth, a null as plainly as a gain."""
    lines = [f"{len(filled)} of {len(survey.gaps)} cases completed: {root}"]
    if survey.task is not None and not comparisons:
        lines.append(f"utility, {survey.task}: not measured, no completed case could be used")
    elif survey.task is not None:
        first = comparisons[0]
        real = [sum(case.split == "train" for case in fold.real) for fold in survey.folds]
        more = [sum(case.id not in lost for case in fold.gaps) for fold in survey.folds]
        lines.append(
            f"utility, {survey.task}: {_span(real)} real training cases, {_span(more)} completed ones more; "
            f"{first.subjects} test subjects in {len(survey.folds)} folds, {first.seeds} seeds"
        )
        lines.append(f"mae without {first.mean_against:.4g}, with {first.mean:.4g} {first.unit}")
        lines.append(first.verdict)
    return tuple(lines)


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _write(done: Completed, survey: Survey, recipe: Recipe, seeds: Iterable[int]) -> None:
    """Write `completion.json` for programs and `completion.md` for people."""
    task = survey.task
    pairs = _paired(done.rows)
    content = {
        "software": f"chiasm {__version__}",
        "source": recipe.data.sources,
        "target": recipe.data.target,
        "method": recipe.method,
        "model": sha256_of(find_model(done.folder / "run") / "weights.safetensors"),
        "completed": done.cases,
        "problems": [{"case": one.case, "reason": one.reason, "message": one.message} for one in done.problems],
        "utility": None
        if task is None
        else {
            "source": task.sources,
            "target": task.target,
            "seeds": list(seeds),
            "folds": [
                {name: [case.id for case in getattr(fold, name)] for name in ("pairs", "real", "gaps", "test")}
                for fold in survey.folds
            ],
            "comparisons": [_plain(asdict(one)) for one in done.comparisons],
            "cases": pairs,
        },
    }
    write_json(done.folder / "completion.json", content)
    table = [f"| {p['case']} | {p['seed']} | {p[WITHOUT]:.4g} | {p[WITH]:.4g} | {p['unit']} |" for p in pairs]
    heads = ["", "| test case | seed | mae without | mae with | unit |", "|---|---|---|---|---|"] if table else []
    named = [f"- {problem.message}" for problem in done.problems]
    text = [f"# {' + '.join(recipe.data.sources)} to {recipe.data.target}", "", *(f"- {line}" for line in done.lines)]
    others = [f"- {one.verdict}" for one in done.comparisons[1:]]
    text += [*others, *named, *heads, *table, "", NOTICE]
    write_text(done.folder / "completion.md", "\n".join(text) + "\n")


def _paired(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Put both figures of each test case and seed side by side: MAE in the mask."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in rows:
        if (row.region, row.metric) == ("mask", "mae"):
            names = {"case": row.case, "fold": row.fold, "seed": row.seed, "unit": row.unit}
            found.setdefault((row.case, row.fold, row.seed), names)[row.method] = row.value
    return list(found.values())


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what JSON does not know, NaN and infinity, into null."""
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


def _share(progress: Progress | None, number: int, trainings: int) -> Progress | None:
    """Tell the progress of one of several equal trainings as that of all."""
    if progress is None:
        return None

    def told(done: int, total: int, figures: Mapping[str, float]) -> None:
        progress(number * total + done, trainings * total, figures)

    return told


def _silence(line: str) -> None:
    """Say nothing: a completion tells of its folds, not of their insides."""
    del line
