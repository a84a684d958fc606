"""The verb bids: chiasm as a BIDS-App."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from chiasm.commands.common import Trust, finish, say
from chiasm.commands.options import several
from chiasm.errors import RecipeError
from chiasm.locks import check_output
from chiasm.names import amount
from chiasm.progress import count, open_progress

if TYPE_CHECKING:
    from chiasm.cohorts.cases import Problem


def bids(
    bids_dir: Annotated[Path, typer.Argument(help="BIDS raw data.")],
    output_dir: Annotated[Path, typer.Argument(help="Folder of the derivatives.")],
    level: Annotated[
        Literal["participant", "group"],
        typer.Argument(help="participant: predict subjects; group: score those with a real target."),
    ],
    run: Annotated[
        list[Path] | None,
        typer.Option("--run", help="Run or model folder, to predict subjects; of several, images are averaged."),
    ] = None,
    participant_label: Annotated[
        list[str] | None,
        typer.Option("--participant-label", "--participant_label", help="A subject, with or without sub-."),
    ] = None,
    session_label: Annotated[
        list[str] | None, typer.Option("--session-label", "--session_label", help="A session, with or without ses-.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Write predictions of a BIDS folder as BIDS derivatives, as a BIDS-App."""
    check_output(output_dir)
    from chiasm.bids import derive_group, derive_participants

    with open_progress() as bar:
        if level == "group":
            scored = derive_group(bids_dir, output_dir, progress=count(bar, "evaluating"))
            for line in scored.headlines:
                say(line)
            say(f"report: {scored.report}")
            problems: Sequence[Problem] = scored.problems
        elif not run:
            raise RecipeError("participant needs a model", reason="no-model", hint="Give chiasm bids --run RUN.")
        else:
            made = derive_participants(
                bids_dir,
                output_dir,
                run,
                labels=several(participant_label),
                sessions=several(session_label),
                trust=several(trust),
                progress=count(bar, "predicting"),
            )
            say(f"{amount(len(made.files), 'case')} derived: {output_dir}")
            problems = made.problems
    finish(problems)
