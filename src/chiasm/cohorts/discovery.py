"""Which files of a folder belong together, by a manifest, by their names, or by DICOM headers.

A folder that fits several layouts of `known_layouts.LAYOUTS` is read by the first of them.  A folder that holds DICOM
and no other volumes is read by `dicom_patients`.  Except for DICOM headers, no file is opened here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from chiasm.cohorts.cases import (
    LESION,
    MAPS,
    Case,
    Cohort,
    Problem,
    Regions,
    reading_of,
    regions_of,
    role_of,
    volume_stem,
    with_reading,
    with_unique_ids,
    without_problems,
    without_unsafe_names,
)
from chiasm.cohorts.dicom_patients import WARNINGS, Selection, forbidden_mark, holds_dicom, marks_on, read_dicom_folder
from chiasm.cohorts.folder_notes import ManifestNotes, read_notes, with_notes
from chiasm.cohorts.folder_roles import settle_roles
from chiasm.cohorts.gathering import count_words, gather, with_account
from chiasm.cohorts.known_layouts import LAYOUTS, File, Finds, Layout
from chiasm.cohorts.manifests import manifest_of, read_manifest
from chiasm.cohorts.relatives import group_relatives, with_subjects
from chiasm.errors import CohortError, unknown
from chiasm.names import amount
from chiasm.recipe import Recipe
from chiasm.volumes.dicom_files import visible_files
from chiasm.volumes.screening import VOLUME_SUFFIXES

NAMES = ("manifest", *(layout.name for layout in LAYOUTS), "dicom")


def find_cohort(root: Path, *, layout: str | None = None, selection: Selection | None = None) -> Cohort:
    """Find the cases of a folder or manifest by their names, or of DICOM series by their headers.

    Folders may be symbolic links, except below a manifest, which must not lead
    out of its own folder.

    Args:
        root: A folder in one of `LAYOUTS`, a folder with a manifest, the manifest itself, or a folder,
            archive or file of DICOM.
        layout: A name of `NAMES`, if the folder fits several; by default the most specific one is used.
        selection: Which DICOM series, files and marked images are used, how subjects are found, and how files are
            read; without rules in it, those of `cohort.json` hold.

    Returns:
        Cases in the order of their ids, and the problems of what is not used.  A folder of DICOM may have no case, but
        a listing of series to choose from.

    Raises:
        CohortError: If there is no such folder or layout, no case is
            recognised, a manifest cannot be trusted, or no file or case is as the selection says.
        RecipeError: If the pattern of subjects cannot be read.
        VolumeError: If a place of DICOM cannot be read.
    """
    chosen = selection or Selection()
    cohort = with_reading(_find(Path(root), layout, chosen), chosen.reading)
    cohort = with_subjects(cohort, chosen.subject_pattern, lenient=chosen.lenient)
    return without_unsafe_names(cohort if cohort.layout == "manifest" else settle_roles(cohort))


def selection_of(recipe: Recipe, given: Selection | None = None, *, remember: bool = False) -> Selection:
    """Return which files a recipe uses and how it reads them; options that are given now come first.

    Args:
        recipe: Of a training.
        given: Options of this call.
        remember: Whether the cohort may differ from that of the training: then a word of `data.select`, or the
            pattern of subjects, need not fit it.
    """
    chosen, words = given or Selection(), recipe.data.select
    pattern = chosen.subject_pattern or recipe.split.subject_pattern
    asked = replace(chosen, reading=reading_of(recipe.data) | chosen.reading, subject_pattern=pattern)
    if remember:
        return replace(asked, remembered=words, lenient=not chosen.subject_pattern)
    return replace(asked, select=chosen.select or words, remembered=(), lenient=False)


def _find(root: Path, layout: str | None, selection: Selection) -> Cohort:
    _check_place(root, layout)
    if layout == "dicom" or (layout is None and _is_dicom_file(root)):
        return _dicom_cohort(root, selection)
    manifest = manifest_of(root, forced=layout == "manifest")
    if manifest is not None and layout in (None, "manifest"):
        return _listed_cohort(manifest, selection)
    if root.is_dir():
        return _cohort_below(root, layout, selection)
    raise CohortError(
        "is neither a folder nor a manifest", path=root, reason="no-folder", expected=".csv, .tsv or .json"
    )


def _is_dicom_file(root: Path) -> bool:
    """Return whether a place is a file of DICOM, or an archive."""
    return root.is_file() and holds_dicom(root)


def _listed_cohort(manifest: Path, selection: Selection) -> Cohort:
    """Find the cases that a manifest lists."""
    cohort = _unmarked(_in_no_row(read_manifest(manifest)), selection)
    return with_notes(cohort, read_notes(manifest.parent))


def _check_place(root: Path, layout: str | None) -> None:
    """Refuse a layout that is unknown, and a place that is not there or cannot be read."""
    if layout is not None and layout not in NAMES:
        raise unknown("layout", layout, NAMES, CohortError)
    try:
        exists = root.exists()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered
        raise CohortError("cannot be read", path=root, reason="unreadable", found=error) from error
    if not exists:
        raise CohortError("does not exist", path=root, reason="not-found")


def _cohort_below(root: Path, layout: str | None, selection: Selection) -> Cohort:
    """Find the cases of a folder without a manifest."""
    files = volumes_below(root)
    cohort = _by_names(root, layout, selection, files)
    if cohort is not None:
        return cohort
    if layout is None and not files and holds_dicom(root):
        return _dicom_cohort(root, selection)
    raise _unrecognised(root, files, layout)


def _by_names(root: Path, layout: str | None, selection: Selection, files: Sequence[File]) -> Cohort | None:
    """Find the cases of a folder by the names of its volumes; None where they fit no layout."""
    notes = read_notes(root)
    _check_words(root, selection.select, files)
    fitting = (row for row in LAYOUTS if _may_fit(row, layout, files))
    cohorts = (_by_layout(row, root, selection, files, notes) for row in fitting)
    return next(filter(None, cohorts), None)


def _by_layout(
    row: Layout, root: Path, selection: Selection, files: Sequence[File], notes: ManifestNotes
) -> Cohort | None:
    """Find the cases of a folder by one layout; None where no names fit it."""
    finds = row.find(root, files)
    words = selection.select or selection.remembered or notes.select
    cases, problems, remarks = gather(root, finds, words)
    if not cases:
        return None
    regions = _regions(row, finds, cases)
    cohort = Cohort(root, row.name, tuple(cases), regions, tuple(problems), notes=tuple(remarks))
    cohort = _unmarked(with_account(cohort, finds, files), selection)
    return with_notes(_with_people(cohort, notes) if row.people else cohort, notes)


def _may_fit(row: Layout, asked: str | None, files: Sequence[File]) -> bool:
    """Return whether a layout was chosen; or, if none was chosen, whether its sign occurs and nothing is foreign."""
    if asked is not None:
        return asked == row.name
    if row.foreign and any(re.search(row.foreign, file.stem) for file in files):
        return False
    return any(re.search(row.sign, file.stem) for file in files)


def _regions(row: Layout, finds: Finds, cases: Sequence[Case]) -> Regions:
    return regions_of(cases, row.regions if finds.regions is None else finds.regions)


def _with_people(cohort: Cohort, notes: ManifestNotes) -> Cohort:
    """Group the visits of a person, unless `cohort.json` states the subjects."""
    if any("subject" in note for note in notes.cases.values()):
        return cohort
    cases, relatives = group_relatives(cohort.cases)
    return replace(cohort, cases=tuple(cases), notes=(*cohort.notes, *relatives))


def _in_no_row(cohort: Cohort) -> Cohort:
    """Note the volumes below a manifest's folder that no row names."""
    unused = _unlisted_volumes(cohort)
    if not unused:
        return cohort
    some = ", ".join(path.name for path in unused[:3])
    message = f"{len(unused)} volumes below the manifest's folder are in none of its rows, such as {some}"
    return replace(cohort, unused=unused, notes=(*cohort.notes, Problem(cohort.root, "in-no-row", message)))


