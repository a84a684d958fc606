"""The command: each verb parses, calls one function and prints what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from chiasm import __version__
from chiasm.errors import ChiasmError, RecipeError, unknown
from chiasm.locks import check_output
from chiasm.options import (
    CohortOptions,
    PeopleOptions,
    ReadingOptions,
    RecipeOptions,
    Select,
    several,
    spread,
    with_records,
)
from chiasm.progress import count, follow, open_progress
from chiasm.storage import FULL, unwritable

if TYPE_CHECKING:
    from chiasm.cohorts.cases import Problem
    from chiasm.prediction.manifest import Container
    from chiasm.recipe import Registration

PARTIAL = 3  # some cases of a cohort failed, the others are done

app = typer.Typer(
    name="chiasm",
    help="Turn medical image volumes of one modality into another, and measure how well. Not for diagnostic use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

Data = Annotated[Path, typer.Argument(help="Folder or manifest of paired scans, in any layout that is recognised.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of what is drawn at random.")]
Size = Annotated[str, typer.Option("--size", help="Effort: tiny, small, large or paper.")]
Runner = Annotated[str, typer.Option("--runner", help="serial, processes, ray or slurm.")]
Allow = Annotated[
    list[str] | None, typer.Option("--allow", help="Take images that are marked so: synthetic, burned-in.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what other inputs or options left in the folder.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", help="A class of others whose code a model may run: --trust package.module:Class."),
]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, 32-true, bf16-mixed or 16-mixed.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"chiasm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn medical image volumes of one modality into another, and measure how well."""


@app.command()
def demo(
    out: Out = Path("chiasm-demo"),
    task: Annotated[str, typer.Option("--task", help="t1-t2 or ct-mr.")] = "t1-t2",
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: fewer cases, fewer steps.")] = False,
    seed: Seed = 0,
) -> None:
    """Simulate a cohort, train, predict, evaluate and write a report: offline, in minutes."""
    from chiasm.demo import run_demo

    with open_progress() as bar:
        report = run_demo(out, task=task, quick=quick, seed=seed, say=typer.echo, progress=follow(bar, "training"))
    typer.echo(f"\nreport: {report}")


@app.command()
@with_records
def inspect(
    data: Data,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    source: Annotated[list[str] | None, typer.Option("--source", help="Source modality.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Target modality.")] = None,
    allow: Allow = None,
) -> None:
    """Print what a folder holds: layout, cases, modalities, and what is wrong with each file."""
    from chiasm.preparation.inspection import inspect_folder

    sources = several(source)
    selection = found.selection(sources, reading, allow, people)
    seen = inspect_folder(data, sources, target, layout=found.layout, selection=selection)
    for line in seen.lines():
        typer.echo(line)
    _finish(seen.problems)


@app.command()
@with_records
def plan(
    data: Data,
    out: Out,
    asked: RecipeOptions,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
) -> None:
    """Choose how to train and write plan.toml: every choice with its reason, time and memory."""
    selection = found.selection(asked.source, reading, allow, people)
    recipe = asked.recipe(reading, selection)
    from chiasm.training.run import describe, plan_run

    run = plan_run(data, recipe, out, say=typer.echo, layout=found.layout, selection=selection)
    for line in describe(recipe, run.plan):
        typer.echo(line)
    _show_registered(out)
    _exit(run.problems)


@app.command()
@with_records
def train(
    data: Data,
    out: Out,
    asked: RecipeOptions,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
    devices: Annotated[int, typer.Option("--devices", help="How many GPUs, or CPU processes.")] = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
) -> None:
    """Train on a folder of paired scans; the same command again resumes."""
    place = [f"training.devices={devices}", f"training.accelerator={accelerator}", f"training.precision={precision}"]
    selection = found.selection(asked.source, reading, allow, people)
    recipe = asked.recipe(reading, selection, place)
    from chiasm.training.run import train as run_training

    with open_progress() as bar:
        run = run_training(
            data,
            recipe,
            out,
            say=typer.echo,
            progress=follow(bar, "training"),
            layout=found.layout,
            selection=selection,
        )
    _show_registered(out)
    _exit(run.problems)


