"""What other tools make of what chiasm writes, and of valid files that few of them read right.

    python benchmarks/interoperability.py docs/interoperability.md

Each file is made here and read by every tool that knows its format.  A cell says
"same" where voxel values are equal (within float32) and every corner of the grid
lies within 1e-3 mm of where it was put; otherwise it says what differs.  A tool
that is not installed leaves its cells empty and is named.  The tables are
written between two marks of the document.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import interoperability_exports
import interoperability_habits
from interoperability_readers import TOOLS, Tool, readers_of

from chiasm.errors import ChiasmError
from chiasm.prediction.dicom_case import EXPECTED_ERROR, MAPS
from chiasm.volumes import Geometry, Volume, canonical, read_volume, write_volume
from chiasm.volumes.dicom_attributes import Derivation, ModelMark
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_write import write_map, write_series
from chiasm.volumes.screening import SYNTHETIC
from dicom_patients import write_enhanced, write_source

BEGIN, END = "<!-- begin: benchmarks/interoperability.py {} -->", "<!-- end: benchmarks/interoperability.py {} -->"
SHAPE = (16, 20, 7)
NEAR_MM = 1e-3
ALIKE = 0.9995  # correlation of a picture of 8 bits with its slice
MARK = ModelMark("dual-attention (A7), t1 to t2", "0123456789abcdef" * 4)
ABSENT = "not here"


class File(NamedTuple):
    """A file, or a folder of a series, with what it holds.

    Attributes:
        title: What it is.
        path: Where it lies.
        volume: Its voxels and grid.
    """

    title: str
    path: Path
    volume: Volume


# --- files ---------------------------------------------------------------------------------------------------------


def oblique() -> NDArray[np.float64]:
    """Axes that run to the left, down and to the front, turned by 0.3 about (1, 2, 3)."""
    from scipy.spatial.transform import Rotation

    turned = Rotation.from_rotvec(0.3 * np.array([1, 2, 3]) / np.sqrt(14)).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]]) * [0.9, 1.1, 2.5]
    affine[:3, 3] = 31.7, -12.4, 88.3
    return affine


def voxels(dtype: str = "float32") -> NDArray[Any]:
    """Values that no two neighbours share."""
    return np.random.default_rng(0).uniform(10, 900, SHAPE).astype(dtype)


def written(folder: Path) -> list[File]:
    """Write each thing that chiasm writes."""
    grid = Geometry(SHAPE, oblique())
    found = []
    for title, name in (("NIfTI", "a.nii.gz"), ("MetaImage", "a.mha"), ("NRRD", "a.nrrd"), ("MGZ", "a.mgz")):
        write_volume(folder / name, voxels(), grid, remark=SYNTHETIC + "}")
        found.append(File(f"{title}, float32, marked as synthetic", folder / name, Volume(voxels(), grid)))
    for modality, low in (("MR", 10.0), ("CT", -1000.0)):
        source = write_source(folder / f"from-{modality}", plane="oblique", modality=modality)
        scan = read_volume(folder / f"from-{modality}")
        values = np.random.default_rng(1).uniform(low, 1500, scan.geometry.shape).astype(np.float32)
        image = Volume(values, scan.geometry)
        place = folder / f"made-{modality}"
        made = write_series(place, image, [pick_series(source[0])], Derivation(modality, "t2", MARK))
        stored = read_volume(place)  # rounded to whole numbers of the slope
        found.append(File(f"derived {modality} series", place, stored))
        if modality == "MR":
            path = folder / "expected-error"
            write_map(path, image, pick_series(made.files[0]), kind=MAPS[EXPECTED_ERROR], unit="a.u.", model=MARK)
            found.append(File("parametric map, float32", path, image))
    return found


def odd(folder: Path) -> list[File]:
    """Write files that are valid and that tools disagree on; nothing of chiasm writes them."""
    import nibabel
    import nrrd

    affine, array = oblique(), voxels("int16")
    found = []

    def add(title: str, name: str, volume: Volume) -> None:
        found.append(File(title, folder / name, volume))

    there = np.diag([-1.0, 1, 1, 1]) @ affine
    nrrd.write(
        str(folder / "las.nrrd"),
        array,
        {"space": "left-anterior-superior", "space directions": there[:3, :3].T, "space origin": there[:3, 3]},
    )
    add("NRRD in the space left-anterior-superior", "las.nrrd", Volume(array, Geometry(SHAPE, affine)))
    plain = {"space dimension": 3, "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    nrrd.write(str(folder / "none.nrrd"), array, plain)
    add("NRRD without a space, compared as if RAS", "none.nrrd", Volume(array, Geometry(SHAPE, affine)))
    place = {"space": "right-anterior-superior", "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    nrrd.write(str(folder / "text.nrrd"), array, place | {"encoding": "text"})
    add("NRRD whose voxels are text", "text.nrrd", Volume(array, Geometry(SHAPE, affine)))
    mnc = folder / "a.mnc"
    straight = np.diag([-0.9, 1.1, 2.5, 1.0])
    straight[:3, 3] = 31.7, -12.4, 88.3
    _write_minc(mnc, array, straight)
    add("MINC 2 whose x runs to the left", "a.mnc", Volume(array, Geometry(SHAPE, straight)))
    coronal = np.array(
        [[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]]
    )  # FreeSurfer's default, of which there is no word in the file
    default = np.eye(4)
    default[:3, :3], default[:3, 3] = coronal, -coronal @ SHAPE / 2
    head = struct.pack(">7ih", 1, *SHAPE, 1, 4, 0, 0).ljust(284, b"\0")
    (folder / "a.mgh").write_bytes(head + array.astype(">i2").tobytes(order="F"))
    add("MGH that states no orientation", "a.mgh", Volume(array, Geometry(SHAPE, default)))
    image = nibabel.Nifti1Image(array, None)
    shifted = affine.copy()
    shifted[:3, 3] += 5
    image.header.set_qform(shifted, 1)
    image.header.set_sform(affine, 4)
    nibabel.save(image, folder / "q1s4.nii.gz")
    add("NIfTI with qform 1 and another sform of code 4", "q1s4.nii.gz", Volume(array, Geometry(SHAPE, affine)))
    spoiled = voxels()
    spoiled[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(spoiled, affine), folder / "nan.nii.gz")
    add("NIfTI with a voxel of NaN", "nan.nii.gz", Volume(spoiled, Geometry(SHAPE, affine)))
    small = np.random.default_rng(2).integers(0, 900, (16, 20, 6)).astype(np.int16)
    slopes = [1.0, 2.0, 0.5, 3.0, 1.5, 0.25]
    path = write_enhanced(folder / "enhanced", small, plane="oblique", slopes=slopes)
    add(
        "enhanced MR, a slope for each frame",
        "enhanced",
        Volume(small * np.float32(slopes), read_volume(path).geometry),
    )
    return found


def _write_minc(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        image = file.create_dataset("minc-2.0/image/0/image", data=array.T)
        image.attrs["dimorder"] = np.bytes_("zspace,yspace,xspace")
        for axis, name in enumerate(("xspace", "yspace", "zspace")):
            space = file.create_dataset(f"minc-2.0/dimensions/{name}", data=0)
            space.attrs["step"], space.attrs["start"] = affine[axis, axis], affine[axis, 3]
            space.attrs["length"] = np.int32(array.shape[axis])
            space.attrs["direction_cosines"] = np.eye(3)[axis]
            space.attrs["units"] = np.bytes_("mm")
        for name, value in (("image-min", array.min()), ("image-max", array.max())):
            file[f"minc-2.0/image/0/{name}"] = float(value)
        image.attrs["valid_range"] = np.array([array.min(), array.max()], np.float64)


# --- comparison ----------------------------------------------------------------------------------------------------


def verdict(file: File, tool: Tool) -> str:
    """Read a file by a tool and say what differs from what it holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array, affine = tool.read(file.path)
    except ChiasmError as error:
        return f"refused: {error.reason}"
    except Exception as error:  # noqa: BLE001  # what a tool raises is what is measured
        return f"refused: {type(error).__name__}"
    if array.ndim > 3:
        array = array.squeeze()
    if array.ndim != 3:
        return f"{array.ndim} axes"
    if affine is None:
        return _without_place(file, tool, array)
    found = canonical(Volume(array, Geometry(array.shape, np.asarray(affine, np.float64))))
    right = canonical(file.volume)
    if found.array.shape != right.array.shape:
        return f"{'x'.join(map(str, found.array.shape))} voxels"
    apart = np.abs(found.geometry.corners - right.geometry.corners).max() if _can_measure(found) else np.inf
    is_near = apart <= NEAR_MM
    same = _are_equal(found.array, right.array)
    if same and is_near:
        return "same"
    differs = [] if same else ["other values" if is_near else "other voxels"]
    return ", ".join(differs + ([] if is_near else [f"{apart:.3g} mm off"]))


