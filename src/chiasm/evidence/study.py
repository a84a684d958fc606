"""`chiasm study`: methods x folds x seeds as independent jobs that are recognised when they are done.

A job is "run this recipe on this fold with this seed in this folder".  Its
folder is named by a hash of what it depends on: recipe, data, code version.
Arms of one fold and seed branch from one shared warm-up, so that they meet the
same weights and batches and can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from chiasm import __version__
from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.layouts import find_cohort, select_cases
from chiasm.errors import ChiasmError, CohortError, RecipeError
from chiasm.evidence.evaluation import Row, read_evaluation, write_evaluation
from chiasm.evidence.folders import score_folder
from chiasm.evidence.report import write_report
from chiasm.evidence.runners import find_runner
from chiasm.evidence.statistics import Comparison, compare_methods, write_statistics
from chiasm.prediction.folders import predict
from chiasm.recipe import ARMS, Recipe, Section, make_recipe
from chiasm.storage import read_json, read_toml, sha256_of, write_json
from chiasm.training.run import train

WARM_UP = "A1"  # the arm whose beginning all share: the generator alone
NAIVE_FROM = 0  # naive baselines are scored once a fold and seed, with the first arm


class Primary(Section):
    """The one comparison that was declared before the study ran."""

    arm: str
    against: str
    metric: str = "mae"
    region: str = "mask"


class Study(Section):
    """What a study file says."""

    data: Path
    sources: Annotated[tuple[str, ...], Field(min_length=1, alias="source")]
    target: str
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    folds: Annotated[int, Field(ge=2)] = 5
    only_folds: tuple[int, ...] | None = None
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    size: str = "small"
    steps: Annotated[int, Field(ge=1)] | None = None
    warmup: Literal["shared", "own"] = "shared"
    threads: Annotated[int, Field(ge=1)] = 1
    settings: Annotated[tuple[str, ...], Field(alias="set")] = ()
    primary: Primary | None = None
    layout: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in (self.arms, self.seeds):
            if len(set(name)) != len(name):
                raise ValueError(f"something stands twice: {', '.join(map(str, name))}")
        if self.primary is not None:
            for arm in (self.primary.arm, self.primary.against):
                if arm not in self.arms:
                    raise ValueError(f"the primary comparison names {arm!r}, which is none of the arms")
        return self


@dataclass(frozen=True)
class Job:
    """One training with its prediction and scores, or one warm-up.

    Attributes:
        key: Hash of everything it depends on; the name of its folder.
        kind: What it does.
        arm: Of the method table.
        fold: Which.
        seed: Of weights and batches.
        recipe: Resolved.
        folder: Where it works.
        warm: Folder of the warm-up that it branches from, or None.
        first: Whether it scores the naive baselines too.
    """

    key: str
    kind: Literal["warm-up", "arm"]
    arm: str
    fold: int
    seed: int
    recipe: Recipe
    folder: Path
    warm: Path | None
    first: bool

    @property
    def name(self) -> str:
        """What to call it on the screen."""
        return f"{'warm-up' if self.kind == 'warm-up' else self.arm} fold {self.fold} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it left its mark; a killed job did not."""
        return (self.folder / "done.json").is_file()


@dataclass(frozen=True)
class Outcome:
    """What came of a job: its name, and what went wrong, or None."""

    key: str
    name: str
    error: str | None


