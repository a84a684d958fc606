"""Verbs about results: evaluate, study, report, methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.commands.common import (
    PARTIAL,
    Out,
    Overwrite,
    Register,
    Runner,
    Size,
    Trust,
    finish,
    fit,
    say,
    say_above,
)
from chiasm.commands.options import (
    CohortOptions,
    PeopleOptions,
    ReadingOptions,
    Select,
    registration_named,
    several,
)
from chiasm.locks import check_output
from chiasm.progress import count, open_progress

if TYPE_CHECKING:
    from chiasm.studies.study_report import Done
    from chiasm.training.players import MethodRow


def _two_folders(option: str, what: str) -> Any:
    """Declare an option that takes a folder made from synthetic images, and one made from the real ones."""
    return typer.Option(option, help=what, metavar="SYNTHETIC REAL", rich_help_panel="Data")


Segmentations = Annotated[
    tuple[Path, Path] | None,
    _two_folders(
        "--segmentations", "Your label maps of the synthetic and of the real images, two folders: Dice and HD95."
    ),
]
Doses = Annotated[
    tuple[Path, Path] | None,
    _two_folders("--doses", "Your doses on the synthetic and on the real CT, two folders: gamma."),
]


def evaluate(
    predictions: Annotated[list[Path], typer.Argument(help="Folders written by chiasm predict, such as one per fold.")],
    reference: Annotated[Path, typer.Argument(help="Cohort with the real targets.")],
    out: Out,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    regions: Annotated[
        str, typer.Option("--regions", help="seg (the cohort's label maps) or none.", rich_help_panel="Data")
    ] = "seg",
    convention: Annotated[
        str, typer.Option("--convention", help="Name of the metric convention.", rich_help_panel="Method")
    ] = "chiasm",
    model: Annotated[
        Path | None, typer.Option("--model", help="Run or model folder, if it was moved.", rich_help_panel="Expert")
    ] = None,
    register: Register = None,
    segmentations: Segmentations = None,
    doses: Doses = None,
    gamma: Annotated[
        str, typer.Option("--gamma", help="Criteria of gamma: percent,mm.", rich_help_panel="Method")
    ] = "2,2",
    angles: Annotated[
        str | None,
        typer.Option(
            "--angles", help="Gantry angles, such as 0,72,144: path lengths of a CT.", rich_help_panel="Method"
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes that score cases at once.", rich_help_panel="Run")
    ] = 1,
    density_curve: Annotated[
        Path | None,
        typer.Option(
            "--density-curve", help="Lines of HU,density of your CT scanner, a CSV file.", rich_help_panel="Method"
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score predictions per case and region beside the naive baselines, and write a report."""
    check_output(out)
    from chiasm.runners import imported_ahead

    ahead = ["chiasm.reports.evaluation", "scipy.ndimage", "matplotlib", "contourpy"] if processes > 1 else []
    with imported_ahead(ahead), open_progress() as bar:
        from chiasm.reports.evaluation import evaluate as run_evaluation

        scored = run_evaluation(
            predictions,
            reference,
            out,
            regions=regions,
            convention=convention,
            model=model,
            layout=found.layout,
            selection=found.selection((), reading, people=people),
            register=None if register is None else registration_named(register),
            segmentations=segmentations,
            doses=doses,
            gamma=gamma,
            angles=angles,
            density_curve=density_curve,
            overwrite=overwrite,
            processes=processes,
            progress=count(bar, "evaluating"),
        )
    for line in scored.headlines:
        say(line)
    say(f"report: {scored.report}")
    for note in scored.notes:
        say(note)
    finish(scored.problems)


def study(
    file: Annotated[Path, typer.Argument(help="STUDY.toml: data, source, target, arms, folds, seeds, ...")],
    out: Out,
    people: PeopleOptions,
    reading: ReadingOptions,
    select: Select = None,
    runner: Runner = "serial",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs and stop.")] = False,
    open_locked: Annotated[bool, typer.Option("--open-locked", help="Score the locked test set, once.")] = False,
    open_sealed: Annotated[bool, typer.Option("--open-sealed", hidden=True)] = False,
    trust: Trust = None,
) -> None:
    """Compare methods over folds and seeds: jobs that resume, statistics, a report."""
    if not dry_run:
        check_output(out)
    from chiasm.studies.study import describe_jobs, run_study

    given = {"data.select": select, "split.subject_pattern": people.subject_pattern}
    settings = [f"{name}={json.dumps(value)}" for name, value in given.items() if value]
    if dry_run:
        for line in describe_jobs(file, out, reading.reading(), settings):
            say(line)
        return
    with open_progress() as bar:
        done = run_study(
            file,
            out,
            runner=runner,
            open_locked=open_locked or open_sealed,
            reading=reading.reading(),
            trust=several(trust),
            settings=settings,
            say=say_above(bar),
            progress=count(bar, "jobs"),
        )
    _show_study(done)


def _show_study(done: Done) -> None:
    """Show the results of a study, and its missing jobs and cases."""
    for comparison in done.comparisons:
        if comparison.primary:
            say(comparison.verdict)
    say(f"report: {done.report}")
    if done.left_out:
        say(f"left out, for reasons that chiasm inspect shows: {', '.join(done.left_out)}", err=True)
    if done.failed or done.left_out:
        raise typer.Exit(PARTIAL)


def report(
    out: Annotated[Path, typer.Argument(help="Folder that chiasm study or chiasm evaluate wrote.")],
    cases: Annotated[int, typer.Option("--cases", min=0, help="Largest number of cases with a page.")] = 24,
    whole: Annotated[bool, typer.Option("--whole", help="Keep whole volumes at full resolution.")] = False,
) -> None:
    """Write the pages of a study or an evaluation again from its files."""
    check_output(out)
    from chiasm.studies.study_report import report as make_report

    say(f"report: {make_report(out, pages=cases, whole=whole)}")


def models(
    places: Annotated[list[Path], typer.Argument(help="What chiasm run, train or evaluate wrote; several compare.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print model cards: data, splits, scores with intervals, limits, hashes, licence; several side by side."""
    from chiasm.reports.model_cards import describe_models, report_models

    found = describe_models(places)
    if as_json:
        cards = [card.to_dict() for card in found.cards]
        typer.echo(json.dumps({"models": cards, "warnings": found.warnings}, indent=1))
        return
    for line in report_models(found):
        say(line)


def methods(size: Size = "small") -> None:
    """List every method by group: description, author, number of weights, needs; and which methods to start with."""
    from chiasm.methods import GROUPS, METHODS, STARTS
    from chiasm.training.players import BESIDE, describe_methods

    rows = describe_methods(size)
    for group, heading in GROUPS.items():
        say(f"{heading}:")
        for row in rows:
            if METHODS[row.name].group == group:
                _show_method(row)
        say()
    say("No methods of this table:")
    for name, words in BESIDE.items():
        say(f"  {name}: {words}")
    say("\nStart with:")
    for name, why in STARTS.items():
        say(f"  chiasm train --method {name}: {why}")


def _show_method(row: MethodRow) -> None:
    """Print a method's description, author, weights and needs."""
    from chiasm.methods import title_of

    published = f" ({row.published:,} published)" if row.published else ""
    beside = f" and {row.discriminators:,} of discriminators" if row.discriminators else ""
    facts = [row.paper, f"{row.weights:,} weights{published}{beside}", *([f"needs {row.needs}"] if row.needs else [])]
    say(fit(f"  {title_of(row.name):26} {row.words}", 80))
    say(fit(f"      {'; '.join(facts)}", 80))
