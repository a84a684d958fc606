"""The command: each verb parses, calls one function and prints what came of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from chiasm import __version__
from chiasm.errors import ChiasmError, RecipeError, unknown
from chiasm.progress import count, follow, open_progress
from chiasm.storage import refuse_busy

if TYPE_CHECKING:
    from chiasm.cohorts.cases import Problem
    from chiasm.cohorts.dicom_folders import Selection
    from chiasm.prediction.manifest import Container
    from chiasm.recipe import Recipe, Registration

PARTIAL = 3  # some cases of a cohort failed, the others are done
MANY = ("--source", "--set", "--regions", "--series", "--allow")  # options that take several values in a row

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
Sources = Annotated[list[str], typer.Option("--source", help="Source modality; several: --source t1 flair.")]
Target = Annotated[
    str | None, typer.Option("--target", help="Target modality; for super-resolution the source, unless you say.")
]
Task = Annotated[str, typer.Option("--task", help="synthesis, or super-resolution: thick slices become thin.")]
Factor = Annotated[int | None, typer.Option("--factor", help="Thin slices in a thick one (super-resolution).")]
Axis = Annotated[str | None, typer.Option("--axis", help="Across the thick slices: K axial, J coronal, I sagittal.")]
Register = Annotated[
    str, typer.Option("--register", help="Bring other images to the first source: none, rigid, affine or demons.")
]
Method = Annotated[str, typer.Option("--method", help="Arm by name: A7 (dual-attention), A1 (l2), A8 (literal), ...")]
Size = Annotated[str, typer.Option("--size", help="Effort: tiny, small, large or paper.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Training steps; the size decides by default.")]
Fold = Annotated[int, typer.Option("--fold", help="Which fold is tested.")]
Folds = Annotated[int, typer.Option("--folds", help="Folds by subject; 1 keeps no test set.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of weights and batches.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set loss.norm=l1.")]
Runner = Annotated[str, typer.Option("--runner", help="serial, processes, ray or slurm.")]
Layout = Annotated[str | None, typer.Option("--layout", help="Layout by name, where a folder fits several.")]
Series = Annotated[
    list[str] | None, typer.Option("--series", help="DICOM series by number or words: --series t1=5 t2=SPACE.")
]
Allow = Annotated[
    list[str] | None, typer.Option("--allow", help="Take images that are marked so: synthetic, burned-in.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what other inputs or options left in the folder.")
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
def inspect(
    data: Data,
    source: Annotated[list[str] | None, typer.Option("--source", help="Source modality.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Target modality.")] = None,
    layout: Layout = None,
    series: Series = None,
    allow: Allow = None,
) -> None:
    """Print what a folder holds: layout, cases, modalities, and what is wrong with each file."""
    from chiasm.cohorts.inspection import inspect_folder

    found = inspect_folder(
        data, _several(source), target, layout=layout, selection=_selection(series, allow, _several(source))
    )
    for line in found.lines():
        typer.echo(line)
    _finish(found.problems)


@app.command()
def plan(
    data: Data,
    out: Out,
    source: Sources,
    target: Target = None,
    task: Task = "synthesis",
    factor: Factor = None,
    axis: Axis = None,
    register: Register = "none",
    method: Method = "A7",
    size: Size = "small",
    steps: Steps = None,
    fold: Fold = 0,
    folds: Folds = 5,
    seed: Seed = 0,
    settings: Settings = None,
    layout: Layout = None,
    series: Series = None,
    allow: Allow = None,
) -> None:
    """Choose how to train and write plan.toml: every choice with its reason, time and memory."""
    settings = [f"data.registration={register}", *_several(settings)]
    recipe = _recipe(source, target, (task, factor, axis), method, size, steps, fold, folds, seed, settings)
    from chiasm.training.run import describe, plan_run

    run = plan_run(data, recipe, out, say=typer.echo, layout=layout, selection=_selection(series, allow))
    for line in describe(recipe, run.plan):
        typer.echo(line)
    _show_registered(out)
    _exit(run.problems)


@app.command()
def train(
    data: Data,
    out: Out,
    source: Sources,
    target: Target = None,
    task: Task = "synthesis",
    factor: Factor = None,
    axis: Axis = None,
    register: Register = "none",
    method: Method = "A7",
    size: Size = "small",
    steps: Steps = None,
    fold: Fold = 0,
    folds: Folds = 5,
    seed: Seed = 0,
    settings: Settings = None,
    layout: Layout = None,
    series: Series = None,
    allow: Allow = None,
    devices: Annotated[int, typer.Option("--devices", help="How many GPUs, or CPU processes.")] = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
) -> None:
    """Train on a folder of paired scans; the same command again resumes."""
    place = [f"training.devices={devices}", f"training.accelerator={accelerator}", f"training.precision={precision}"]
    settings = [f"data.registration={register}", *place, *_several(settings)]
    recipe = _recipe(source, target, (task, factor, axis), method, size, steps, fold, folds, seed, settings)
    from chiasm.training.run import train as run_training

    with open_progress() as bar:
        run = run_training(
            data,
            recipe,
            out,
            say=typer.echo,
            progress=follow(bar, "training"),
            layout=layout,
            selection=_selection(series, allow),
        )
    _show_registered(out)
    _exit(run.problems)


@app.command()
def complete(
    data: Data,
    out: Out,
    source: Sources,
    target: Target = None,
    utility: Annotated[
        str, typer.Option("--utility", help="What a later model makes, to measure the worth: a modality, auto, none.")
    ] = "auto",
    folds: Annotated[int, typer.Option("--folds", help="Folds of the utility, by subject.")] = 3,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds of the utility, from --seed on.")] = 1,
    method: Method = "li-cnn",
    size: Size = "small",
    steps: Steps = None,
    seed: Seed = 0,
    settings: Settings = None,
    layout: Layout = None,
    series: Series = None,
) -> None:
    """Make the modality that some cases lack, mark it as synthetic, and measure what it is worth to a later model."""
    refuse_busy(out)
    recipe = _recipe(source, target, ("synthesis", None, None), method, size, steps, 0, folds, seed, settings)
    from chiasm.evidence.completing import complete as run_completion

    with open_progress() as bar:
        done = run_completion(
            data,
            recipe,
            out,
            utility=utility.lower(),
            seeds=seeds,
            layout=layout,
            selection=_selection(series),
            say=typer.echo,
            progress=follow(bar, "training"),
        )
    for line in done.lines:
        typer.echo(line)
    _finish(done.problems)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or its model folder.")],
    inputs: Annotated[list[Path], typer.Argument(help="Files, folders or cohorts.")],
    out: Out,
    only: Annotated[str, typer.Option("--only", help="all, train, validation or test cases of the run.")] = "all",
    degrade: Annotated[bool, typer.Option("--degrade", help="Super-resolution: make thin slices thick first.")] = False,
    layout: Layout = None,
    series: Series = None,
    resample_tilt: Annotated[bool, typer.Option("--resample-tilt", help="Resample tilted DICOM slices.")] = False,
    container: Annotated[str, typer.Option("--format", help="volume: NIfTI or MetaImage; dicom.")] = "volume",
    overwrite: Overwrite = False,
    runner: Runner = "serial",
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
) -> None:
    """Synthesise whole volumes and a reliability map for each, on the source's grid."""
    refuse_busy(out)
    from chiasm.prediction.folders import predict as run_prediction

    with open_progress() as bar:
        made = run_prediction(
            run,
            inputs,
            out,
            only=only,
            layout=layout,
            series=_several(series),
            resample_tilt=resample_tilt,
            container=_container(container),
            runner=runner,
            degrade=degrade,
            overwrite=overwrite,
            accelerator=accelerator,
            precision=precision,
            progress=count(bar, "predicting"),
        )
    kept = f", {len(made.kept)} were there already" if made.kept else ""
    typer.echo(f"{len(made.done)} cases predicted{kept}: {made.folder}")
    for case in made.remade:
        typer.echo(f"warning: case {case}: its files had changed or were gone, and were made again", err=True)
    for entry in (one for one in made.manifest.cases if one.case in (*made.done, *made.kept)):
        for sentence in entry.warnings:
            typer.echo(f"warning: case {entry.case}: {sentence}", err=True)
    _finish(made.problems)


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(help="Run folder, or its model folder.")],
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
) -> None:
    """Run a DICOM node: series come in by C-STORE, synthetic ones go out; Ctrl-C ends it."""
    if dicom_port is None:
        raise RecipeError("nothing to serve", reason="no-port", hint="Give --dicom-port.")
    if out is not None:
        refuse_busy(out)
    from datetime import datetime

    from chiasm.pages.dicom_inbox import Limits
    from chiasm.pages.dicom_node import serve_dicom

    serve_dicom(
        run,
        port=dicom_port,
        host=host,
        title=title,
        allow=_several(allow),
        send_to=send_to,
        out=out,
        series=" ".join(series) if series else None,
        limits=Limits(quiet_s=quiet),
        accelerator=accelerator,
        precision=precision,
        say=lambda line: typer.echo(f"{datetime.now():%H:%M:%S} {line}"),
    )


