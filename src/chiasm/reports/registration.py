"""`chiasm register`: two volumes of one patient aligned, the field, and a page to check it by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.cohorts.dicom_patients import parse_rules
from chiasm.errors import RunError, VolumeError, unknown
from chiasm.locks import locked
from chiasm.outputs import refuse_foreign, refuse_inputs, remove_files
from chiasm.progress import Progress
from chiasm.registration.alignment import Alignment, AlignmentKind, align, kind_named
from chiasm.registration.cohort import (
    RECORD,
    aligned_images,
    describe_alignment,
    describe_movement,
    farthest_mm,
    lay_on,
    read_records,
    write_field,
)
from chiasm.reports.drawing import png_address
from chiasm.reports.pages import render_page
from chiasm.reports.slices import as_seen
from chiasm.storage import read_json, write_json, write_text
from chiasm.volumes import Geometry, Reading, Volume, canonical, read_volume, write_volume
from chiasm.volumes.masks import find_mask, suggest_rule
from chiasm.volumes.screening import STRICT, files_at

VIEWS = ("sagittal", "coronal", "axial")
#: What a registration writes, beside labels-N.nii.gz.
FILES = ("moved.nii.gz", "known.nii.gz", "matrix.txt", "field.nii.gz", RECORD, "registration.html")
SQUARES = 8  # of the checkerboard, along the longer side
PAGES = 24  # pairs of a cohort with a page of their own
EDGE = 0.8  # quantile of the gradient above which an edge is drawn


@dataclass(frozen=True, eq=False)
class Registered:
    """What a registration left behind.

    Attributes:
        folder: Where the files lie.
        alignment: Where the points of the fixed volume lie in the moving one.
        image: The moving volume on the fixed one's grid; voxels that it does not cover have its darkest value.
        report: The page.
        covered: Share of the fixed grid that the moving volume covers.
    """

    folder: Path
    alignment: Alignment
    image: Volume
    report: Path
    covered: float


def register(
    moving: Path,
    fixed: Path,
    out: Path,
    *,
    kind: AlignmentKind = "demons",
    labels: Sequence[Path] = (),
    seed: int = 0,
    reading: Reading = STRICT,
    series: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Registered:
    """Align one volume of a patient with another, on its grid, and write how.

    The folder receives `moved.nii.gz`, `known.nii.gz` if the moving volume does not cover the
    whole grid (1 where it does; elsewhere `moved` has its darkest value), `labels-N.nii.gz` for
    each label map (nearest neighbour), `matrix.txt` (fixed world to moving world, mm, RAS+),
    `field.nii.gz` with Demons (the whole displacement in mm, as ITK and ANTs
    read it: LPS), `registration.json` and `registration.html`.

    Args:
        moving: The volume to align.
        fixed: The volume that stays.
        out: Folder for the results.
        kind: "rigid", "affine" or "demons".
        labels: Label maps on the moving volume's grid, resampled with it.
        seed: Of what mutual information is estimated from.
        reading: What to assume of files whose headers leave a question open.
        series: Which DICOM series each is, where a place holds several, as ``moving=WORDS`` and ``fixed=WORDS``.
        overwrite: Whether to replace another registration in `out`.
        progress: Called with steps done, all steps, and what is done.

    Raises:
        VolumeError: If a file cannot be read, or the two do not come together.
        RunError: If another process writes to `out`, a file that is read would be replaced, or `out` holds another
            registration or files of somebody else and `overwrite` is False.
        RecipeError: If `kind` is unknown, or `series` names neither volume.
        ChiasmError: If the folder cannot be written.
    """
    kind, rules = kind_named(kind), parse_rules(series)
    if strange := set(rules) - {"moving", "fixed"}:
        raise unknown("volume to choose a series for", min(strange), ("moving", "fixed"))
    inputs = [file for path in (fixed, moving, *labels) for file in files_at(path)]
    refuse_inputs(map(out.joinpath, _files(len(labels))), inputs, what="the registration")
    with locked(out):
        still = read_volume(fixed, reading=reading, series=rules.get("fixed"))
        mobile = read_volume(moving, reading=reading, series=rules.get("moving"))
        maps = [read_volume(path, labels=True, reading=reading) for path in labels]
        asked = {"kind": kind, "seed": seed, "voxels": _digest([still, mobile, *maps])}
        _make_room(out, asked, _files(len(labels)), overwrite=overwrite)
        alignment = _aligned(still, mobile, moving, kind, seed, progress)
        record = {"moving": moving.name, "fixed": fixed.name, **asked}
        write_json(out / RECORD, record)  # from here on the folder is this registration's
        image, covered, _ = lay_on(still.geometry, mobile, alignment)
        _write_moved(out, image, covered)
        _write_maps(out, maps, alignment, still.geometry)
        _write_transform(out, alignment, still.geometry)
        write_json(out / RECORD, {**record, **describe_alignment(alignment)})
        page = out / "registration.html"
        write_text(page, render_page("registration.html", _content(still, mobile, image, alignment)))
        return Registered(out, alignment, image, page, float(covered.mean()))


def _write_moved(out: Path, image: Volume, covered: NDArray[np.bool_]) -> None:
    """Write the registered image, and which of its voxels are known where not all are."""
    write_volume(out / "moved.nii.gz", image.array, image.geometry)
    if covered.all():
        (out / "known.nii.gz").unlink(missing_ok=True)
    else:
        write_volume(out / "known.nii.gz", covered, image.geometry, labels=True)


def _write_maps(out: Path, maps: Sequence[Volume], alignment: Alignment, grid: Geometry) -> None:
    """Write label maps of the moving volume on the fixed one's grid."""
    for number, volume in enumerate(maps, 1):
        aligned = alignment.resample_moving(volume, grid, order=0)
        write_volume(out / f"labels-{number}.nii.gz", aligned.array, grid, labels=True)