def _unlisted_volumes(cohort: Cohort) -> tuple[Path, ...]:
    """Return the volumes below a manifest's folder that neither a case nor a problem names."""
    known = {path for case in cohort.cases for path in case.files.values()}
    known |= {problem.path for problem in cohort.problems}
    return tuple(file.path for file in volumes_below(cohort.root) if file.path not in known)


def _check_words(root: Path, words: Sequence[str], files: Sequence[File]) -> None:
    """Refuse a word for choosing among files that is in no file's name."""
    for word in words:
        if not any(count_words(file.path, [word]) for file in files):
            raise _word_in_no_name(root, word, files)


def _word_in_no_name(root: Path, word: str, files: Sequence[File]) -> CohortError:
    """Say that a word for choosing among files stands in no name."""
    some = ", ".join(file.path.name for file in files[:3])
    series = "Words are for names of files; a DICOM series is chosen by a rule for series."
    return CohortError(
        f"no file has the word {word!r} in its name",
        path=root,
        reason="select",
        found=f"names such as {some}" if files else "no volume",
        hint=None if files else series,
    )


def _dicom_cohort(root: Path, selection: Selection) -> Cohort:
    notes = read_notes(root)
    _check_words(root, selection.select, ())
    asked = replace(
        selection,
        series=selection.series or notes.series,
        allow=(*selection.allow, *notes.allow),
        reading=selection.reading | notes.reading,
        structures=notes.structures,
    )
    found = read_dicom_folder(root, asked)
    if not found.listing:
        raise _nothing_to_list(root, found.problems)
    drawn = _regions_of_structures(notes) or LESION
    cases = tuple(with_unique_ids(root, found.cases))
    cohort = Cohort(root, "dicom", cases, regions_of(cases, drawn), found.problems, found.listing, found.notes)
    return with_notes(_with_people(cohort, notes), notes)


