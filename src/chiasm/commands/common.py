"""Options and endings that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from chiasm.cohorts.cases import Problem

PARTIAL = 3  # some cases of a cohort failed, the others are done

Data = Annotated[Path, typer.Argument(help="Folder or manifest of paired scans, in any layout that is recognised.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random numbers.", rich_help_panel="Run")]


def complete_size(incomplete: str) -> list[str]:
    """Complete the name of a size in a shell."""
    from chiasm.sizes import SIZES

    return [name for name in SIZES if name.startswith(incomplete.lower())]


Size = Annotated[
    str,
    typer.Option(
        "--size",
        help="Effort: tiny, small, large or paper.",
        rich_help_panel="Method",
        autocompletion=complete_size,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Training steps; the size decides by default.", rich_help_panel="Method"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting: --set loss.norm=l1.", rich_help_panel="Expert")
]
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Write curves and slices for TensorBoard too.", rich_help_panel="Run"),
]
Runner = Annotated[str, typer.Option("--runner", help="serial, processes, ray or slurm.", rich_help_panel="Run")]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", help="Use images with these marks: synthetic, burned-in.", rich_help_panel="Data"),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace results of other inputs or options in the folder.", rich_help_panel="Run"
    ),
]
Register = Annotated[
    str | None,
    typer.Option(
        "--register", help="none: do not align the real images; by default as in training.", rich_help_panel="Method"
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        help="Class of another package that a model may run: --trust package.module:Class.",
        rich_help_panel="Expert",
    ),
]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu or cuda.", rich_help_panel="Run")]
Precision = Annotated[
    str, typer.Option("--precision", help="auto, 32-true, bf16-mixed or 16-mixed.", rich_help_panel="Run")
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine", help="auto, torch, openvino or onnxruntime: what computes networks.", rich_help_panel="Run"
    ),
]
FORMAT = typer.Option(
    "--format", help="volume (as the source), nifti, metaimage, nrrd, mgz or dicom.", rich_help_panel="Run"
)
OutputFormat = Annotated[str, FORMAT]


def say(message: str = "", *, err: bool = False) -> None:
    """Print a message; on a terminal its lines are broken between words, elsewhere each stays one line.

    Args:
        message: One line or several.
        err: Whether it goes to stderr.
    """
    if (sys.stderr if err else sys.stdout).isatty():
        message = _fit_all(message, get_terminal_size().columns)
    typer.echo(message, err=err)


def say_above(bar: Bar) -> Callable[[str], None]:
    """Return what prints as `say` does while a bar is shown: above the bar, where both are on a terminal."""
    if bar.disable or not sys.stdout.isatty():
        return say

    def print_above(message: str) -> None:
        lines = _fit_all(message, bar.console.width)
        bar.console.print(lines, markup=False, highlight=False, soft_wrap=True)

    return print_above


def _fit_all(message: str, width: int) -> str:
    return "\n".join(fit(line, width) for line in message.splitlines())


def fit(line: str, width: int) -> str:
    """Break a line between words; what follows is indented by four more. A word that is longer stays whole.

    >>> fit("  model: a/long/path of a run, and what follows", 40).splitlines()
    ['  model: a/long/path of a run, and what', '      follows']
    """
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return fill(line, max(width, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def show_registered(run: Path) -> None:
    """Make the page of a run's registered pairs, if it has any."""
    if (run / "registered").is_dir():
        from chiasm.reports.registration import report_registered

        say(f"registered pairs, the worst first: {report_registered(run / 'registered')}")


def finish(problems: Sequence[Problem]) -> None:
    """Print what was left out, and exit 3 if anything was.

    Raises:
        Exit: With code 3, if there is a problem.
    """
    for problem in problems:
        say(problem.line, err=True)
    exit_partial(problems)


def exit_partial(problems: Sequence[Problem]) -> None:
    """Exit 3 if anything was left out.

    Raises:
        Exit: With code 3, if there is a problem.
    """
    if problems:
        raise typer.Exit(PARTIAL)