def read_study(path: Path) -> Study:
    """Read a study file; a relative `data` is looked up beside the file.

    Raises:
        RunError: If the file is missing or not TOML.
        RecipeError: If a setting is unknown, missing or impossible.
    """
    try:
        study = Study.model_validate(read_toml(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "study"
        raise RecipeError(
            f"{where}: {first['msg'].removeprefix('Value error, ')}", path=path, reason="study"
        ) from error
    return study.model_copy(update={"data": (path.parent / study.data).resolve()})


def list_jobs(study: Study, out: Path, cohort: Cohort) -> list[Job]:
    """List a study's jobs, warm-ups first; everything that can be refused is refused here.

    Raises:
        RecipeError: If an arm, size or setting is unknown.
        CohortError: If there are fewer subjects than folds, or no case has the primary region.
    """
    subjects = {case.subject for case in cohort.cases}
    if len(subjects) < study.folds:
        raise CohortError(
            "has fewer subjects than the study has folds",
            path=study.data,
            reason="folds",
            found=len(subjects),
            expected=f"at least {study.folds}",
        )
    whole = {"mask", "image", "healthy", "edges", "lesion-edge"}
    if study.primary is not None and study.primary.region not in whole | set(cohort.regions):
        raise CohortError(
            f"has no region {study.primary.region!r}, which the primary comparison is about",
            path=study.data,
            reason="no-region",
            expected=", ".join(sorted(whole | set(cohort.regions))),
        )
    content = fingerprint(cohort, (*study.sources, study.target))
    folds = range(study.folds) if study.only_folds is None else study.only_folds
    warm_ups: list[Job] = []
    arms: list[Job] = []
    for fold in folds:
        for seed in study.seeds:
            warm = None
            if study.warmup == "shared":
                warm_up = _job(study, out, "warm-up", WARM_UP, fold, seed, content, None, False)
                warm = warm_up.folder
                warm_ups.append(warm_up)
            arms += [
                _job(study, out, "arm", arm, fold, seed, content, warm, index == NAIVE_FROM)
                for index, arm in enumerate(study.arms)
            ]
    return warm_ups + arms


def _job(
    study: Study,
    out: Path,
    kind: Literal["warm-up", "arm"],
    arm: str,
    fold: int,
    seed: int,
    content: str,
    warm: Path | None,
    first: bool,
) -> Job:
    changes: dict[str, object] = {
        "data.sources": study.sources,
        "data.target": study.target,
        "split.folds": study.folds,
        "split.fold": fold,
        "training.seed": seed,
    }
    if study.steps is not None:
        changes["schedule.steps"] = study.steps
    recipe = make_recipe(arm, study.size, changes, study.settings)
    depends = [__version__, kind, content, recipe.model_dump(mode="json"), study.threads, warm and warm.name, first]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return Job(key, kind, recipe.method, fold, seed, recipe, out / "jobs" / key, warm, first)


def fingerprint(cohort: Cohort, names: Sequence[str]) -> str:
    """Hash the files that a study reads, by content."""
    digest = hashlib.sha256()
    for case in sorted(cohort.cases, key=lambda case: case.id):
        files = [*(case.images[name] for name in names), case.mask, case.labels]
        parts = [case.id, case.subject, *(sha256_of(file) if file else "-" for file in files)]
        digest.update("\0".join(parts).encode())
    return digest.hexdigest()


def work(job: Job, *, data: Path, out: Path, threads: int, layout: str | None) -> Outcome:
    """Do a job, or recognise that it was done; what goes wrong is told, not raised."""
    import torch

    if job.is_done:
        return Outcome(job.key, job.name, None)
    before, start = torch.get_num_threads(), time.monotonic()
    torch.set_num_threads(threads)
    try:
        if job.warm is not None:
            _share_plan(job.warm, job.folder)
        alone = round(job.recipe.schedule.generator_alone * job.recipe.schedule.steps)
        train(
            data,
            job.recipe,
            job.folder,
            say=_silence,
            layout=layout,
            cache=out / "cache",
            start=job.warm,
            until=alone if job.kind == "warm-up" else None,
        )
        if job.kind == "arm":
            predict(job.folder, [data], job.folder / "predictions", only="test", layout=layout)
            rows, problems = score_folder(job.folder / "predictions", data, layout=layout, naive=job.first)
            if problems:
                return Outcome(job.key, job.name, problems[0].message)
            write_evaluation(job.folder, rows)
        seconds = time.monotonic() - start
        write_json(
            job.folder / "done.json",
            {"name": job.name, "version": __version__, "steps": _steps(job), "seconds": round(seconds, 1)},
        )
    except ChiasmError as error:
        return Outcome(job.key, job.name, str(error))
    finally:
        torch.set_num_threads(before)
    return Outcome(job.key, job.name, None)


def _share_plan(warm: Path, folder: Path) -> None:
    """Start from the warm-up's plan: same fold, same data, so nothing is measured twice."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "plan.toml").exists():
        (folder / "plan.toml").write_bytes((warm / "plan.toml").read_bytes())


def _silence(line: str) -> None:
    """Say nothing: a study tells of its jobs, not of their insides."""
    del line


@dataclass(frozen=True)
class Done:
    """What a study left behind.

    Attributes:
        rows: Of all jobs.
        comparisons: The primary one first.
        failed: Jobs that failed.
        report: The page.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    failed: tuple[Outcome, ...]
    report: Path


def run_study(
    path: Path,
    out: Path,
    *,
    runner: str = "serial",
    say: Callable[[str], None] = print,
    progress: Callable[[int, int, str], None] | None = None,
) -> Done:
    """Work a study off, skip what is done, and write its evidence.

    Args:
        path: The study file.
        out: Folder for jobs, cache, `evaluation.csv`, `statistics.csv` and `report.html`.
        runner: A name of `runners.RUNNERS`.
        say: Called with lines for the user.
        progress: Called with jobs done, all jobs, the last one's name.

    Raises:
        ChiasmError: If the study cannot run at all; a job that fails is named in the result.
    """
    study, run = read_study(path), find_runner(runner)
    cohort = select_cases(find_cohort(study.data, layout=study.layout), study.sources, study.target)
    jobs = list_jobs(study, out, cohort)
    done = sum(job.is_done for job in jobs)
    say(f"{len(jobs)} jobs, {done} of them done already")
    do = partial(work, data=study.data, out=out, threads=study.threads, layout=study.layout)
    failed: dict[str, Outcome] = {}
    finished = done
    for kind in ("warm-up", "arm"):
        ready = [job for job in jobs if job.kind == kind and not job.is_done]
        lost = [job for job in ready if job.warm is not None and job.warm.name in failed]
        failed |= {job.key: Outcome(job.key, job.name, "its warm-up failed") for job in lost}
        for outcome in run([job for job in ready if job not in lost], do, out):
            finished += 1
            if outcome.error is not None:
                failed[outcome.key] = outcome
                say(f"failed: {outcome.name}: {outcome.error}")
            if progress is not None:
                progress(finished, len(jobs), outcome.name)
    rows = collect(jobs)
    if not rows:
        raise CohortError("no job of the study could be finished", path=out, reason="no-jobs")
    write_evaluation(out, rows)
    comparisons = judge(study, rows, cohort)
    write_statistics(out / "statistics.csv", comparisons)
    write_json(out / "study.json", study.model_dump(mode="json", by_alias=True))
    naive = [name for name in dict.fromkeys(row.method for row in rows) if name not in ARMS]
    primary = study.primary
    report = write_report(
        out / "report.html",
        title=f"Study: {' + '.join(study.sources)} to {study.target}",
        asked=f"{primary.metric} in {primary.region}: {primary.arm} against {primary.against}" if primary else "",
        rows=rows,
        facts={
            "Comparisons": {f"{number}": one.verdict for number, one in enumerate(comparisons, start=1)},
            "Study": {name: str(value) for name, value in study.model_dump(mode="json", by_alias=True).items()},
        },
        warnings=[f"failed: {outcome.name}: {outcome.error}" for outcome in failed.values()],
        method=primary.arm if primary else make_recipe(study.arms[0]).method,
        naive=naive,
    )
    return Done(tuple(rows), tuple(comparisons), tuple(failed.values()), report)


def tell_jobs(path: Path, out: Path) -> list[str]:
    """List a study's jobs in words, with what is done and how long the rest may take.

    Raises:
        ChiasmError: If the study cannot run at all.
    """
    study = read_study(path)
    cohort = select_cases(find_cohort(study.data, layout=study.layout), study.sources, study.target)
    jobs = list_jobs(study, out, cohort)
    lines = [f"{'done' if job.is_done else 'to do':6} {job.key} {job.name}, {_steps(job)} steps" for job in jobs]
    left = sum(_steps(job) for job in jobs if not job.is_done)
    told = f"{len(jobs)} jobs, {sum(job.is_done for job in jobs)} done, {left} steps to do"
    if spent := [read_json(job.folder / "done.json") for job in jobs if job.is_done]:
        speed = sum(one["seconds"] for one in spent) / max(1, sum(one["steps"] for one in spent))
        told += f", about {left * speed / 60:.0f} min of one process"
    return [*lines, told]


def _steps(job: Job) -> int:
    """Count the steps that are the job's own: a warm-up's are not done again by its arms."""
    schedule = job.recipe.schedule
    alone = round(schedule.generator_alone * schedule.steps)
    if job.kind == "warm-up":
        return alone
    return schedule.steps - (alone if job.warm is not None else 0)


def collect(jobs: Sequence[Job]) -> list[Row]:
    """Gather the rows of all finished arms."""
    return [row for job in jobs if job.kind == "arm" and job.is_done for row in read_evaluation(job.folder)]


def judge(study: Study, rows: Sequence[Row], cohort: Cohort) -> list[Comparison]:
    """Compare every arm with the first, and the declared pair; regions by lesion and health."""
    arms = [arm for arm in dict.fromkeys(row.method for row in rows) if arm in ARMS]
    primary = study.primary
    anchor = primary.against if primary else arms[0]
    pairs = [(arm, anchor) for arm in arms if arm != anchor]
    if primary:
        pairs = [(primary.arm, primary.against), *(pair for pair in pairs if pair[0] != primary.arm)]
    regions = ["mask", "healthy", *cohort.regions, "edges"]
    seen = {(row.region, row.metric) for row in rows}
    return compare_methods(
        rows,
        pairs,
        metrics=[m for m in ("mae", "ssim", "psnr") if any(metric == m for _, metric in seen)],
        regions=[region for region in regions if (region, "mae") in seen],
        primary=(primary.arm, primary.against, primary.region, primary.metric) if primary else None,
        subjects={case.id: case.subject for case in cohort.cases},
    )