@app.command()
@with_records
def complete(
    data: Data,
    out: Out,
    source: Annotated[list[str], typer.Option("--source", help="Source modality; several: --source t1 flair.")],
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    target: Annotated[str | None, typer.Option("--target", help="The modality that some cases lack.")] = None,
    utility: Annotated[
        str, typer.Option("--utility", help="What a later model makes, to measure the worth: a modality, auto, none.")
    ] = "auto",
    folds: Annotated[int, typer.Option("--folds", help="Folds of the utility, by subject.")] = 3,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds of the utility, from --seed on.")] = 1,
    method: Annotated[str, typer.Option("--method", help="Arm by name.")] = "li-cnn",
    size: Size = "small",
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps; the size decides by default.")] = None,
    seed: Seed = 0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set loss.norm=l1.")] = None,
    trust: Trust = None,
) -> None:
    """Make the modality that some cases lack, mark it as synthetic, and measure what it is worth to a later model."""
    check_output(out)
    asked = RecipeOptions(
        source, target, method=method, size=size, steps=steps, folds=folds, seed=seed, settings=settings
    )
    selection = found.selection((), reading, people=people)
    recipe = asked.recipe(reading, selection)
    from chiasm.studies.completion import complete as run_completion

    with open_progress() as bar:
        done = run_completion(
            data,
            recipe,
            out,
            utility=utility.lower(),
            seeds=seeds,
            layout=found.layout,
            selection=selection,
            trust=several(trust),
            say=typer.echo,
            progress=follow(bar, "training"),
        )
    for line in done.lines:
        typer.echo(line)
    _finish(done.problems)


@app.command()
@with_records
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or its model folder.")],
    inputs: Annotated[list[Path], typer.Argument(help="Files, folders or cohorts.")],
    out: Out,
    found: CohortOptions,
    reading: ReadingOptions,
    only: Annotated[str, typer.Option("--only", help="all, train, validation or test cases of the run.")] = "all",
    degrade: Annotated[bool, typer.Option("--degrade", help="Super-resolution: make thin slices thick first.")] = False,
    container: Annotated[str, typer.Option("--format", help="volume: NIfTI or MetaImage; dicom.")] = "volume",
    overwrite: Overwrite = False,
    runner: Runner = "serial",
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    trust: Trust = None,
) -> None:
    """Synthesise whole volumes and a reliability map for each, on the source's grid."""
    check_output(out)
    from chiasm.prediction.folders import predict as run_prediction

    with open_progress() as bar:
        made = run_prediction(
            run,
            inputs,
            out,
            only=only,
            layout=found.layout,
            series=several(found.series),
            select=several(found.select),
            reading=reading.reading(),
            container=_container(container),
            runner=runner,
            degrade=degrade,
            overwrite=overwrite,
            accelerator=accelerator,
            precision=precision,
            trust=several(trust),
            progress=count(bar, "predicting"),
        )
    kept = f", {len(made.kept)} were there already" if made.kept else ""
    typer.echo(f"{len(made.done)} cases predicted{kept}: {made.folder}")
    for note in made.notes:
        typer.echo(note)
    for case in made.remade:
        typer.echo(f"warning: case {case}: its files had changed or were gone, and were made again", err=True)
    for entry in (one for one in made.manifest.cases if one.case in (*made.done, *made.kept)):
        for sentence in entry.warnings:
            typer.echo(f"warning: case {entry.case}: {sentence}", err=True)
    _finish(made.problems)