def _regions_of_structures(notes: ManifestNotes) -> Regions:
    """Return the regions that structures make, with one label each, where they are named."""
    named = [name for name in notes.structures if name != "mask"]
    return {name: (label,) for label, name in enumerate(named, start=1)}


def _nothing_to_list(root: Path, problems: Sequence[Problem]) -> CohortError:
    if not problems:
        return CohortError("holds no DICOM series", path=root, reason="layout")
    first = problems[0]
    return CohortError("holds no DICOM that can be read", path=root, reason=first.reason, found=first.message)


def _unmarked(cohort: Cohort, selection: Selection) -> Cohort:
    """Leave out images with a mark that excludes them from training, unless the mark is allowed."""
    allow = {*selection.allow, *read_notes(cohort.root).allow}
    cases, problems = [], list(cohort.problems)
    for case in cohort.cases:
        kept, left_out = _unmarked_case(case, allow)
        problems += left_out
        if kept.images:
            cases.append(kept)
    return replace(cohort, cases=tuple(cases), problems=tuple(problems))


def _unmarked_case(case: Case, allow: Collection[str]) -> tuple[Case, list[Problem]]:
    """Return a case with the images that are allowed, and why the others are left out."""
    kept: dict[str, Path] = {}
    made: list[str] = []
    left_out: list[Problem] = []
    for name, path in case.images.items():
        marks = marks_on(case, name)
        mark = forbidden_mark(marks, allow)
        if mark is None:
            kept[name] = path
            made += [name] * ("synthetic" in marks)
        else:
            message = f"case {case.id}, {name}: {WARNINGS[mark]}; chiasm train --allow {mark} takes it"
            left_out.append(Problem(path, mark, message, case.id))
    return replace(case, images=kept, synthetic=tuple(made)), left_out


def volumes_below(root: Path) -> list[File]:
    """List the volumes below a folder in the order of their paths, through symbolic links, without hidden ones.

    Raises:
        CohortError: If a folder cannot be listed.
    """
    try:
        return [
            File("".join(f"{name}/" for name in path.relative_to(root).parts[:-1]) + stem, path)
            for path in visible_files(root)
            if (stem := volume_stem(path.name))
        ]
    except OSError as error:
        raise CohortError("cannot be listed", path=root, reason="unreadable", found=error) from error


def _unrecognised(root: Path, files: Sequence[File], layout: str | None) -> CohortError:
    found = _volumes_in_words(root, files)
    if layout is not None:
        example = next((row.example for row in LAYOUTS if row.name == layout), "DICOM series")
        return CohortError(f"does not fit layout {layout}", path=root, reason="layout", found=found, expected=example)
    if not any(root.iterdir()):
        return CohortError("is an empty folder", path=root, reason="unknown-layout")
    return CohortError(
        "fits no layout that is known",
        path=root,
        reason="unknown-layout",
        found=found + _misnamed_table(root),
        expected="one of " + ", ".join(NAMES),
        hint="Rename the files, or list them in a manifest.csv with the columns subject, t1, t2 or others."
        + " It holds DICOM too: chiasm inspect --layout dicom reads that alone." * (bool(files) and holds_dicom(root)),
    )


