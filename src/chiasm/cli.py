"""The command: its verbs by group, and how a mistake ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from chiasm import __version__
from chiasm.commands import benchmark, bids, data, models, rating, results, start, view
from chiasm.commands.common import say
from chiasm.commands.options import spread, with_records
from chiasm.errors import ChiasmError
from chiasm.stopping import Stopped, stoppable
from chiasm.storage import FULL, unwritable

#: Every verb, in the order of `chiasm --help`.
VERBS: Mapping[str, Sequence[Callable[..., None]]] = {
    "Start": (start.run, start.explain, data.demo, results.methods),
    "Data": (data.inspect, view.view, data.convert, data.phantom, data.register),
    "Models": (
        models.plan,
        models.train,
        models.finetune,
        models.predict,
        models.complete,
        models.export,
        models.serve,
        bids.bids,
    ),
    "Evidence": (results.evaluate, results.models, results.study, results.report, rating.rate, benchmark.bench),
    "PET": (data.mumap,),
}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"chiasm {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn medical image volumes of one modality into another, and measure how well."""


def make_app() -> typer.Typer:
    """Return the command with all its verbs."""
    made = _make_typer(add_completion=True)
    made.callback()(_options)
    for group, verbs in VERBS.items():
        for verb in verbs:
            made.command(rich_help_panel=group)(with_records(verb))
    return made


def make_verb(verb: Callable[..., None]) -> typer.Typer:
    """Return one verb as a command of its own.

    It starts sooner than within the whole: the other verbs are not made, and typer needs pydantic for each option
    of the whole that is not given.
    """
    made = _make_typer(add_completion=False)
    made.command()(with_records(verb))
    return made


def _make_typer(*, add_completion: bool) -> typer.Typer:
    return typer.Typer(
        name="chiasm",
        help="Turn medical image volumes of one modality into another, and measure how well. Not for diagnostic use.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        add_completion=add_completion,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake that a user can mend ends in one sentence and exit code 2.

    Args:
        arguments: Words of the command line after `chiasm`; None for those of this process.

    Raises:
        SystemExit: At the end of every command, with its exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        with stoppable():
            _call(given)
    except Stopped:
        _say_stopped()
        raise
    except Exception as error:
        code = getattr(error, "exit_code", None)  # of a run that was asked to stop, and keeps a checkpoint
        if code is not None:
            if code:  # 0: a process beside the first one, which says it
                _say_stopped()
            raise SystemExit(code) from None
        sentence = None if debug else _sentence_of(error)
        if sentence is None:
            raise
        say(f"chiasm: {sentence}", err=True)
        raise SystemExit(2) from None


def _call(words: Sequence[str]) -> None:
    """Run what the words ask for: a verb that stands first, or the whole command (`--help`, a word that is no verb)."""
    verbs = {verb.__name__: verb for group in VERBS.values() for verb in group}
    if words and words[0] in verbs:
        make_verb(verbs[words[0]])(args=spread(words)[1:], prog_name=f"chiasm {words[0]}")
    else:
        make_app()(args=spread(words), prog_name="chiasm")


def _sentence_of(error: Exception) -> str | None:
    """Say what a user can mend; None of an error that is ours."""
    if isinstance(error, ChiasmError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    place = Path(error.filename or Path.cwd())  # a disk that is full or gone, wherever it shows
    return str(unwritable(place, error)) if error.errno in FULL else f"{place}: {error.strerror or error}."


def _say_stopped() -> None:
    with suppress(OSError):  # the terminal may be gone
        say("stopped; the same command goes on from here", err=True)


if __name__ == "__main__":
    main()