@app.command()
@with_records
def serve(
    run: Annotated[Path, typer.Argument(help="Run folder, or its model folder.")],
    reading: ReadingOptions,
    dicom_port: Annotated[int | None, typer.Option("--dicom-port", help="Port of the DICOM node.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    title: Annotated[str, typer.Option("--aet", help="AE title of the DICOM node.")] = "CHIASM",
    allow: Annotated[list[str] | None, typer.Option("--allow", help="AE titles that may send.")] = None,
    send_to: Annotated[str | None, typer.Option("--send-to", help="Send results to AET@host:port.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to keep results in.")] = None,
    series: Annotated[list[str] | None, typer.Option("--series", help="Only series with these words.")] = None,
    quiet: Annotated[float, typer.Option("--quiet", help="Seconds without an image that end a series.")] = 5.0,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    trust: Trust = None,
) -> None:
    """Run a DICOM node: series come in by C-STORE, synthetic ones go out; Ctrl-C ends it."""
    if dicom_port is None:
        raise RecipeError("nothing to serve", reason="no-port", hint="Give --dicom-port.")
    if out is not None:
        check_output(out)
    from datetime import datetime

    from chiasm.serving.dicom_inbox import Limits
    from chiasm.serving.dicom_node import serve_dicom

    serve_dicom(
        run,
        port=dicom_port,
        host=host,
        title=title,
        allow=several(allow),
        send_to=send_to,
        out=out,
        series=" ".join(series) if series else None,
        limits=Limits(quiet_s=quiet),
        reading=reading.reading(),
        accelerator=accelerator,
        precision=precision,
        trust=several(trust),
        say=lambda line: typer.echo(f"{datetime.now():%H:%M:%S} {line}"),
    )


@app.command()
@with_records
def evaluate(
    predictions: Annotated[list[Path], typer.Argument(help="Folders written by chiasm predict, such as one per fold.")],
    reference: Annotated[Path, typer.Argument(help="The cohort that holds the real targets.")],
    out: Out,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    regions: Annotated[str, typer.Option("--regions", help="seg: the cohort's label maps; none.")] = "seg",
    convention: Annotated[str, typer.Option("--convention", help="Metric convention by name.")] = "chiasm",
    model: Annotated[Path | None, typer.Option("--model", help="Run or model, where it was moved.")] = None,
    register: Annotated[
        str | None, typer.Option("--register", help="none takes the real images as they lie; else as in training.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score predictions per case and region beside the naive baselines, and write a report."""
    check_output(out)
    from chiasm.reports.evaluation import evaluate as run_evaluation

    with open_progress() as bar:
        scored = run_evaluation(
            predictions,
            reference,
            out,
            regions=regions,
            convention=convention,
            model=model,
            layout=found.layout,
            selection=found.selection((), reading, people=people),
            register=None if register is None else _registration(register),
            overwrite=overwrite,
            progress=count(bar, "evaluating"),
        )
    for line in scored.table:
        typer.echo(line)
    typer.echo(f"report: {scored.report}")
    for note in scored.notes:
        typer.echo(note)
    _finish(scored.problems)


@app.command()
@with_records
def study(
    file: Annotated[Path, typer.Argument(help="STUDY.toml: data, source, target, arms, folds, seeds, ...")],
    out: Out,
    people: PeopleOptions,
    reading: ReadingOptions,
    select: Select = None,
    runner: Runner = "serial",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs and stop.")] = False,
    open_sealed: Annotated[bool, typer.Option("--open-sealed", help="Score the sealed test set, once.")] = False,
    trust: Trust = None,
) -> None:
    """Compare methods over folds and seeds: jobs that resume, statistics, a report."""
    if not dry_run:
        check_output(out)
    from chiasm.studies.study import run_study, tell_jobs

    settings = [f"data.select={json.dumps(select)}"] if select else []
    settings += [f"split.subject_pattern={json.dumps(people.subject_pattern)}"] if people.subject_pattern else []
    if dry_run:
        for line in tell_jobs(file, out, reading.reading(), settings):
            typer.echo(line)
        return
    with open_progress() as bar:
        done = run_study(
            file,
            out,
            runner=runner,
            open_sealed=open_sealed,
            reading=reading.reading(),
            trust=several(trust),
            settings=settings,
            say=typer.echo,
            progress=count(bar, "jobs"),
        )
    for comparison in done.comparisons:
        if comparison.primary:
            typer.echo(comparison.verdict)
    typer.echo(f"report: {done.report}")
    if done.failed:
        raise typer.Exit(PARTIAL)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="What chiasm study or chiasm evaluate wrote.")],
    cases: Annotated[int, typer.Option("--cases", help="At most as many cases get a page.")] = 24,
    whole: Annotated[bool, typer.Option("--whole", help="Keep volumes uncut and unthinned.")] = False,
) -> None:
    """Make the pages again from a study's or an evaluation's files."""
    check_output(out)
    from chiasm.studies.study import report as make_report

    typer.echo(f"report: {make_report(out, pages=cases, whole=whole)}")


@app.command()
def methods(size: Size = "small") -> None:
    """List every method: what it is, whose it is, how many weights, what it needs; and what is no method."""
    from chiasm.training.players import BESIDE, describe_methods

    for row in describe_methods(size):
        published = f" ({row.published:,} published)" if row.published else ""
        told = [row.paper, f"{row.weights:,} weights{published}", *([f"needs {row.needs}"] if row.needs else [])]
        typer.echo(f"{row.name:12} {row.words}\n{'':12} {'; '.join(told)}")
    for name, words in BESIDE.items():
        typer.echo(f"{name}: {words}")


@app.command()
@with_records
def mumap(
    ct: Annotated[Path, typer.Argument(help="CT in Hounsfield units, real or synthetic.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .nii.gz, .nii or .mha.")],
    reading: ReadingOptions,
    kvp: Annotated[int, typer.Option("--kvp", help="Tube voltage: 80, 100, 110, 120, 130 or 140.")] = 120,
    like: Annotated[Path | None, typer.Option("--like", help="PET volume whose grid the map takes.")] = None,
    spacing: Annotated[float | None, typer.Option("--spacing", help="Or: voxel size in mm, over the CT's box.")] = None,
    fwhm: Annotated[float, typer.Option("--fwhm", help="Resolution of PET in mm; 0 does not smooth.")] = 5.0,
    series: Annotated[str | None, typer.Option("--series", help="DICOM series of the CT: number or words.")] = None,
) -> None:
    """Turn a CT into linear attenuation coefficients at 511 keV, in 1/cm, for PET."""
    from chiasm.attenuation import mumap as make_mumap

    made = make_mumap(
        ct, out, kvp=kvp, like=like, spacing_mm=spacing, fwhm_mm=fwhm, reading=reading.reading(), series=series
    )
    for sentence in made.warnings:
        typer.echo(f"warning: {sentence}", err=True)
    typer.echo(f"1/cm at 511 keV, {kvp} kVp, {fwhm:g} mm: {out}")


@app.command()
def phantom(
    out: Out,
    subjects: Annotated[int, typer.Option("--subjects", help="How many.")] = 8,
    seed: Seed = 0,
    anatomy: Annotated[Path | None, typer.Option("--anatomy", help="Folder of 12-tissue label maps.")] = None,
    spacing: Annotated[float, typer.Option("--spacing", help="Voxel size in mm.")] = 2.0,
    difficulty: Annotated[str, typer.Option("--difficulty", help="easy, standard or hard.")] = "standard",
    layout: Annotated[str, typer.Option("--layout", help="brats, bids or synthrad.")] = "brats",
    misregistration: Annotated[
        float | None, typer.Option("--misregistration", help="How far T2 lies from T1, mm; the difficulty decides.")
    ] = None,
    movement: Annotated[
        str, typer.Option("--movement", help="elastic, rigid, or held: the same patients, had they not moved.")
    ] = "elastic",
    overwrite: Overwrite = False,
) -> None:
    """Simulate a cohort of patients with a known truth."""
    check_output(out)
    from chiasm.simulation.phantom import write_cohort

    with open_progress() as bar:
        write_cohort(
            out,
            subjects=subjects,
            seed=seed,
            anatomy=anatomy,
            spacing_mm=spacing,
            difficulty=difficulty,
            layout=layout,
            misregistration_mm=misregistration,
            movement=movement,
            overwrite=overwrite,
            progress=count(bar, "simulating"),
        )
    typer.echo(f"{subjects} subjects: {out}")


@app.command()
@with_records
def register(
    moving: Annotated[Path, typer.Argument(help="The volume to bring.")],
    fixed: Annotated[Path, typer.Argument(help="The volume of the same patient that stays.")],
    out: Out,
    reading: ReadingOptions,
    kind: Annotated[str, typer.Option("--kind", help="rigid, affine or demons (rigid, then deformable).")] = "demons",
    labels: Annotated[list[Path] | None, typer.Option("--labels", help="Label map to bring along.")] = None,
    series: Annotated[
        list[str] | None, typer.Option("--series", help="DICOM series: --series moving=t2 fixed=3.")
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Bring a volume to the grid of another of the same patient: matrix, field, and a page to check it by."""
    check_output(out)
    from typing import get_args

    from chiasm.errors import unknown
    from chiasm.registration.alignment import Kind
    from chiasm.reports.registration import register as run_registration

    if kind not in get_args(Kind):
        raise unknown("kind of registration", kind, get_args(Kind))

    with open_progress() as bar:
        made = run_registration(
            moving,
            fixed,
            out,
            kind=cast("Kind", kind),
            labels=labels or (),
            seed=seed,
            reading=reading.reading(),
            series=several(series),
            overwrite=overwrite,
            progress=count(bar, "registering"),
        )
    before, *_, after = made.alignment.information
    typer.echo(f"mutual information {before:.3f} before, {after:.3f} after; look at {made.report}")
    if after <= before:
        typer.echo("warning: the images do not tell more of each other than before: look closely", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake that a user can mend ends in one sentence and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = (["--debug"] if debug else []) + [word for word in given if word != "--debug"]
    try:
        app(args=spread(given), prog_name="chiasm")
    except ChiasmError as error:
        if debug:
            raise
        typer.echo(f"chiasm: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:  # a disk that is full or gone, wherever it shows
        if debug:
            raise
        place = Path(error.filename or Path.cwd())
        full = unwritable(place, error) if error.errno in FULL else None
        typer.echo(f"chiasm: {full or f'{place}: {error.strerror or error}.'}", err=True)
        raise SystemExit(2) from None
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        typer.echo("stopped; the same command goes on from here", err=True)
        raise SystemExit(code) from None


def _registration(name: str) -> Registration:
    """Read what a registration is called on the command line."""
    from typing import get_args

    from chiasm.recipe import Registration

    if name not in get_args(Registration):
        raise unknown("registration", name, get_args(Registration))
    return cast("Registration", name)


def _show_registered(run: Path) -> None:
    """Make the page of a run's registered pairs, where it has any."""
    if (run / "registered").is_dir():
        from chiasm.reports.registration import report_registered

        typer.echo(f"registered pairs, the worst first: {report_registered(run / 'registered')}")


def _container(name: str) -> Container:
    """Read what a file format is called on the command line."""
    if name not in ("volume", "dicom"):
        raise unknown("format", name, ["volume", "dicom"])
    return "dicom" if name == "dicom" else "volume"


def _finish(problems: Sequence[Problem]) -> None:
    """Name what was left out, and exit 3 if anything was."""
    for problem in problems:
        typer.echo(problem.line, err=True)
    _exit(problems)


def _exit(problems: Sequence[Problem]) -> None:
    """Exit 3 if anything was left out."""
    if problems:
        raise typer.Exit(PARTIAL)


if __name__ == "__main__":
    main()