@app.command()
def evaluate(
    predictions: Annotated[list[Path], typer.Argument(help="Folders written by chiasm predict, such as one per fold.")],
    reference: Annotated[Path, typer.Argument(help="The cohort that holds the real targets.")],
    out: Out,
    regions: Annotated[str, typer.Option("--regions", help="seg: the cohort's label maps; none.")] = "seg",
    convention: Annotated[str, typer.Option("--convention", help="Metric convention by name.")] = "chiasm",
    model: Annotated[Path | None, typer.Option("--model", help="Run or model, where it was moved.")] = None,
    layout: Layout = None,
    register: Annotated[
        str | None, typer.Option("--register", help="none takes the real images as they lie; else as in training.")
    ] = None,
) -> None:
    """Score predictions per case and region beside the naive baselines, and write a report."""
    refuse_busy(out)
    from chiasm.evidence.reporting import evaluate as run_evaluation

    with open_progress() as bar:
        scored = run_evaluation(
            predictions,
            reference,
            out,
            regions=regions,
            convention=convention,
            model=model,
            layout=layout,
            register=None if register is None else _registration(register),
            progress=count(bar, "evaluating"),
        )
    for line in scored.table:
        typer.echo(line)
    typer.echo(f"report: {scored.report}")
    _finish(scored.problems)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="STUDY.toml: data, source, target, arms, folds, seeds, ...")],
    out: Out,
    runner: Runner = "serial",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs and stop.")] = False,
    open_sealed: Annotated[bool, typer.Option("--open-sealed", help="Score the sealed test set, once.")] = False,
) -> None:
    """Compare methods over folds and seeds: jobs that resume, statistics, a report."""
    if not dry_run:
        refuse_busy(out)
    from chiasm.evidence.study import run_study, tell_jobs

    if dry_run:
        for line in tell_jobs(file, out):
            typer.echo(line)
        return
    with open_progress() as bar:
        done = run_study(file, out, runner=runner, open_sealed=open_sealed, say=typer.echo, progress=count(bar, "jobs"))
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
    refuse_busy(out)
    from chiasm.evidence.study import report as make_report

    typer.echo(f"report: {make_report(out, pages=cases, whole=whole)}")


