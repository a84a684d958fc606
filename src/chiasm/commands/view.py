"""The verb that opens volumes: view."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.commands.common import say
from chiasm.commands.options import ReadingOptions, several


def view(
    places: Annotated[
        list[Path],
        typer.Argument(help="Files and DICOM folders of any tool, or a folder that chiasm predict or run wrote."),
    ],
    reading: ReadingOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page: a file such as view.html; by default in a temporary folder, for a day."
        ),
    ] = None,
    case: Annotated[
        str | None, typer.Option("--case", help="Case of a folder of predictions; its first one by default.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    series: Annotated[
        list[str] | None,
        typer.Option(
            "--series",
            help="DICOM series by number or words: one for all places, or one for each in order.",
            rich_help_panel="Data",
        ),
    ] = None,
) -> None:
    """Show volumes side by side in one page that needs no network: linked cursors, values, a window for each."""
    from chiasm.reports.view import view as write_view

    seen = write_view(places, out, case=case, series=several(series), reading=reading.reading())
    for note in seen.notes:
        say(note, err=True)
    size = seen.page.stat().st_size / 1e6
    say(f"{', '.join(seen.titles)} ({size:.1f} MB): {seen.page}")
    if open_page:
        import webbrowser

        webbrowser.open(seen.page.absolute().as_uri())
