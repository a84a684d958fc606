"""The verb rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from chiasm.commands.common import PARTIAL, Overwrite, Register, Seed, finish, say
from chiasm.commands.options import CohortOptions, PeopleOptions, ReadingOptions, registration_named, several
from chiasm.errors import RecipeError
from chiasm.locks import check_output
from chiasm.progress import count, open_progress

if TYPE_CHECKING:
    from chiasm.reports.rating import RealImages, StudyDesign


@dataclass(frozen=True)
class ShownOptions:
    """What raters are shown."""

    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods", help="Methods by name or code, if not all: --methods A1 A7.", rich_help_panel="Method"
        ),
    ] = None
    slices: Annotated[int, typer.Option("--slices", help="Slices of each case.", rich_help_panel="Method")] = 1
    repeat: Annotated[
        float,
        typer.Option("--repeat", help="Share of the images that are shown twice, up to 0.5.", rich_help_panel="Method"),
    ] = 0.2
    plane: Annotated[str, typer.Option("--plane", help="axial, coronal or sagittal.", rich_help_panel="Method")] = (
        "axial"
    )
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--window",
            help="Level and width, such as 40 400 for CT; by default as in reports.",
            rich_help_panel="Method",
        ),
    ] = None
    seed: Seed = 0

    def design(self) -> StudyDesign:
        """Return them as the functions take them."""
        from chiasm.evaluation.reader_files import Planes
        from chiasm.reports.rating import StudyDesign

        return StudyDesign(
            self.slices, self.repeat, self.seed, cast("Planes", self.plane), self.window, tuple(several(self.methods))
        )


def rate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the reader study.")],
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    shown: ShownOptions,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="STUDY | PREDICTIONS... REFERENCE",
            help="Folder of chiasm study, run or evaluate; or predictions, then the cohort with the real targets.",
        ),
    ] = None,
    read: Annotated[
        list[Path] | None, typer.Option("--read", help="Analyse ratings that the page wrote: --read A.csv B.csv.")
    ] = None,
    register: Register = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a blinded page on which readers rate real and synthetic slices, or analyse their answers."""
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
    from chiasm.reports.rating import count_images, write_reader_study

    predictions, real = _find_images(given)
    if register is not None:
        real = replace(real, register=registration_named(register))
    if any(chain.from_iterable(vars(record).values() for record in (found, people, reading))):
        selection = found.selection((), reading, people=people)
        real = replace(real, layout=found.layout or real.layout, selection=selection)
    with open_progress() as bar:
        made = write_reader_study(
            predictions, real, out, shown.design(), overwrite=overwrite, progress=count(bar, "cutting slices")
        )
    say(count_images(made.items))
    say(f"for the raters: {made.page}")
    say(f"for you alone: {made.key}")
    for note in made.notes:
        say(note)
    finish(made.problems)


def _find_images(given: Sequence[Path]) -> tuple[list[Path], RealImages]:
    """Return the folders of predictions, and where the real images lie.

    Raises:
        RecipeError: If a single folder is given that names neither.
    """
    from chiasm.reports.evaluation_folder import ASKED
    from chiasm.reports.rating import RealImages

    first, *others = given
    if others:
        return list(given[:-1]), RealImages(given[-1])
    if evaluation := next((place for place in (first, first / "evaluation") if (place / ASKED).is_file()), None):
        return _images_of_evaluation(evaluation)
    if (first / "study.json").is_file():
        return _images_of_study(first)
    raise RecipeError(
        f"{first} is no folder of chiasm study, run or evaluate, and no folder of real images is given beside it",
        reason="arguments",
    )


def _images_of_evaluation(folder: Path) -> tuple[list[Path], RealImages]:
    """Return the predictions and real images of an evaluation."""
    from chiasm.reports.evaluation import selection_asked
    from chiasm.reports.evaluation_folder import place_of, read_asked
    from chiasm.reports.rating import RealImages

    asked = read_asked(folder)
    predictions = [place_of(folder, asked, name) for name in asked["predictions"]]
    reference = place_of(folder, asked, asked["reference"])
    return predictions, RealImages(reference, asked["layout"], asked.get("register"), selection_asked(asked))


def _images_of_study(folder: Path) -> tuple[list[Path], RealImages]:
    """Return every method's predictions with the first seed of a study, and the real images."""
    from chiasm.reports.rating import RealImages
    from chiasm.studies.notes import read_notes
    from chiasm.studies.study_file import data_folder, reference_folder

    notes = read_notes(folder)
    jobs = [job for job in notes.jobs if job.seed == notes.study.seeds[0]]
    reference = reference_folder(notes.study, folder)
    real = RealImages(
        reference or data_folder(notes.study, folder), notes.study.layout, None if reference is None else "none"
    )
    return [folder / job.folder / "predictions" for job in jobs], real


def _read(out: Path, files: list[Path]) -> None:
    """Print the results of a reader study; exit 3 if raters left images out."""
    from chiasm.evaluation.rating import RESULTS, report_ratings

    results = report_ratings(out, files)
    for sentence in results.sentences:
        say(sentence)
    say(f"results: {out / RESULTS[0]}")
    for note in results.notes:
        say(note, err=True)
    if results.notes:
        raise typer.Exit(PARTIAL)
