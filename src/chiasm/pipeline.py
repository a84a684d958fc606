"""`chiasm run`: from a folder of scans to a report, in one call that resumes where it was stopped.

The folder of results holds `run/` (the training), `predictions/` and `evaluation/` as the single commands write them,
`report.html`, which opens the report, and `job.json`, which holds the limit of the training time and whether all stages
are done.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from chiasm.cohorts.cases import Problem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.splits import Split, read_splits
from chiasm.errors import RecipeError, RunError
from chiasm.locks import locked
from chiasm.methods import title_of
from chiasm.names import amount
from chiasm.networks.foreign import is_own_class
from chiasm.outputs import refuse_data_folder, refuse_foreign
from chiasm.prediction.cross_fitted import predict_by_role
from chiasm.prediction.engines import Engine, Hardware
from chiasm.prediction.manifest import Container
from chiasm.prediction.model_files import PARTS
from chiasm.preparation.plan import Plan, read_plan
from chiasm.progress import Progress, StepProgress
from chiasm.recipe import Recipe, read_recipe
from chiasm.records import read_record
from chiasm.reports.evaluation import evaluate
from chiasm.reports.progress_page import PAGE, ProgressPage
from chiasm.storage import write_json, write_text
from chiasm.times import timed
from chiasm.training.cost import estimate_cost
from chiasm.training.cross_fitting import part_of, train
from chiasm.training.run import in_minutes
from chiasm.training.run_folder import check_run_folder
from chiasm.training.run_planning import PlannedRun, Wishes, find_cases, plan_cases, resolve_models
from chiasm.training.session import Say

JOB = "job.json"
REPORT = "report.html"
RUN, PREDICTIONS, EVALUATION = "run", "predictions", "evaluation"
MINUTES = 40.0  # of training, where nobody says how long it may take

#: Measured on one core with two BraTS cases at 1 mm; a forecast, no promise.
PREDICTING_SECONDS, EVALUATING_SECONDS = 1.5, 3.0  # for each million voxels of the box around the head or body


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=evaluation/report.html">
<title>chiasm report</title>
</head>
<body><p><a href="evaluation/report.html">The report</a></p></body>
</html>
"""


class PipelineJob(BaseModel):
    """The content of `job.json`: the training's time, whether all stages are done, and how test cases are predicted."""

    model_config = ConfigDict(strict=True)

    minutes: Annotated[float, Field(gt=0)] | None
    is_finished: bool = False
    engine: str = "auto"
    format: Container = "volume"


@dataclass(frozen=True)
class Report:
    """The result of `run`.

    Attributes:
        report: The page.
        problems: Cases and files that were not used, with reasons.
    """

    report: Path
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Watch:
    """The functions to which a job reports.

    Attributes:
        say: Called with lines for the user.
        training: Called after each training step.
        predicting: Called with cases done, all cases, and the case.
        evaluating: As `predicting`.
    """

    say: Say = print
    training: StepProgress | None = None
    predicting: Progress | None = None
    evaluating: Progress | None = None


def run(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    minutes: float | None = MINUTES,
    layout: str | None = None,
    selection: Selection | None = None,
    engine: str | None = None,
    container: Container | None = None,
    watch: Watch | None = None,
) -> Report:
    """Inspect, plan, train, predict the test cases, evaluate them and report; the same call resumes.

    Args:
        data: Folder or manifest of paired scans.
        recipe: What is asked for, from `make_recipe`.
        out: Folder for run, predictions, evaluation and report.
        minutes: Limit of the training time; fewer steps are trained if needed.  None trains all steps of the recipe.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        engine: What computes the networks of the prediction, as for `predict`; None for that of an earlier call, or
            "auto".
        container: Format of the predictions, as for `predict`; None for that of an earlier call, or "volume".
        watch: The functions to report to; by default lines are printed.

    Raises:
        ChiasmError: If the data, the recipe or the folder cannot be used.
        Interrupted: If the training was asked to stop; a checkpoint was written.
    """
    watch = watch or Watch()
    data, out = Path(data), Path(out)
    _check(data, recipe, out, minutes)
    with locked(out):
        job = open_job(out, minutes, recipe.training.accelerator, engine, container)
        started: list[PlannedRun] = []

        def announce(planned: PlannedRun) -> None:
            started.append(planned)
            if len(started) > 1:  # the next of several models
                return
            write_json(out / JOB, job.model_dump())
            for line in _announce(planned.recipe, planned.run.plan, planned.run.split, out):
                watch.say(line)

        recipe, cases = resolve_models(data, recipe, out / RUN, layout, selection)
        trained = train(
            cases,
            _recipe_of_before(recipe, out, minutes),
            out / RUN,
            say=watch.say,
            progress=watch.training,
            watcher=ProgressPage,
            layout=layout,
            selection=selection,
            minutes=minutes,
            announce=announce,
        )
        if job.is_finished and not started and (out / EVALUATION / REPORT).is_file():
            return Report(out / REPORT, trained.problems)
        problems = _predict_and_evaluate(data, recipe, out, layout, selection, job, watch)
        write_text(out / REPORT, _PAGE)
        write_json(out / JOB, job.model_copy(update={"is_finished": True}).model_dump())
    return Report(out / REPORT, tuple(dict.fromkeys((*trained.problems, *problems))))