def _volumes_in_words(root: Path, files: Sequence[File]) -> str:
    """Say how many volumes a folder holds, and name some."""
    if not files:
        return f"no file that ends in {', '.join(VOLUME_SUFFIXES)}"
    some = ", ".join(str(file.path.relative_to(root)) for file in files[:3])
    return f"{amount(len(files), 'volume')} such as {some}"


def _misnamed_table(root: Path) -> str:
    """Name a table of the folder that may be a manifest with another name, if there is one."""
    tables = [path.name for path in sorted(root.iterdir()) if path.suffix.lower() in (".csv", ".tsv")]
    return f"; {tables[0]} does not have the name of a manifest" if tables else ""


# --- choosing --------------------------------------------------------------------------------------------------------


def count_modalities(cohort: Cohort) -> dict[str, int]:
    """Count the cases that have each modality."""
    return dict(sorted(Counter(name for case in cohort.cases for name in case.images).items()))


def select_cases(cohort: Cohort, sources: Sequence[str], target: str | None) -> Cohort:
    """Keep the cases with all these modalities; the others become problems that name what is missing.

    Problems of other modalities are left out.

    Args:
        cohort: From `find_cohort`.
        sources: Modalities that go in.
        target: The modality that comes out, or None where only sources are needed.

    Raises:
        CohortError: If no case has one of the modalities, or none has all of them.
    """
    wanted = list(dict.fromkeys([*sources, *([] if target is None else [target])]))
    _refuse_unknown_modality(cohort, wanted)
    kept, incomplete = without_problems([_incomplete(case, wanted) or case for case in cohort.cases])
    if not kept:
        raise CohortError(
            f"no case has {' and '.join(wanted)} together",
            path=cohort.root,
            reason="no-cases",
            found=_counted(cohort),
            hint=_way_to_modality(cohort, wanted),
        )
    return replace(cohort, cases=tuple(kept), problems=(*_problems_of(cohort, wanted), *incomplete))


def _incomplete(case: Case, wanted: Sequence[str]) -> Problem | None:
    """Say which of the modalities a case lacks, if any."""
    missing = [name for name in wanted if name not in case.images]
    if not missing:
        return None
    folder = next(iter(case.images.values())).parent
    message = f"case {case.id} has no {' and no '.join(missing)}"
    return Problem(folder, "missing-modality", message, case.id)


def _problems_of(cohort: Cohort, wanted: Sequence[str]) -> list[Problem]:
    """Return the problems of a cohort, without those of other modalities."""
    matters = {None, *MAPS, *wanted}
    return [problem for problem in cohort.problems if problem.modality in matters]


def _refuse_unknown_modality(cohort: Cohort, wanted: Sequence[str]) -> None:
    """Refuse a modality that no case has."""
    present = count_modalities(cohort)
    name = next((name for name in wanted if name not in present), None)
    if name is not None:
        known = role_of(name)
        raise CohortError(
            f"no case has the modality {name!r}",
            path=cohort.root,
            reason="unknown-modality",
            found=f"layout {cohort.layout} with {_counted(cohort)}",
            hint=f"It is called {known} here." if known in present else _way_to_modality(cohort, wanted),
        )


def _counted(cohort: Cohort) -> str:
    counts = count_modalities(cohort).items()
    return ", ".join(f"{name} ({count})" for name, count in counts) or "no modality that is known"


def _way_to_modality(cohort: Cohort, wanted: Sequence[str]) -> str | None:
    """Say how a modality that is there may be found, in layouts whose names state modalities."""
    present = count_modalities(cohort)
    if cohort.layout == "nnunet" and "target" in present:
        return 'Its labelsTr holds images: use --target target, or name them in dataset.json, as "target": "ct".'
    if cohort.layout != "dicom":
        return None
    lacking = next((name for name in wanted if name not in present), wanted[0])
    return _way_to_series(cohort, lacking)


def _way_to_series(cohort: Cohort, lacking: str) -> str:
    """Say how to name the DICOM series that is a modality, and which series were left out."""
    way = f'Say which series it is: chiasm train --series {lacking}=WORDS, or "series" in cohort.json.'
    way += " chiasm inspect lists them."
    if cohort.problems:  # it may be there and have been left out
        way += " Left out: " + "; ".join(problem.message.rstrip(".") for problem in cohort.problems[:3]) + "."
    return way