@app.command()
def methods(size: Size = "small") -> None:
    """List every method: what it is, whose it is, how many weights, what it needs; and what is no method."""
    from chiasm.training.methods import BESIDE, describe_methods

    for row in describe_methods(size):
        published = f" ({row.published:,} published)" if row.published else ""
        told = [row.paper, f"{row.weights:,} weights{published}", *([f"needs {row.needs}"] if row.needs else [])]
        typer.echo(f"{row.name:12} {row.words}\n{'':12} {'; '.join(told)}")
    for name, words in BESIDE.items():
        typer.echo(f"{name}: {words}")


@app.command()
def mumap(
    ct: Annotated[Path, typer.Argument(help="CT in Hounsfield units, real or synthetic.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .nii.gz, .nii or .mha.")],
    kvp: Annotated[int, typer.Option("--kvp", help="Tube voltage: 80, 100, 110, 120, 130 or 140.")] = 120,
    like: Annotated[Path | None, typer.Option("--like", help="PET volume whose grid the map takes.")] = None,
    spacing: Annotated[float | None, typer.Option("--spacing", help="Or: voxel size in mm, over the CT's box.")] = None,
    fwhm: Annotated[float, typer.Option("--fwhm", help="Resolution of PET in mm; 0 does not smooth.")] = 5.0,
) -> None:
    """Turn a CT into linear attenuation coefficients at 511 keV, in 1/cm, for PET."""
    from chiasm.cohorts.attenuation import mumap as make_mumap

    made = make_mumap(ct, out, kvp=kvp, like=like, spacing_mm=spacing, fwhm_mm=fwhm)
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
    refuse_busy(out)
    from chiasm.cohorts.phantom import write_cohort

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
def register(
    moving: Annotated[Path, typer.Argument(help="The volume to bring.")],
    fixed: Annotated[Path, typer.Argument(help="The volume of the same patient that stays.")],
    out: Out,
    kind: Annotated[str, typer.Option("--kind", help="rigid, affine or demons (rigid, then deformable).")] = "demons",
    labels: Annotated[list[Path] | None, typer.Option("--labels", help="Label map to bring along.")] = None,
    seed: Seed = 0,
) -> None:
    """Bring a volume to the grid of another of the same patient: matrix, field, and a page to check it by."""
    refuse_busy(out)
    from typing import get_args

    from chiasm.cohorts.registration import Kind
    from chiasm.errors import unknown
    from chiasm.evidence.aligning import register as run_registration

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
        app(args=_spread(given), prog_name="chiasm")
    except ChiasmError as error:
        if debug:
            raise
        typer.echo(f"chiasm: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:  # a disk that is full or gone, wherever it shows
        if debug:
            raise
        typer.echo(f"chiasm: {error.filename or 'the disk'}: {error.strerror or error}.", err=True)
        raise SystemExit(2) from None
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        typer.echo("stopped; the same command goes on from here", err=True)
        raise SystemExit(code) from None


def _spread(words: Sequence[str]) -> list[str]:
    """Turn `--source t1 flair` into `--source t1 --source flair`."""
    spread: list[str] = []
    option: str | None = None
    for word in words:
        if word.startswith("-"):
            option = word if word in MANY else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(word)
    return spread


def _selection(
    series: Iterable[str] | None, allow: Iterable[str] | None = None, sources: Sequence[str] = ()
) -> Selection:
    from chiasm.cohorts.dicom_folders import Selection, parse_rules
    from chiasm.cohorts.manifests import MARKS

    if strange := set(_several(allow)) - set(MARKS):
        raise unknown("mark", min(strange), MARKS)
    return Selection(series=parse_rules(_several(series), sources), allow=_several(allow))


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
        from chiasm.evidence.aligning import report_registered

        typer.echo(f"registered pairs, the worst first: {report_registered(run / 'registered')}")


def _container(name: str) -> Container:
    """Read what a file format is called on the command line."""
    if name not in ("volume", "dicom"):
        raise unknown("format", name, ["volume", "dicom"])
    return "dicom" if name == "dicom" else "volume"


def _several(values: Iterable[str] | None) -> list[str]:
    return list(values or [])


def _recipe(
    source: Sequence[str],
    target: str | None,
    thick: tuple[str, int | None, str | None],
    method: str,
    size: str,
    steps: int | None,
    fold: int,
    folds: int,
    seed: int,
    settings: Sequence[str] | None,
) -> Recipe:
    from chiasm.recipe import make_recipe

    sources = tuple(name for text in source for name in text.lower().split(",") if name)
    task, factor, axis = thick
    if target is None and (task != "super-resolution" or len(sources) != 1):
        raise RecipeError("--target is missing", reason="target", hint="Say what is to come out: --target t2.")
    if task == "synthesis" and (factor is not None or axis is not None):
        raise RecipeError("--factor and --axis are for --task super-resolution", reason="task")
    changes: dict[str, object] = {
        "data.sources": sources,
        "data.target": sources[0] if target is None else target.lower(),
        "data.task": task,
        "split.fold": fold,
        "split.folds": folds,
        "training.seed": seed,
    }
    if factor is not None:
        changes["data.factor"] = factor
    if axis is not None:
        changes["data.axis"] = axis.upper()
    if steps is not None:
        changes["schedule.steps"] = steps
    return make_recipe(method, size, changes, _several(settings))


def _finish(problems: Sequence[Problem]) -> None:
    """Name what was left out, and exit 3 if anything was."""
    for problem in problems:
        typer.echo(f"left out: {problem.path}: {problem.message}", err=True)
    _exit(problems)


def _exit(problems: Sequence[Problem]) -> None:
    """Exit 3 if anything was left out."""
    if problems:
        raise typer.Exit(PARTIAL)


if __name__ == "__main__":
    main()
