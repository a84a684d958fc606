"""`chiasm register`: two volumes of one patient brought together, the field, and a page to check it by."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.masks import box_of, find_mask, suggest_rule
from chiasm.cohorts.registration import GRID_MM, Alignment, Kind, Progress, align
from chiasm.errors import VolumeError
from chiasm.evidence.drawing import render_page
from chiasm.storage import make_folder, whole_file, write_json, write_text
from chiasm.volumes import Geometry, Volume, canonical, grid_with_spacing, read_volume, write_volume

VIEWS = ("sagittal", "coronal", "axial")
SQUARES = 8  # of the checkerboard, along the longer side
EDGE = 0.8  # quantile of the gradient above which an edge is drawn


@dataclass(frozen=True, eq=False)
class Registered:
    """What a registration left behind.

    Attributes:
        folder: Where the files lie.
        alignment: Where the points of the fixed volume lie in the moving one.
        image: The moving volume on the fixed one's grid.
        report: The page.
    """

    folder: Path
    alignment: Alignment
    image: Volume
    report: Path


def register(
    moving: Path,
    fixed: Path,
    out: Path,
    *,
    kind: Kind = "demons",
    labels: Sequence[Path] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Registered:
    """Bring one volume of a patient to the grid of another, and write how.

    The folder receives `moved.nii.gz`, `labels-N.nii.gz` for each label map
    (nearest neighbour), `matrix.txt` (fixed world to moving world, mm, RAS+),
    `field.nii.gz` with Demons (the whole displacement in mm, as ITK and ANTs
    read it: LPS), `registration.json` and `registration.html`.

    Args:
        moving: The volume to bring.
        fixed: The volume that stays.
        out: Folder for the results.
        kind: "rigid", "affine" or "demons".
        labels: Label maps on the moving volume's grid, brought along.
        seed: Of what mutual information is estimated from.
        progress: Called with steps done, all steps, and what is done.

    Raises:
        VolumeError: If a file cannot be read, or the two do not come together.
        RecipeError: If `kind` is unknown.
        ChiasmError: If the folder cannot be written.
    """
    still, mobile = read_volume(fixed), read_volume(moving)
    maps = [read_volume(path, labels=True) for path in labels]
    make_folder(out)
    try:
        alignment = align(still, mobile, kind, seed=seed, progress=progress)
    except VolumeError as error:
        raise VolumeError(
            error.what, path=moving, reason=error.reason, found=error.found, expected=error.expected, hint=error.hint
        ) from error
    image = alignment.bring(mobile, still.geometry)
    write_volume(out / "moved.nii.gz", image.array, still.geometry)
    for number, volume in enumerate(maps, 1):
        brought = alignment.bring(volume, still.geometry, order=0)
        write_volume(out / f"labels-{number}.nii.gz", brought.array, still.geometry, labels=True)
    write_text(
        out / "matrix.txt", "\n".join(" ".join(f"{value:.9g}" for value in row) for row in alignment.matrix) + "\n"
    )
    if alignment.field_mm is not None:
        write_field(out / "field.nii.gz", alignment, still.geometry)
    figures = figures_of(alignment)
    write_json(out / "registration.json", {"moving": moving.name, "fixed": fixed.name, "seed": seed, **figures})
    page = out / "registration.html"
    write_text(page, render_page("registration.html", _content(still, mobile, image, alignment)))
    return Registered(out, alignment, image, page)


def figures_of(alignment: Alignment) -> dict[str, Any]:
    """Return what can be told of a registration without knowing the truth, ready for JSON."""
    return {
        "kind": alignment.kind,
        "mutual_information": [round(value, 4) for value in alignment.information],
        "mean_displacement_mm": round(alignment.mean_mm, 3),
        "least_jacobian": round(alignment.least_jacobian, 4),
        "most_jacobian": round(alignment.most_jacobian, 4),
        "seconds": round(alignment.seconds, 1),
    }


def write_field(path: Path, alignment: Alignment, fixed: Geometry) -> None:
    """Write the whole displacement as a NIfTI vector image that ITK and ANTs apply: mm, LPS, on a grid of 2 mm."""
    import nibabel as nib

    upright = canonical(Volume(np.zeros(fixed.shape, np.uint8), fixed)).geometry
    grid = grid_with_spacing(upright, [max(GRID_MM, step) for step in upright.spacing_mm])
    vectors = alignment.displacement(grid) * np.array([-1, -1, 1], np.float32)
    image = nib.Nifti1Image(vectors[:, :, :, None, :], grid.affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    with whole_file(path) as temporary:
        nib.save(image, temporary)


def _content(fixed: Volume, moving: Volume, moved: Volume, alignment: Alignment) -> dict[str, Any]:
    still = canonical(fixed)
    before = canonical(
        Alignment("rigid", np.eye(4), None, still.geometry, (), 1, 1, 0, 0).bring(moving, fixed.geometry)
    )
    after = canonical(moved)
    mask, _ = find_mask(still, suggest_rule(still))
    middle = [(part.start + part.stop) // 2 for part in box_of(mask)]
    rows = []
    for axis, view in enumerate(VIEWS):
        planes = [_plane(volume.array, axis, middle[axis]) for volume in (still, before, after)]
        aspect = _aspect(still.geometry, axis)
        rows.append(
            {
                "view": view,
                "pictures": [
                    {"name": "fixed", "data": _picture(planes[0], aspect)},
                    {"name": "moving, as scanned", "data": _picture(planes[1], aspect)},
                    {"name": "moving, registered", "data": _picture(planes[2], aspect)},
                    *_folding(alignment, still, axis, middle[axis]),
                    {
                        "name": "edges of the fixed one on it, before",
                        "data": _picture(planes[1], aspect, _edges(planes[0])),
                    },
                    {
                        "name": "edges of the fixed one on it, after",
                        "data": _picture(planes[2], aspect, _edges(planes[0])),
                    },
                    {"name": "checkerboard, before", "data": _picture(_checkered(planes[0], planes[1]), aspect)},
                    {"name": "checkerboard, after", "data": _picture(_checkered(planes[0], planes[2]), aspect)},
                ],
            }
        )
    information = " → ".join(f"{value:.3f}" for value in alignment.information)
    told = {
        "kind": alignment.kind,
        "mutual information inside the fixed mask (nats)": information,
        "mean displacement": f"{alignment.mean_mm:.2f} mm",
        "Jacobian (0 or less: folded)": f"{alignment.least_jacobian:.2f} to {alignment.most_jacobian:.2f}",
        "time": f"{alignment.seconds:.0f} s",
    }
    return {
        "kind": "registration",
        "title": "Do they lie together?",
        "asked": "Look at the edges: they should follow the same structures in both. Figures alone cannot tell.",
        "figures": told,
        "worse": alignment.information[-1] <= alignment.information[0],
        "rows": rows,
    }


def _plane(array: NDArray[Any], axis: int, index: int) -> NDArray[np.float64]:
    """Cut a slice as it is looked at: up is up, the patient's right on the left; values 0 to 1.

    Fat may be four times as bright as brain: white is at most twice what half of the brighter voxels have.
    """
    plane = np.take(array, index, axis=axis).astype(np.float64)
    low, high = np.quantile(plane, (0.01, 0.995))
    bright = plane[plane > plane.mean()]
    if bright.size:
        high = min(high, 2 * float(np.median(bright)) - low)
    plane = np.clip((plane - low) / (high - low if high > low else 1), 0, 1)
    seen: NDArray[np.float64] = (plane if axis == 0 else plane[::-1]).T[::-1]
    return seen


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


def _folding(alignment: Alignment, still: Volume, axis: int, index: int) -> list[dict[str, Any]]:
    if alignment.field_mm is None:
        return []
    from chiasm.volumes import resample

    voxels = np.einsum("ab,bijk->aijk", np.linalg.inv(alignment.grid.affine[:3, :3]), alignment.field_mm)
    rows = np.stack([np.stack(np.gradient(part)) for part in voxels]) + np.eye(3)[:, :, None, None, None]
    jacobian = np.linalg.det(rows.transpose(2, 3, 4, 0, 1)).astype(np.float32)
    there = resample(Volume(jacobian, alignment.grid), still.geometry, fill=1.0)
    plane = np.take(there.array, index, axis=axis)
    plane = (plane if axis == 0 else plane[::-1]).T[::-1]
    shown = _picture(np.clip((plane - 0.5), 0, 1), _aspect(still.geometry, axis), colours="PuOr")
    return [{"name": "Jacobian, 0.5 (orange) to 1.5 (violet)", "data": shown}]


def _picture(
    plane: NDArray[Any], aspect: float, edges: NDArray[np.bool_] | None = None, colours: str = "gray"
) -> dict[str, Any]:
    """Colour a slice; edges are drawn over it."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    pixels = colormaps[colours](np.asarray(plane), bytes=True)
    if edges is not None:
        pixels[edges] = (242, 193, 78, 255)
    written = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}  # the same bytes whatever wrote them
    imsave(written, pixels, format="png", metadata=nothing)
    height, width = plane.shape
    return {
        "address": "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii"),
        "ratio": f"{width} / {height * aspect:.2f}",
    }
