"""Verbs about models: plan, train, predict, complete, serve."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.commands.common import (
    Accelerator,
    Allow,
    Data,
    Engine,
    Out,
    OutputFormat,
    Overwrite,
    Precision,
    Runner,
    Seed,
    Settings,
    Size,
    Steps,
    TensorBoard,
    Trust,
    exit_partial,
    finish,
    say,
    say_above,
    show_registered,
)
from chiasm.commands.options import (
    CohortOptions,
    PeopleOptions,
    ReadingOptions,
    RecipeOptions,
    file_settings,
    several,
)
from chiasm.commands.serving import NodeOptions, PageOptions
from chiasm.locks import check_output
from chiasm.names import amount
from chiasm.outputs import remove_files
from chiasm.progress import count, follow, open_progress

if TYPE_CHECKING:
    from chiasm.prediction.folders import Predicted

Average = Annotated[
    str,
    typer.Option(
        "--average",
        help="flip: mean over a volume and its mirror image; none; auto: the choice stored in the model.",
        rich_help_panel="Method",
    ),
]


def plan(
    data: Data,
    out: Out,
    asked: RecipeOptions,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
) -> None:
    """Write plan.toml without training: every choice with its reason, time and memory."""
    check_output(out)
    selection = found.selection(asked.source, reading, allow, people)
    recipe = asked.recipe(reading, selection)
    from chiasm.training.cross_fitting import plan_first
    from chiasm.training.run import describe

    recipe, run = plan_first(data, recipe, out, say=say, layout=found.layout, selection=selection)
    for line in describe(recipe, run.plan):
        say(line)
    show_registered(out)
    exit_partial(run.problems)


def train(
    data: Data,
    out: Out,
    asked: RecipeOptions,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
    devices: Annotated[
        int, typer.Option("--devices", help="Number of GPUs, or of CPU processes.", rich_help_panel="Run")
    ] = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    tensorboard: TensorBoard = False,
) -> None:
    """Train on a folder of paired scans; run the same command again to resume."""
    check_output(out)
    place = [f"training.devices={devices}", f"training.accelerator={accelerator}", f"training.precision={precision}"]
    selection = found.selection(asked.source, reading, allow, people)
    recipe = asked.recipe(reading, selection, place)
    from chiasm.training.run_planning import find_finished_run, resolve_models

    recipe, cases = resolve_models(data, recipe, out, found.layout, selection)
    alone = devices == 1 and recipe.split.models == 1  # of several processes each would lock the folder
    run = find_finished_run(cases, recipe, out, found.layout, selection, say) if alone else None
    if run is None:
        from chiasm.reports.tensorboard import watch_run
        from chiasm.training.cross_fitting import train as run_training

        with open_progress() as bar:
            run = run_training(
                cases,
                recipe,
                out,
                say=say_above(bar),
                progress=follow(bar, "training"),
                watcher=partial(watch_run, tensorboard=tensorboard),
                layout=found.layout,
                selection=selection,
            )
    show_registered(out)
    exit_partial(run.problems)


def finetune(
    run: Annotated[Path, typer.Argument(help="Run folder of the model to train further, or its model folder.")],
    data: Data,
    out: Out,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Training steps; a quarter of the run's by default.", rich_help_panel="Method"),
    ] = None,
    fold: Annotated[int, typer.Option("--fold", help="Fold that is the test set.", rich_help_panel="Run")] = 0,
    folds: Annotated[
        str,
        typer.Option(
            "--folds",
            help="Folds by subject; 1 keeps no test set; auto: 5, or one subject each of fewer than 10.",
            rich_help_panel="Run",
        ),
    ] = "auto",
    seed: Seed = 0,
    settings: Settings = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    tensorboard: TensorBoard = False,
    trust: Trust = None,
) -> None:
    """Train a finished model further on other paired scans of the same modalities; the same command resumes."""
    check_output(out)
    selection = found.selection((), reading, allow, people)
    given = {"schedule.steps": steps, **file_settings(reading, selection)}
    changes: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    changes |= {
        "split.fold": fold,
        "split.folds": folds,
        "training.seed": seed,
        "training.accelerator": accelerator,
        "training.precision": precision,
    }
    from chiasm.reports.tensorboard import watch_run
    from chiasm.training.finetuning import finetune as go_on

    with open_progress() as bar:
        done = go_on(
            run,
            data,
            out,
            changes=changes,
            settings=several(settings),
            layout=found.layout,
            selection=selection,
            trust=several(trust),
            say=say_above(bar),
            progress=follow(bar, "training"),
            watcher=watch_run(out, tensorboard=tensorboard),
        )
    show_registered(out)
    exit_partial(done.problems)


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or its model folder.")],
    inputs: Annotated[
        list[Path], typer.Argument(help="Other runs, whose images are averaged; then files, folders or cohorts.")
    ],
    out: Out,
    found: CohortOptions,
    reading: ReadingOptions,
    only: Annotated[
        str,
        typer.Option(
            "--only", help="all, train, validation, test or out-of-fold cases of the run.", rich_help_panel="Data"
        ),
    ] = "all",
    degrade: Annotated[
        bool,
        typer.Option("--degrade", help="Super-resolution: make thin slices thick first.", rich_help_panel="Method"),
    ] = False,
    average: Average = "auto",
    container: OutputFormat = "volume",
    overwrite: Overwrite = False,
    runner: Runner = "serial",
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    engine: Engine = "auto",
    trust: Trust = None,
) -> None:
    """Synthesise whole volumes, each with an expected-error map; several runs give their mean and spread."""
    check_output(out)
    from chiasm.runners import imported_ahead

    there = next(place for place in (out, *out.parents) if place.exists())
    ahead = ["chiasm.prediction.folders", "scipy.ndimage"] if runner == "processes" else []
    with imported_ahead(ahead), open_progress() as bar:
        from chiasm.prediction.cross_fitted import predict_by_role
        from chiasm.prediction.inputs import part_runs
        from chiasm.prediction.manifest import container_named

        places = part_runs([run, *inputs])
        made = predict_by_role(
            places.runs,
            places.inputs,
            out,
            only=only,
            layout=found.layout,
            series=several(found.series),
            select=several(found.select),
            reading=reading.reading(),
            container=container_named(container),
            runner=runner,
            degrade=degrade,
            average=average,
            overwrite=overwrite,
            accelerator=accelerator,
            precision=precision,
            engine=engine,
            trust=several(trust),
            progress=count(bar, "predicting"),
            say=say_above(bar),
        )
    if not any(one.manifest.cases for one in made):
        _leave_nothing(made, there)
    for one in made:
        _show_predictions(one)
    finish(tuple(dict.fromkeys(problem for one in made for problem in one.problems)))


def _leave_nothing(made: Sequence[Predicted], there: Path) -> None:
    """Remove manifests without a case, and the folders that were made for them."""
    from chiasm.prediction.manifest import FILE

    remove_files(there, (str((one.folder / FILE).relative_to(there)) for one in made))


def _show_predictions(made: Predicted) -> None:
    """Show how many cases were predicted, and the warnings on their images."""
    if not made.manifest.cases:
        say("no case was predicted")
        return
    kept = f", {len(made.kept)} were there already" if made.kept else ""
    say(f"{amount(len(made.done), 'case')} predicted{kept}: {made.folder}")
    for note in made.notes:
        say(note)
    from chiasm.prediction.manifest import warn_of_seen

    there = made.manifest.cases
    for sentence in warn_of_seen([entry.case for entry in there if entry.was_seen], len(there)):
        say(
            f"warning: {sentence}; chiasm predict --only test predicts each by a model that did not learn from it",
            err=True,
        )
    for case in made.remade:
        say(f"warning: case {case}: its files had changed or were gone, and were made again", err=True)
    for entry in made.manifest.cases:
        if entry.case in (*made.done, *made.kept):
            for sentence in entry.warnings:
                say(f"warning: case {entry.case}: {sentence}", err=True)


def complete(
    data: Data,
    out: Out,
    source: Annotated[
        list[str], typer.Option("--source", help="Source modality; several: --source t1 flair.", rich_help_panel="Data")
    ],
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    target: Annotated[
        str | None, typer.Option("--target", help="The modality that some cases lack.", rich_help_panel="Data")
    ] = None,
    utility: Annotated[
        str,
        typer.Option(
            "--utility",
            help="Target of the later model that measures the gain: a modality, auto or none.",
            rich_help_panel="Method",
        ),
    ] = "auto",
    folds: Annotated[
        int, typer.Option("--folds", help="Folds by subject for this measurement.", rich_help_panel="Run")
    ] = 3,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Number of seeds for it, from --seed on.", rich_help_panel="Run")
    ] = 1,
    method: Annotated[str, typer.Option("--method", help="Method by name.", rich_help_panel="Method")] = "li-cnn",
    size: Size = "small",
    steps: Steps = None,
    seed: Seed = 0,
    settings: Settings = None,
    trust: Trust = None,
) -> None:
    """Synthesise the modality that some cases lack, and measure whether it helps a later model."""
    check_output(out)
    selection = found.selection((), reading, people=people)
    recipe = RecipeOptions(
        source, target, method=method, size=size, steps=steps, folds=str(folds), seed=seed, settings=settings
    ).recipe(reading, selection)
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
            say=say_above(bar),
            progress=follow(bar, "training"),
        )
    for line in done.lines:
        say(line)
    finish(done.problems)


def export(
    run: Annotated[
        list[Path], typer.Argument(help="Run folder, or its model folder; several are exported as one, their mean.")
    ],
    out: Out,
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, torch (a .pt2) or monai-bundle.")] = "onnx",
    average: Average = "auto",
    trust: Trust = None,
) -> None:
    """Export a model, or several as one, for other engines, with a description in JSON and a script that predicts."""
    check_output(out)
    from chiasm.prediction.export import export as run_export

    made = run_export(run, out, to, average=average, trust=several(trust), say=say)
    for network in made.networks:
        say(f"network: {network} (differs from torch by at most {made.deviation:.1g} of the range)")
    say(f"what surrounds it: {made.card}")
    say(f"predicts without chiasm: python {made.script} SOURCE.nii.gz -o OUT")
    if to == "monai-bundle":
        say(f"by MONAI: {out / 'docs' / 'README.md'} has the command")


def serve(
    run: Annotated[
        list[Path], typer.Argument(help="Run folder, or its model folder; of several, the images are averaged.")
    ],
    reading: ReadingOptions,
    page: PageOptions,
    node: NodeOptions,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    average: Average = "auto",
    accelerator: Accelerator = "auto",
    precision: Precision = "auto",
    engine: Engine = "auto",
    trust: Trust = None,
) -> None:
    """Serve a model by a page with a REST API (--port), a DICOM node (--dicom-port), or both; Ctrl-C ends it."""
    if node.out is not None:
        check_output(node.out)
    from datetime import datetime

    from chiasm.prediction.folders import load
    from chiasm.serving.server import serve as run_server

    loading = partial(load, accelerator=accelerator, precision=precision, engine=engine, reading=reading.reading())
    run_server(
        run,
        page=page.page(host, node.series),
        node=node.node(host, page.dicomweb),
        loading=partial(loading, average=average, trust=several(trust)),
        say=lambda line: say(f"{datetime.now():%H:%M:%S} {line}"),
    )