def _are_equal(found: NDArray[Any], right: NDArray[Any]) -> bool:
    return bool(np.allclose(found, right, rtol=1e-6, atol=1e-4, equal_nan=True))


def _without_place(file: File, tool: Tool, array: NDArray[Any]) -> str:
    """Compare voxels whose tool reports no geometry: values, or the grey of a picture; from either end."""
    right = file.volume.array
    if array.shape != right.shape:
        return f"{'x'.join(map(str, array.shape))} voxels"
    ends = (right, right[..., ::-1])
    if not tool.shows:
        return "same values" if any(_are_equal(array, one) for one in ends) else "other values"
    least = max(
        min(np.corrcoef(array[..., k].ravel(), one[..., k].ravel())[0, 1] for k in range(right.shape[2]))
        for one in ends
    )
    return "shown right" if least >= ALIKE else f"shown with correlation {least:.2f}"


def _can_measure(volume: Volume) -> bool:
    return bool(np.isfinite(volume.geometry.affine).all())


def table(files: Sequence[File]) -> list[str]:
    """Return the lines of a table: files by tools."""
    installed = {name: tool.version() for name, tool in TOOLS.items()}
    used = [name for name in TOOLS if any(name in readers_of(file.path) for file in files)]
    heads = [name if name == "chiasm" else f"{name} {installed[name] or ''}".strip() for name in used]
    lines = ["| file | " + " | ".join(heads) + " |", "|---" * (1 + len(used)) + "|"]
    for file in files:
        asked = readers_of(file.path)
        cells = [_cell(file, name, installed) if name in asked else "" for name in used]
        print(file.title, dict(zip(used, cells)), flush=True)
        lines.append(f"| {file.title} | " + " | ".join(cells) + " |")
    return lines


def _cell(file: File, name: str, installed: Mapping[str, str | None]) -> str:
    return ABSENT if installed[name] is None else verdict(file, TOOLS[name])


def measured() -> str:
    """Say when and with which Python a table was made."""
    return f"Measured on {datetime.now(UTC):%Y-%m-%d}, Python {sys.version.split()[0]}."


#: The tables by the names of their marks, each made in a folder of its own.
PARTS: Mapping[str, Callable[[Path], list[str]]] = {
    "written": lambda folder: table(written(folder)),
    "exports": lambda _: interoperability_exports.table(),
    "odd": lambda folder: table(odd(folder)),
    "habits": lambda _: interoperability_habits.table(),
}


def main() -> None:
    """Write all tables into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="Make this table alone.")
    given = parser.parse_args()
    document = given.document
    for part, make in PARTS.items():
        if given.part and part not in given.part:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines = [*make(Path(folder)), "", measured()]
        text = document.read_text()
        before, begin, rest = text.partition(BEGIN.format(part))
        end, after = rest.partition(END.format(part))[1:]
        document.write_text("\n".join([before + begin, *lines, end + after]))


if __name__ == "__main__":
    main()
