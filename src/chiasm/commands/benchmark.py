"""The verb bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiasm.commands.common import say
from chiasm.commands.options import several


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Use 96^3 voxels: under three minutes on two idle cores.")
    ] = False,
    row: Annotated[
        list[str] | None, typer.Option("--row", help="Measure only this row; several: --row A --row B.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the rows as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the rows as a page in Markdown.")] = None,
) -> None:
    """Compare chiasm with other tools on this machine: equal results first, then processor time.

    Exit code 1 means that a result differs.
    """
    from chiasm.bench.rows import FULL, QUICK, find_rows
    from chiasm.bench.table import ROWS, describe_row, keep_notes, run_rows, to_json, to_markdown
    from chiasm.storage import write_json, write_text

    chosen = find_rows(ROWS, several(row))
    measured = run_rows(chosen, quick=quick, progress=lambda one: say(describe_row(one)))
    if json is not None:
        write_json(json, to_json(measured))
    if markdown is not None:
        words = [
            "chiasm",
            "bench",
            *(["--quick"] if quick else []),
            *(w for name in several(row) for w in ("--row", name)),
        ]
        page = to_markdown(measured, [*words, "--markdown", str(markdown)], QUICK if quick else FULL)
        write_text(markdown, keep_notes(page, markdown))
    if any(one.verdict == "wrong" for one in measured):
        raise typer.Exit(1)
