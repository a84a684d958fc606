"""Any volumes side by side in one page: linked panes, each volume on its own grid, one place in the world.

The page is one file that needs no network.  It holds every voxel as it is
stored: nothing is cropped, rounded or resampled.  Volumes of different grids
are linked by their world coordinates.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.cohorts.completed import is_synthetic
from chiasm.cohorts.dicom_patients import holds_dicom
from chiasm.errors import RunError, VolumeError, unknown
from chiasm.outputs import refuse_inputs
from chiasm.prediction.manifest import FILE, Entry, Manifest, check_files, find_path, folders_of, read_manifest
from chiasm.reports.case_page import viewer_script
from chiasm.reports.case_volumes import nifti_start, to_text
from chiasm.reports.drawing import label_with, show_number, show_unit
from chiasm.reports.gallery import SOURCE_WINDOW, colour_slice, rising
from chiasm.reports.pages import render_page, script_data
from chiasm.reports.slices import as_seen
from chiasm.storage import write_text
from chiasm.volumes import Reading, Volume, canonical, read_volume
from chiasm.volumes.dicom_choice import choose_series
from chiasm.volumes.dicom_maps import read_map
from chiasm.volumes.dicom_scan import find_series, is_dicom
from chiasm.volumes.screening import STRICT
from chiasm.volumes.streams import pack

MOST_BYTES = 200_000_000  # of a page; browsers hold no text of more than about 500 MB
MOST_PANES = 12  # browsers draw in no more than 16 places of a page at once
SAMPLE = 500_000  # voxels that a window is chosen from
MOST_LABELS = 32  # an image has more values than a map of labels
PARALLEL = 1e-3  # cosines of axes that differ by less are of one direction
PREDICTIONS = "predictions"  # in the folder of `chiasm run`
#: What marks a folder of results, and its page.
PAGES = {
    "evaluation.csv": "report.html",
    "registration.json": "registration.html",
    "log.jsonl": "progress.html",
    "key.csv": "rate.html",
}
TEMPORARY = ("chiasm-view-", "view.html")  # how the name of a temporary folder begins, and its only file
KEPT_S = 24 * 60 * 60  # so long a page stays in its temporary folder at least
MARK = '<meta name="generator" content="chiasm view">'  # in a page that may be replaced

Colours = Literal["gray", "expected"]


class Shown(NamedTuple):
    """A volume to be shown.

    Attributes:
        title: Above its pane.
        path: Where it lies.
        colours: Shades of grey, or those of the expected error.
        unit: Of its values, or "".
        series: Which DICOM series, where the place holds several.
    """

    title: str
    path: Path
    colours: Colours = "gray"
    unit: str = ""
    series: str | None = None


class Viewed(NamedTuple):
    """What was written.

    Attributes:
        page: The file.
        titles: Of the panes, in their order.
        notes: What is not shown, and why.
    """

    page: Path
    titles: tuple[str, ...]
    notes: tuple[str, ...]


class Pane(NamedTuple):
    """A volume as it stands in the page; its axes run right, front and up, as nearly as they can."""

    content: str
    settings: dict[str, Any]
    stills: list[dict[str, str]]


def view(
    places: Sequence[Path | str],
    out: Path | str | None = None,
    *,
    case: str | None = None,
    series: Sequence[str] = (),
    reading: Reading = STRICT,
) -> Viewed:
    """Write a page that shows volumes side by side, with linked cursors.

    Args:
        places: Files and DICOM folders, of any tool; or one folder of `chiasm predict` or `chiasm run`, of which a
            case is shown: sources, synthetic image, expected error.
        out: The page; by default `view.html` in a new temporary folder. Such pages of this user that are older than
            a day are removed.
        case: Of a folder of predictions; its first one by default.
        series: DICOM series by number or words: one for all places, or one for each DICOM place in order.
        reading: What to assume of files whose headers leave a question open.

    Returns:
        Where the page is, and what it shows.

    Raises:
        VolumeError: If a place is missing or is no volume, or there are too many or too large volumes for a page.
        RunError: If a folder of predictions is damaged or has no such case, or `out` was not written by this command.
    """
    given = [Path(place) for place in places]
    folders = _predictions_in(given)
    if not folders and case is not None:
        raise RunError(
            "--case is for one folder of predictions", reason="case", hint="Give the folder that chiasm predict wrote."
        )
    entry: Entry | None = None
    notes: list[str] = []
    if not folders:
        wanted = _volumes_at(given, series)
    else:
        folder, manifest, entry = _case_of(folders, case)
        wanted, notes = _volumes_of(folder, manifest, entry)
    _check_count(wanted)
    page = _page_at(out, [one.path for one in wanted])
    panes = [_pane(one, reading) for one in wanted]
    title = entry.case if entry else wanted[0].title if len(wanted) == 1 else f"{len(wanted)} volumes"
    warnings = (*notes, *(entry.warnings if entry else ()))
    text = _checked(_render(panes, title, warnings), panes)
    page = page or _temporary_page()  # only now: a page that is refused leaves no folder
    write_text(page, text)
    return Viewed(page, tuple(one.title for one in wanted), tuple(notes))


# What is shown


def _predictions_in(places: Sequence[Path]) -> list[Path]:
    """Return the folders of predictions that are asked for, one for each of several models; none where volumes are."""
    if len(places) != 1:
        return []
    candidates = (folders_of([place]) for place in (places[0], places[0] / PREDICTIONS))
    return next((folders for folders in candidates if (folders[0] / FILE).is_file()), [])


def _case_of(folders: Sequence[Path], case: str | None) -> tuple[Path, Manifest, Entry]:
    """Return the case that is asked for, or the first one, and where it is."""
    manifests = {folder: read_manifest(folder) for folder in folders}
    found = {entry.case: (folder, one, entry) for folder, one in manifests.items() for entry in one.cases}
    if not found:
        raise RunError("holds no predicted case", path=folders[0], reason="no-cases")
    if case is not None and case not in found:
        raise unknown("case", case, list(found), RunError)
    chosen = found[next(iter(found)) if case is None else case]
    check_files(chosen[0], chosen[2])
    return chosen


def _volumes_of(folder: Path, manifest: Manifest, entry: Entry) -> tuple[list[Shown], list[str]]:
    """List the volumes of a predicted case, and the sources that are no longer where they were."""
    notes = []
    shown = []
    for name, file in zip(manifest.sources, entry.sources):
        path = find_path(folder, manifest, file)
        if path.exists():
            shown.append(Shown(label_with("Source", name), path))
        else:
            notes.append(f"The source {name} is not shown: {path} is not there any more.")
    shown.append(Shown(label_with("Synthetic", manifest.target), folder / entry.image, unit=manifest.unit))
    for title, made in (("Expected error", entry.expected_error), ("Spread of the models", entry.spread)):
        if made is not None:
            shown.append(Shown(title, folder / made, "expected", manifest.unit))
    return shown, notes


def _volumes_at(places: Sequence[Path], series: Sequence[str]) -> list[Shown]:
    """List the volumes at places that were named."""
    for place in places:
        _check_folder(place)
    return [
        Shown(_marked(title if rule is None else f"{title}: {rule}", place, rule), place, series=rule)
        for place, title, rule in zip(places, _titles(places), _rules(places, series))
    ]


def _marked(title: str, place: Path, rule: str | None) -> str:
    """Add to the title of a volume that it is synthetic, where its header or a file beside it says so."""
    if is_dicom(place):
        found = find_series(place)
        shown = found if len(found) < 2 else [choose_series(found, rule, place)]
        is_made = any(one.synthetic for one in shown)
    else:
        is_made = is_synthetic(place)
    return f"{title} (synthetic)" if is_made else title


def _check_folder(place: Path) -> None:
    """Refuse a folder that is no place of volumes; one of results is named with its page and its predictions."""
    page = next((page for mark, page in PAGES.items() if (place / mark).is_file() and (place / page).is_file()), None)
    if page is not None:
        predicted = sorted(place.glob(f"jobs/*/{PREDICTIONS}/{FILE}"))
        jobs = f", or a case of one of its jobs: chiasm view {predicted[0].parent}" if predicted else ""
        raise VolumeError(
            "is a folder of results, not of volumes",
            path=place,
            reason="no-volume",
            hint=f"Its page is {place / page}. Name volumes to show{jobs}.",
        )
    if place.is_dir() and not holds_dicom(place):
        raise VolumeError(
            "is a folder without DICOM files and without predictions",
            path=place,
            reason="no-volume",
            hint="Name files, folders of one DICOM series, or a folder that chiasm predict or chiasm run wrote.",
        )


def _rules(places: Sequence[Path], series: Sequence[str]) -> list[str | None]:
    """Return which series is wanted at each place; None where it is no DICOM, or none is asked for."""
    if not series:
        return [None] * len(places)
    are_dicom = [is_dicom(place) for place in places]
    if len(series) not in (1, sum(are_dicom)):
        raise VolumeError(
            "the number of --series is neither one nor that of the DICOM places",
            reason="series",
            found=len(series),
            expected=sum(are_dicom),
        )
    rules = cycle(series)
    return [next(rules) if is_one else None for is_one in are_dicom]


def _titles(places: Sequence[Path]) -> list[str]:
    """Call each place by its name, with as many folders above as make the names differ.

    >>> _titles([Path("a/t1.nii"), Path("b/t1.nii"), Path("b/t2.nii")])
    ['a/t1.nii', 'b/t1.nii', 't2.nii']
    """
    return [_title(place.absolute(), [other.absolute() for other in places]) for place in places]


def _title(place: Path, places: Sequence[Path]) -> str:
    for length in range(1, len(place.parts)):
        end = place.parts[-length:]
        if sum(other.parts[-length:] == end for other in places) == 1:
            return "/".join(end)
    return place.name


def _check_count(wanted: Sequence[Shown]) -> None:
    if not 1 <= len(wanted) <= MOST_PANES:
        raise VolumeError(
            "a page cannot show so many volumes", reason="too-many", found=len(wanted), expected=f"1 to {MOST_PANES}"
        )


def _page_at(out: Path | str | None, inputs: Sequence[Path]) -> Path | None:
    """Return the page that was asked for, if any; a file that this command did not write is not replaced."""
    if out is None:
        return None
    page = Path(out)
    refuse_inputs([page], inputs, what="the page")
    if page.exists() and not _is_own(page):
        raise RunError(
            "is there already, and chiasm view did not write it",
            path=page,
            reason="occupied",
            hint="Choose another file with -o.",
        )
    return page


def _temporary_page() -> Path:
    """Return where a page will be in a new temporary folder, once the old ones are removed.

    The page outlasts its command, because a browser opens it afterwards; so a later command removes it.
    """
    prefix, name = TEMPORARY
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # it belongs to somebody else, or another command removes it at the same time
            if _is_old(folder):
                (folder / name).unlink(missing_ok=True)
                folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix)) / name


def _is_old(folder: Path) -> bool:
    """Return whether a folder is this user's, holds nothing but a page of this command, and that for a day."""
    found = folder.lstat()
    if found.st_uid != getattr(os, "getuid", lambda: found.st_uid)() or folder.is_symlink():
        return False
    pages = list(folder.iterdir())
    is_own = all(page.name == TEMPORARY[1] and _is_own(page) for page in pages)
    return is_own and time.time() - found.st_mtime > KEPT_S


