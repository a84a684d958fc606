"""Verbs to start with: run, explain."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Annotated

import typer

from chiasm.commands.common import (
    FORMAT,
    Allow,
    Data,
    Out,
    exit_partial,
    say,
    say_above,
    show_registered,
)
from chiasm.commands.options import CohortOptions, PeopleOptions, ReadingOptions, RecipeOptions
from chiasm.errors import RecipeError
from chiasm.locks import check_output
from chiasm.progress import count, follow, open_progress


def run(
    data: Data,
    out: Out,
    asked: RecipeOptions,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Limit of the training time, minutes: 40 by default; none with --steps."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="Of the prediction: auto (the default), torch, openvino or onnxruntime.",
            rich_help_panel="Run",
        ),
    ] = None,
    container: Annotated[str | None, FORMAT] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and how long it takes, and stop.")
    ] = False,
) -> None:
    """Go from scans to a report: plan, train, predict, evaluate; run the same command again to resume."""
    if minutes is not None and asked.steps is not None:
        raise RecipeError("chiasm run --minutes and --steps are at odds", reason="minutes", hint="Give one of them.")
    selection = found.selection(asked.source, reading, allow, people)
    recipe = asked.recipe(reading, selection)
    check_output(out)
    from chiasm.pipeline import MINUTES, Watch, minutes_before, open_job, plan_ahead
    from chiasm.pipeline import run as run_all
    from chiasm.prediction.manifest import container_named

    most = minutes_before(out, MINUTES) if minutes is None and asked.steps is None else minutes
    chosen = None if container is None else container_named(container)
    open_job(out, most, recipe.training.accelerator, engine, chosen)
    if dry_run:
        plan_ahead(data, recipe, out, minutes=most, layout=found.layout, selection=selection, say=say)
        return
    with open_progress() as bar:
        watch = Watch(say_above(bar), follow(bar, "training"), count(bar, "predicting"), count(bar, "evaluating"))
        done = run_all(
            data,
            recipe,
            out,
            minutes=most,
            layout=found.layout,
            selection=selection,
            engine=engine,
            container=chosen,
            watch=watch,
        )
    show_registered(out / "run")
    _show_explanation(out)
    say(f"report: {done.report}")
    exit_partial(done.problems)


def explain(
    place: Annotated[Path, typer.Argument(help="Folder that chiasm run, train or evaluate wrote.")],
) -> None:
    """Explain what was chosen and why, how the training went, where the model is weak, and what to try next."""
    _show_explanation(place)


def _show_explanation(place: Path) -> None:
    from chiasm.reports.explanation import explain as explain_results

    for part in explain_results(place):
        say(f"{part.heading}:")
        for sentence in part.sentences:
            say(fill(sentence, width=78, initial_indent="  ", subsequent_indent="    "))