def _predict_and_evaluate(
    data: Path,
    recipe: Recipe,
    out: Path,
    layout: str | None,
    selection: Selection | None,
    job: PipelineJob,
    watch: Watch,
) -> tuple[Problem, ...]:
    chosen = selection or Selection()
    with timed(out, "prediction"):
        made = predict_by_role(
            [out / RUN],
            [data],
            out / PREDICTIONS,
            only="test",
            layout=layout,
            series=[f"{modality}={words}" for modality, words in chosen.series.items()],
            select=chosen.select,
            reading=chosen.reading,
            engine=job.engine,
            container=job.format,
            degrade=recipe.data.task == "super-resolution",
            accelerator=recipe.training.accelerator,
            trust=[recipe.generator.network] if is_own_class(recipe.generator.network) else (),
            progress=watch.predicting,
        )
    count = sum(len(one.done) + len(one.kept) for one in made)
    watch.say(f"predicted: {amount(count, 'test case')}")
    scored = evaluate(
        [one.folder for one in made],
        data,
        out / EVALUATION,
        layout=layout,
        selection=selection,
        progress=watch.evaluating,
    )
    return (*(problem for one in made for problem in one.problems), *scored.problems)


def plan_ahead(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    minutes: float | None = MINUTES,
    layout: str | None = None,
    selection: Selection | None = None,
    say: Say = print,
) -> None:
    """Describe what `run` would do and how long it would take; write nothing to `out`.

    Args:
        data: As for `run`.
        recipe: What is asked for.
        out: Folder of the results.
        minutes: Limit of the training time.
        layout: Name of a layout.
        selection: Which series and images are taken.
        say: Called with lines for the user.

    Raises:
        ChiasmError: As `run`.
    """
    _check(data, recipe, out, minutes)
    open_job(out, minutes, recipe.training.accelerator)
    before = _recipe_of_before(recipe, out, minutes)
    recipe, cases = resolve_models(data, before, out / RUN, layout, selection)
    models, first = int(recipe.split.models), out / RUN
    if models > 1:
        first = first / PARTS / "1"
        recipe = part_of(recipe, 1, first, fitted=minutes is not None)
    if (first / "plan.toml").is_file() and (first / "splits.json").is_file():
        plan, split = read_plan(first / "plan.toml"), read_splits(first / "splits.json").split
    else:
        check_run_folder(first, data)
        with tempfile.TemporaryDirectory(prefix="chiasm-") as place:
            found = find_cases(cases, recipe, Path(place), layout, selection)
            time = None if minutes is None else minutes / models
            planned = plan_cases(found, recipe, Path(place), say, None, Wishes(time))
        recipe, plan, split = planned.recipe, planned.run.plan, planned.run.split
    for line in _announce(recipe, plan, split, out):
        say(line)


def _check(data: Path, recipe: Recipe, out: Path, minutes: float | None) -> None:
    """Refuse settings that a later stage could not use, before the first stage begins."""
    _check_minutes(minutes)
    if recipe.split.folds == 1 and recipe.split.by != "site" and recipe.split.models == 1:
        raise RecipeError(
            "with one fold there are no test cases, so nothing could be evaluated",
            reason="no-test",
            hint="Ask for at least 2 folds, or use chiasm train.",
        )
    if recipe.training.devices > 1:
        raise RecipeError(
            "chiasm run trains in one process", reason="devices", hint="Use chiasm train --devices for several."
        )
    refuse_data_folder(out, [data])
    if not (out / JOB).is_file():
        refuse_foreign(out, (JOB, REPORT))


def _check_minutes(minutes: float | None) -> None:
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise RecipeError("chiasm run --minutes is not a time", reason="minutes", found=minutes, expected="more than 0")


