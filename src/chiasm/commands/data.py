"""Verbs about data: inspect, simulate, convert and align it, turn CT into attenuation."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.commands.common import (
    Allow,
    Data,
    Out,
    Overwrite,
    Seed,
    finish,
    say,
    say_above,
)
from chiasm.commands.options import (
    CohortOptions,
    PeopleOptions,
    ReadingOptions,
    several,
)
from chiasm.locks import check_output
from chiasm.names import amount
from chiasm.progress import count, follow, open_progress

if TYPE_CHECKING:
    pass


def demo(
    out: Out = Path("chiasm-demo"),
    task: Annotated[str, typer.Option("--task", help="t1-t2 or ct-mr.", rich_help_panel="Method")] = "t1-t2",
    quick: Annotated[bool, typer.Option("--quick", help="Use fewer cases and steps: under a minute.")] = False,
    seed: Seed = 0,
) -> None:
    """Simulate a cohort, train, predict, evaluate and write a report: offline, in minutes."""
    from chiasm.demo import run_demo

    with open_progress() as bar:
        report = run_demo(out, task=task, quick=quick, seed=seed, say=say_above(bar), progress=follow(bar, "training"))
    say(f"\nreport: {report}")


def inspect(
    data: Data,
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Source modality.", rich_help_panel="Data")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="Target modality.", rich_help_panel="Data")] = None,
    allow: Allow = None,
) -> None:
    """Print what a folder holds: layout, cases, modalities, and what is wrong with each file."""
    from chiasm.preparation.inspection import inspect_folder

    sources = several(source)
    selection = found.selection(sources, reading, allow, people)
    seen = inspect_folder(data, sources, target, layout=found.layout, selection=selection)
    for line in seen.lines():
        say(line)
    if target is None and len({name for case in seen.summaries for name in case.modalities}) > 1:
        say(f"next: chiasm inspect {shlex.quote(str(data))} --source A --target B, of two modalities above")
    finish(seen.problems)


def phantom(
    out: Out,
    subjects: Annotated[int, typer.Option("--subjects", help="Number of patients.")] = 8,
    seed: Seed = 0,
    anatomy: Annotated[Path | None, typer.Option("--anatomy", help="Folder of 12-tissue label maps.")] = None,
    spacing: Annotated[float, typer.Option("--spacing", help="Voxel size in mm.")] = 2.0,
    difficulty: Annotated[str, typer.Option("--difficulty", help="easy, standard, hard or varied.")] = "standard",
    layout: Annotated[str, typer.Option("--layout", help="brats, bids or synthrad.", rich_help_panel="Data")] = "brats",
    misregistration: Annotated[
        float | None,
        typer.Option("--misregistration", help="Distance of T2 from T1 in mm; the difficulty sets it by default."),
    ] = None,
    movement: Annotated[
        str, typer.Option("--movement", help="elastic, rigid, or held (the same patients without movement).")
    ] = "elastic",
    overwrite: Overwrite = False,
) -> None:
    """Simulate a cohort of patients with a known truth."""
    check_output(out)
    from chiasm.simulation.phantom import write_cohort

    with open_progress() as bar:
        write_cohort(
            out,
            subjects=subjects,
            seed=seed,
            anatomy=anatomy,
            spacing_mm=spacing,
            difficulty=difficulty,
            layout=layout,
            misregistration_mm=misregistration,
            movement=movement,
            overwrite=overwrite,
            progress=count(bar, "simulating"),
        )
    say(f"{amount(subjects, 'subject')}: {out}")
    say(f"next: chiasm inspect {shlex.quote(str(out))}")


def convert(
    data: Annotated[Path, typer.Argument(help="Folder or manifest of scans, in any layout that is recognised.")],
    out: Out,
    to: Annotated[str, typer.Option("--to", help="brats, bids, nnunet or konfai.", rich_help_panel="Data")],
    found: CohortOptions,
    people: PeopleOptions,
    reading: ReadingOptions,
    allow: Allow = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files that could be hard links.")] = False,
) -> None:
    """Write a cohort in another layout: unchanged files become hard links, others are rewritten."""
    check_output(out)
    from chiasm.cohorts.conversion import convert as run_conversion

    selection = found.selection((), reading, allow, people)
    with open_progress() as bar:
        done = run_conversion(
            data, to, out, layout=found.layout, selection=selection, copy=copy, progress=count(bar, "converting")
        )
    ways = ", ".join(f"{number} {way}" for way, number in done.files.items() if number)
    say(f"{amount(len(done.cases), 'case')} ({ways or 'no'} files): {done.folder}")
    finish(done.problems)


def register(
    moving: Annotated[Path, typer.Argument(help="The volume to align.")],
    fixed: Annotated[Path, typer.Argument(help="The volume of the same patient that stays.")],
    out: Out,
    reading: ReadingOptions,
    kind: Annotated[str, typer.Option("--kind", help="rigid, affine or demons (rigid, then deformable).")] = "demons",
    labels: Annotated[list[Path] | None, typer.Option("--labels", help="Label map to resample with it.")] = None,
    series: Annotated[
        list[str] | None,
        typer.Option("--series", help="DICOM series: --series moving=t2 fixed=3.", rich_help_panel="Data"),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Align a volume with another of the same patient: matrix, field, and a page to check it by."""
    check_output(out)
    from chiasm.registration.alignment import kind_named
    from chiasm.reports.registration import register as run_registration

    with open_progress() as bar:
        made = run_registration(
            moving,
            fixed,
            out,
            kind=kind_named(kind),
            labels=labels or (),
            seed=seed,
            reading=reading.reading(),
            series=several(series),
            overwrite=overwrite,
            progress=count(bar, "registering"),
        )
    before, *_, after = made.alignment.information
    say(f"mutual information {before:.3f} before, {after:.3f} after; look at {made.report}")
    if made.covered < 1:
        say(
            f"{moving.name} covers {100 * made.covered:.0f} % of the grid of {fixed.name}: elsewhere moved.nii.gz has "
            "its darkest value, and known.nii.gz is 0"
        )
    if after <= before:
        say("warning: the images do not share more information than before: look closely", err=True)


def mumap(
    ct: Annotated[Path, typer.Argument(help="CT in Hounsfield units, real or synthetic.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .nii.gz, .nii or .mha.")],
    reading: ReadingOptions,
    kvp: Annotated[int, typer.Option("--kvp", help="Tube voltage: 80, 100, 110, 120, 130 or 140.")] = 120,
    like: Annotated[Path | None, typer.Option("--like", help="PET volume that gives the grid of the map.")] = None,
    spacing: Annotated[
        float | None, typer.Option("--spacing", help="Voxel size in mm of a grid over the CT's box.")
    ] = None,
    fwhm: Annotated[float, typer.Option("--fwhm", help="Resolution of PET in mm; 0 means no smoothing.")] = 5.0,
    series: Annotated[
        str | None, typer.Option("--series", help="DICOM series of the CT: number or words.", rich_help_panel="Data")
    ] = None,
) -> None:
    """Turn a CT into linear attenuation coefficients at 511 keV, in 1/cm, for PET."""
    from chiasm.attenuation import mumap as make_mumap

    made = make_mumap(
        ct, out, kvp=kvp, like=like, spacing_mm=spacing, fwhm_mm=fwhm, reading=reading.reading(), series=series
    )
    for sentence in made.warnings:
        say(f"warning: {sentence}", err=True)
    say(f"1/cm at 511 keV, {kvp} kVp, {fwhm:g} mm: {out}")