def _is_own(page: Path) -> bool:
    """Return whether a file is a page of this command."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return MARK.encode() in file.read(4096)


# A volume in the page


def _pane(one: Shown, reading: Reading) -> Pane:
    """Read a volume and pack it as it is: only the order of its axes may change."""
    read = _read(one, reading)
    volume = canonical(Volume(_smallest(read.array), read.geometry))
    window = _window(volume.array, one.colours)
    affine = volume.geometry.affine
    settings = {
        "title": one.title,
        "colours": one.colours,
        "unit": show_unit(one.unit),
        "window": window,
        "dims": volume.array.shape,
        "affine": affine.tolist(),
        "inverse": np.linalg.inv(affine).tolist(),
        "whole": volume.array.dtype.kind in "iu",
        "centre": _centre(volume.array),
        "about": _describe(volume),
    }
    return Pane(to_text(pack(_nifti(volume), "gzip")), settings, list(_stills(volume, one, window)))


def _read(one: Shown, reading: Reading) -> Volume:
    """Read a volume, also a parametric map of DICOM, which no other command takes."""
    try:
        return read_volume(
            one.path, reading=reading, series=one.series, allow_thin=True, allow_constant=True, narrow=True
        )
    except VolumeError as error:
        if error.reason != "datatype" or not one.path.is_file() or not is_dicom(one.path):
            raise
        return read_map(one.path)


def _smallest(array: NDArray[Any]) -> NDArray[Any]:
    """Store whole numbers of 16 bits as such, and what a viewer has no type for as float32; no value changes."""
    if array.dtype in (np.uint8, np.int16, np.uint16):
        return array
    if array.size and np.abs(array).max() <= 32767 and np.array_equal(array, np.rint(array)):
        return array.astype(np.int16)
    return array.astype(np.float32, copy=False)


def _nifti(volume: Volume) -> bytes:
    """Write a volume as a NIfTI file: its values as they are, in their own type."""
    values = volume.array.astype(volume.array.dtype.newbyteorder("<"), copy=False)
    return nifti_start(volume.geometry, volume.array.dtype) + values.tobytes(order="F")


def _window(array: NDArray[Any], colours: Colours) -> tuple[float, float]:
    """Choose the lowest and the highest shown value: quantiles of what is not background; of labels all."""
    values = array.ravel()[:: max(1, array.size // SAMPLE)]
    if array.dtype.kind in "iu" and len(np.unique(values)) <= MOST_LABELS:
        return rising(float(array.min()), float(array.max()))
    inside = values[values != values.min()]
    low, high = np.quantile(inside if inside.size else values, SOURCE_WINDOW).tolist()
    return rising(0.0 if colours == "expected" else low, high)


def _centre(array: NDArray[Any]) -> list[int]:
    """Find the voxel in the middle of what is not background."""
    inside = array != array.min()
    box = box_of(inside) if inside.any() else tuple(slice(0, side) for side in array.shape)
    return [(side.start + side.stop - 1) // 2 for side in box]


def _describe(volume: Volume) -> str:
    """Say how large a volume is, how far its voxels are apart, and what values it has."""
    sides = "×".join(map(str, volume.array.shape))
    spacing = "×".join(f"{mm:.3g}" for mm in volume.geometry.spacing_mm)
    low, high = show_number(float(volume.array.min())), show_number(float(volume.array.max()))
    return f"{sides} voxels of {spacing} mm, values {low} to {high}"


def _stills(volume: Volume, one: Shown, window: tuple[float, float]) -> Iterator[dict[str, str]]:
    """Cut a slice of each plane through the middle, for browsers that cannot draw volumes."""
    centre = _centre(volume.array)
    colours = "viridis" if one.colours == "expected" else "gray"
    spacing = volume.geometry.spacing_mm
    for axis, name in ((2, "axial"), (1, "coronal"), (0, "sagittal")):
        across, up = (side for side in range(3) if side != axis)
        plane = as_seen(volume.array.take(centre[axis], axis=axis))
        yield {
            "address": colour_slice(plane.astype(np.float32), window, colours),
            "alt": f"{one.title}, {name} slice {centre[axis] + 1}",
            "ratio": f"{plane.shape[1] * spacing[across]:.4g} / {plane.shape[0] * spacing[up]:.4g}",
        }


# The page


def _render(panes: Sequence[Pane], title: str, warnings: Sequence[str]) -> str:
    """Fill the page."""
    script, licences = viewer_script()
    settings = {"panes": [pane.settings for pane in panes], "tilted": _differ(panes)}
    content = {
        "kind": "volumes",
        "title": title,
        "asked": "",
        "mark": MARK,
        "warnings": warnings,
        "panes": [(str(number), pane.settings, pane.stills) for number, pane in enumerate(panes)],
        "volumes": {str(number): pane.content for number, pane in enumerate(panes)} if script else {},
        "settings": script_data(settings),
        "script": script,
        "licences": licences,
    }
    return render_page("view.html", content)


def _differ(panes: Sequence[Pane]) -> bool:
    """Return whether the axes of the volumes run in different directions, so that planes are cut in the world."""
    axes = [np.array(pane.settings["affine"])[:3, :3] for pane in panes]
    directions = [matrix / np.linalg.norm(matrix, axis=0) for matrix in axes]
    return any(np.abs(one - directions[0]).max() > PARALLEL for one in directions)


def _checked(page: str, panes: Sequence[Pane]) -> str:
    """Refuse a page that no browser would open."""
    size = len(page)
    if size <= MOST_BYTES:
        return page
    sizes = ", ".join(f"{pane.settings['title']} {len(pane.content) / 1e6:.0f} MB" for pane in panes)
    raise VolumeError(
        "the page would be too large for a browser",
        reason="too-large",
        found=f"{size / 1e6:.0f} MB: {sizes}",
        expected=f"at most {MOST_BYTES / 1e6:.0f} MB",
        hint="Name fewer volumes, or smaller ones.",
    )