def open_job(
    out: Path,
    minutes: float | None,
    accelerator: str = "auto",
    engine: str | None = None,
    container: Container | None = None,
) -> PipelineJob:
    """Return the job of an earlier call, or a new one, before any work.

    Args:
        out: Folder of the results.
        minutes: Limit of the training time.
        accelerator: Where the engine must run.
        engine: What computes the networks of the prediction; None for that of the earlier call, or "auto".
        container: Format of the predictions; None for that of the earlier call, or "volume".

    Raises:
        RunError: If the earlier call had another time, engine or format, or the file is damaged.
        RecipeError: If the time is none, the format is "dicom", or the engine is unknown, not installed, or does not
            run there.
    """
    _check_minutes(minutes)
    if container == "dicom":
        raise RecipeError(
            "chiasm run evaluates its predictions, and those in DICOM cannot be evaluated",
            reason="format",
            hint=f"Give chiasm run another --format; then chiasm predict {out} DATA --format dicom -o PREDICTIONS.",
        )
    asked = {"engine": engine, "format": container}
    given = {name: value for name, value in asked.items() if value is not None}
    if not (out / JOB).is_file():
        job = PipelineJob.model_validate({"minutes": minutes, **given})
    else:
        job = _read_job(out)
        _refuse_other(out, "time", _minutes_in_words(job.minutes), _minutes_in_words(minutes))
        for name, value in given.items():
            _refuse_other(out, name, f"--{name} {getattr(job, name)}", f"--{name} {value}")
    Engine.pick(Hardware(accelerator, "auto", job.engine))
    return job


def _refuse_other(out: Path, name: str, before: str, now: str) -> None:
    """Refuse to resume a job with another setting than that of its first call."""
    if now != before:
        raise RunError(
            f"was started with {before} and is asked for with {now}",
            path=out,
            reason="other-minutes" if name == "time" else f"other-{name}",
            hint=f"Give another folder with -o, or the {name} it was started with.",
        )


def minutes_before(out: Path, otherwise: float) -> float | None:
    """Return the time limit of an earlier call, None for all steps; without an earlier call, `otherwise`."""
    return _read_job(out).minutes if (out / JOB).is_file() else otherwise


def _read_job(out: Path) -> PipelineJob:
    return read_record(out / JOB, PipelineJob, "not what chiasm run writes", "Delete it, and the same command resumes.")


def _minutes_in_words(minutes: float | None) -> str:
    return "all steps" if minutes is None else f"{minutes:g} minutes of training"


def _recipe_of_before(recipe: Recipe, out: Path, minutes: float | None) -> Recipe:
    """Take the steps that an earlier call fitted into its time."""
    path = out / RUN / "recipe.toml"
    if minutes is None or not (out / JOB).is_file() or not path.is_file():
        return recipe
    schedule = recipe.schedule.model_copy(update={"steps": read_recipe(path).schedule.steps})
    return recipe.model_copy(update={"schedule": schedule})


def _announce(recipe: Recipe, plan: Plan, split: Split, out: Path) -> Iterator[str]:
    """Describe each stage and about how long it takes; the recipe is that of one of several models."""
    cost, models = plan.expected or estimate_cost(recipe, plan), int(recipe.split.models)
    minutes, steps, done = cost.minutes * models, recipe.schedule.steps * models, _steps_done(out)
    tested = len(split.test) if models == 1 else len(split.train) + len(split.validation)
    parts = _forecast(plan, tested)
    several = f"{models} models of " if models > 1 else ""
    yield f"from {' + '.join(plan.sources)} to {plan.target}:"
    yield (
        f"  train {several}{title_of(recipe.method)}, {recipe.size}, {steps} steps{' in all' if several else ''}"
        f"{f', {done} of them done' if done else ''}: {in_minutes(minutes)}, {cost.memory_mb / 1024:.1f} GB"
    )
    whose = f"{amount(tested, 'case')}, each by the model that did not learn from it"
    yield f"  predict {whose if several else amount(tested, 'test case')}: {in_minutes(parts[0])}"
    yield f"  evaluate them and write {out / REPORT}: {in_minutes(parts[1])}"
    left = minutes * (1 - done / steps) + sum(parts)
    yield f"  meanwhile {out / RUN / (f'{PARTS}/1/' if several else '') / PAGE} shows how it goes"
    yield f"in all {in_minutes(left)} on this machine, if it does nothing else; Ctrl-C stops, the same command resumes"


def _forecast(plan: Plan, cases: int) -> tuple[float, float]:
    """Forecast the minutes of predicting and of evaluating as many cases."""
    voxels = math.prod(side / step for side, step in zip(plan.body_mm[1], plan.spacing_mm, strict=True))
    million = cases * voxels / 1e6
    return million * PREDICTING_SECONDS / 60, million * EVALUATING_SECONDS / 60


def _steps_done(out: Path) -> int:
    """Return the steps of the newest checkpoints of a training that was stopped; 0 without one."""

    def of_run(folder: Path) -> int:
        names = [path.stem.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*.toml")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    return sum(map(of_run, [out / RUN, *(out / RUN / PARTS).glob("*")]))