def _write_transform(out: Path, alignment: Alignment, grid: Geometry) -> None:
    """Write the matrix as text, and the displacement where there is one."""
    lines = [" ".join(f"{value:.9g}" for value in row) for row in alignment.matrix]
    write_text(out / "matrix.txt", "\n".join(lines) + "\n")
    if alignment.field_mm is not None:
        write_field(out / "field.nii.gz", alignment, grid)


def _digest(volumes: Sequence[Volume]) -> str:
    """Hash volumes by their voxels and where these lie."""
    digest = hashlib.sha256()
    for volume in volumes:
        digest.update(volume.geometry.affine.tobytes())
        digest.update(np.ascontiguousarray(volume.array).tobytes())
    return digest.hexdigest()


def _files(labels: int) -> tuple[str, ...]:
    """List what a registration with so many label maps may write."""
    return (*FILES, *(f"labels-{number}.nii.gz" for number in range(1, labels + 1)))


def _make_room(out: Path, asked: dict[str, Any], names: Sequence[str], *, overwrite: bool) -> None:
    """Refuse to mix two registrations in a folder, or remove the files of the first.

    Raises:
        RunError: If the folder holds another one, or files of somebody else, and `overwrite` is False.
    """
    if not (out / RECORD).is_file():
        if not overwrite:
            refuse_foreign(out, names, way_out="To replace them: chiasm register --overwrite.")
        return
    differing = _differences(read_json(out / RECORD), asked)
    if not differing:
        return
    if not overwrite:
        raise RunError(
            f"holds another registration, which differs in {' and '.join(differing)}",
            path=out,
            reason="other-registration",
            hint="Give another folder with -o, or replace what it holds: chiasm register --overwrite.",
        )
    _remove_written(out)


