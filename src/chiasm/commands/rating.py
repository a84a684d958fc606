"""The verb rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from chiasm.commands.common import PARTIAL, Overwrite, Seed, finish
from chiasm.commands.options import CohortOptions, PeopleOptions, ReadingOptions, registration_named
from chiasm.errors import RecipeError
from chiasm.locks import check_output
from chiasm.progress import count, open_progress

if TYPE_CHECKING:
    from chiasm.reports.rating import StudyDesign


@dataclass(frozen=True)
class ShownOptions:
    """What raters are shown."""

    slices: Annotated[int, typer.Option("--slices", help="Slices of each case.", rich_help_panel="Method")] = 1
    repeat: Annotated[
        float, typer.Option("--repeat", help="Share of the images that come twice, to 0.5.", rich_help_panel="Method")
    ] = 0.2
    plane: Annotated[str, typer.Option("--plane", help="axial, coronal or sagittal.", rich_help_panel="Method")] = (
        "axial"
    )
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--window", help="Level and width, such as 40 400 for CT; else as in reports.", rich_help_panel="Method"
        ),
    ] = None
    seed: Seed = 0

    def design(self) -> StudyDesign:
        """Return them as the functions take them."""
        from chiasm.evaluation.reader_files import Planes
        from chiasm.reports.rating import StudyDesign

        return StudyDesign(self.slices, self.repeat, self.seed, cast("Planes", self.plane), self.window)


def rate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the reader study.")],
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    shown: ShownOptions,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PREDICTIONS... REFERENCE",
            help="Predictions of each method, then the cohort with the real targets; none where ratings are read.",
        ),
    ] = None,
    read: Annotated[
        list[Path] | None, typer.Option("--read", help="Ratings that the page wrote: --read A.csv B.csv.")
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(
            "--register", help="none takes the real images as they lie; else as in training.", rich_help_panel="Method"
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a blinded page on which readers rate real and synthetic slices, or read what they said."""
    given = folders or []
    if bool(read) == bool(given):
        raise RecipeError(
            "folders and ratings exclude each other, and one of them is needed",
            reason="arguments",
            hint="To write a page: chiasm rate PREDICTIONS REFERENCE -o OUT. "
            "To read ratings: chiasm rate --read A.csv -o OUT.",
        )
    check_output(out)
    if read:
        _read(out, read)
        return
    if len(given) < 2:
        raise RecipeError("the folder of the real images is missing", reason="arguments", found=given[0])
    from chiasm.reports.rating import RealImages, count_images, write_reader_study

    *predictions, reference = given
    selection = found.selection((), reading, people=people)
    real = RealImages(reference, found.layout, None if register is None else registration_named(register), selection)
    with open_progress() as bar:
        made = write_reader_study(
            predictions, real, out, shown.design(), overwrite=overwrite, progress=count(bar, "cutting slices")
        )
    typer.echo(count_images(made.items))
    typer.echo(f"for the raters: {made.page}")
    typer.echo(f"for you alone: {made.key}")
    for note in made.notes:
        typer.echo(note)
    finish(made.problems)


def _read(out: Path, files: list[Path]) -> None:
    """Say what a study found; exit 3 where raters left images out."""
    from chiasm.evaluation.rating import RESULTS, report_ratings

    results = report_ratings(out, files)
    for sentence in results.sentences:
        typer.echo(sentence)
    typer.echo(f"results: {out / RESULTS[0]}")
    for note in results.notes:
        typer.echo(note, err=True)
    if results.notes:
        raise typer.Exit(PARTIAL)