def _differences(before: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Say in words how two registrations differ in what was asked for."""
    words = {"kind": "the kind", "seed": "the seed", "voxels": "what was registered"}
    return [words[name] for name, value in asked.items() if before.get(name, value) != value]


def _remove_written(out: Path) -> None:
    """Remove what a registration wrote, with however many label maps."""
    written = [path.name for path in out.glob("labels-*.nii.gz") if re.fullmatch(r"labels-\d+\.nii\.gz", path.name)]
    remove_files(out, (*FILES, *written))


def _aligned(
    still: Volume, mobile: Volume, moving: Path, kind: AlignmentKind, seed: int, progress: Progress | None
) -> Alignment:
    try:
        return align(still, mobile, kind, seed=seed, progress=progress)
    except VolumeError as error:
        raise VolumeError(
            error.what, path=moving, reason=error.reason, found=error.found, expected=error.expected, hint=error.hint
        ) from error


def report_registered(folder: Path, *, pages: int = PAGES) -> Path:
    """Write `index.html` of a cohort that `align_cohort` registered, what looks worst first, and pages of those.

    Args:
        folder: Holds a folder of each case, such as `RUN/registered`.
        pages: At most as many cases get a page of their own.

    Returns:
        The page.

    Raises:
        RunError: If nothing was registered there.
        ChiasmError: If a scan has gone, or a page cannot be written.
    """
    records = read_records(folder)
    if not records:
        raise RunError("holds no registered cases", path=folder, reason="no-registration")
    pairs = [(case, name, one) for case, record in records.items() for name, one in aligned_images(record).items()]
    pairs.sort(key=lambda pair: pair[2]["mutual_information"][-1])
    rows = []
    for number, (case, name, one) in enumerate(pairs):
        page = _write_pair_page(folder, case, name, records[case]) if number < pages else ""
        rows.append({"case": case, "page": page, **_show_pair(name, one)})
    moved = {case: farthest_mm(record) for case, record in records.items()}
    content = {
        "kind": "registration",
        "title": "Are the pairs aligned?",
        "asked": f"{next(iter(records.values()))['asked']['kind']} registration: {describe_movement(moved)}. "
        "The pairs that share the least information come first: open their pages and look at the edges.",
        "rows": rows,
    }
    write_text(folder / "index.html", render_page("registered.html", content))
    return folder / "index.html"


def _write_pair_page(folder: Path, case: str, name: str, record: dict[str, Any]) -> str:
    """Write the page of a pair; return its address in the folder."""
    page = f"{case}/{name}.html"
    write_text(folder / page, render_page("registration.html", _content_of(record, folder / case, name)))
    return page


def _show_pair(name: str, one: dict[str, Any]) -> dict[str, Any]:
    """Make the cells of a pair, in the order of the page's columns."""
    before, *_, after = one["mutual_information"]
    scores = [
        f"{one['mean_displacement_mm']:.1f}",
        f"{before:.3f}",
        f"{after:.3f}",
        f"{one['least_jacobian']:.2f}",
        f"{100 * one['covered']:.0f}",
    ]
    return {"cells": [name, *scores], "worse": after <= before}


def _content_of(record: dict[str, Any], place: Path, name: str) -> dict[str, Any]:
    """Collect what a pair's page shows from files; the field itself is not read again."""
    one = aligned_images(record)[name]
    fixed, moving = (read_volume(Path(record["paths"][image])) for image in (record["asked"]["fixed"], name))
    alignment = Alignment(
        one["kind"],
        np.array(one["matrix"]),
        None,
        fixed.geometry,
        tuple(one["mutual_information"]),
        one["least_jacobian"],
        one["most_jacobian"],
        one["mean_displacement_mm"],
        one["seconds"],
    )
    return _content(fixed, moving, read_volume(place / f"{name}.nii.gz"), alignment)


def _content(fixed: Volume, moving: Volume, moved: Volume, alignment: Alignment) -> dict[str, Any]:
    still = canonical(fixed)
    as_scanned = Alignment("rigid", np.eye(4), None, still.geometry, (), 1, 1, 0, 0)
    before = canonical(lay_on(fixed.geometry, moving, as_scanned).image)
    after = canonical(moved)
    mask, _ = find_mask(still, suggest_rule(still))
    middle = [(part.start + part.stop) // 2 for part in box_of(mask)]
    rows = [
        {"view": view, "pictures": _pictures((still, before, after), alignment, axis, middle[axis])}
        for axis, view in enumerate(VIEWS)
    ]
    information = " → ".join(f"{value:.3f}" for value in alignment.information)
    scores = {
        "kind": alignment.kind,
        "mutual information inside the fixed mask (nats)": information,
        "mean displacement": f"{alignment.mean_mm:.2f} mm",
        "Jacobian (0 or less: folded)": f"{alignment.least_jacobian:.2f} to {alignment.most_jacobian:.2f}",
        "time": f"{alignment.seconds:.0f} s",
    }
    return {
        "kind": "registration",
        "title": "Are they aligned?",
        "asked": "Look at the edges: they should follow the same structures in both. Numbers alone cannot show it.",
        "scores": scores,
        "worse": alignment.information[-1] <= alignment.information[0],
        "rows": rows,
    }


def _pictures(
    volumes: tuple[Volume, Volume, Volume], alignment: Alignment, axis: int, index: int
) -> list[dict[str, Any]]:
    """Show one slice of fixed, moving and registered: each alone, edges of the first on the others, checkerboards."""
    still, before, after = (_plane(volume.array, axis, index) for volume in volumes)
    aspect, edges = _aspect(volumes[0].geometry, axis), _edges(still)
    shown = {
        "fixed": _picture(still, aspect),
        "moving, as scanned": _picture(before, aspect),
        "moving, registered": _picture(after, aspect),
        **_folding(alignment, volumes[0], axis, index),
        "edges of the fixed one on it, before": _picture(before, aspect, edges),
        "edges of the fixed one on it, after": _picture(after, aspect, edges),
        "checkerboard, before": _picture(_checkered(still, before), aspect),
        "checkerboard, after": _picture(_checkered(still, after), aspect),
    }
    return [{"name": name, "data": picture} for name, picture in shown.items()]


def _plane(array: NDArray[Any], axis: int, index: int) -> NDArray[np.float64]:
    """Cut a slice as it is looked at, see `as_seen`; values 0 to 1.

    Fat may be four times as bright as brain: white is at most twice what half of the brighter voxels have.
    """
    plane = np.take(array, index, axis=axis).astype(np.float64)
    low, high = np.quantile(plane, (0.01, 0.995))
    bright = plane[plane > plane.mean()]
    if bright.size:
        high = min(high, 2 * float(np.median(bright)) - low)
    plane = np.clip((plane - low) / (high - low if high > low else 1), 0, 1)
    return as_seen(plane)


def _aspect(geometry: Geometry, axis: int) -> float:
    across, up = (step for other, step in enumerate(geometry.spacing_mm) if other != axis)
    return up / across


def _edges(plane: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Find thin edges of every contrast: crests of the gradient, relative to how bright the surroundings are."""
    from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude, maximum_filter1d

    around = np.sqrt(gaussian_filter(plane**2, 8.0)) + 0.05  # so that a skull does not outshine all else
    steep = gaussian_gradient_magnitude(plane / around, 1.0)
    crest = np.any([steep == maximum_filter1d(steep, 3, axis=axis) for axis in (0, 1)], axis=0)
    edges: NDArray[np.bool_] = crest & (steep > max(float(np.quantile(steep, EDGE)), 1e-6))
    return edges


def _checkered(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    side = max(one.shape) / SQUARES
    rows, columns = np.indices(one.shape)
    return np.where(((rows // side) + (columns // side)) % 2 == 0, one, other)


def _folding(alignment: Alignment, still: Volume, axis: int, index: int) -> dict[str, dict[str, Any]]:
    """Show where the field shrinks and stretches; nothing without a field."""
    if alignment.field_mm is None:
        return {}
    from chiasm.volumes import resample

    voxels = np.einsum("ab,bijk->aijk", np.linalg.inv(alignment.grid.affine[:3, :3]), alignment.field_mm)
    rows = np.stack([np.stack(np.gradient(part)) for part in voxels]) + np.eye(3)[:, :, None, None, None]
    jacobian = np.linalg.det(rows.transpose(2, 3, 4, 0, 1)).astype(np.float32)
    there = resample(Volume(jacobian, alignment.grid), still.geometry, fill=1.0)
    plane = as_seen(np.take(there.array, index, axis=axis))
    shown = _picture(np.clip((plane - 0.5), 0, 1), _aspect(still.geometry, axis), colours="PuOr")
    return {"Jacobian, 0.5 (orange) to 1.5 (violet)": shown}


def _picture(
    plane: NDArray[Any], aspect: float, edges: NDArray[np.bool_] | None = None, colours: str = "gray"
) -> dict[str, Any]:
    """Colour a slice; edges are drawn over it."""
    from matplotlib import colormaps

    pixels = colormaps[colours](np.asarray(plane), bytes=True)
    if edges is not None:
        pixels[edges] = (242, 193, 78, 255)
    height, width = plane.shape
    return {"address": png_address(pixels), "ratio": f"{width} / {height * aspect:.2f}"}
