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
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chiasm.errors import ChiasmError
from chiasm.volumes import Geometry, Volume, canonical, read_volume, write_volume
from chiasm.volumes.dicom_attributes import Derivation, ModelMark
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_write import write_expected_error, write_series
from dicom_patients import write_enhanced, write_source

BEGIN, END = "<!-- begin: benchmarks/interoperability.py {} -->", "<!-- end: benchmarks/interoperability.py {} -->"
SHAPE = (16, 20, 7)
LPS = np.diag([-1.0, -1, 1, 1])
NEAR_MM = 1e-3
SECONDS = 60
Read = Callable[[Path], tuple[NDArray[Any], NDArray[np.float64]]]
MARK = ModelMark("dual-attention (A7), t1 to t2", "0123456789abcdef" * 4)


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


# --- tools ---------------------------------------------------------------------------------------------------------


def by_chiasm(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by chiasm: values (I, J, K) and voxel to RAS mm."""
    volume = read_volume(path)
    return volume.array, volume.geometry.affine


def by_nibabel(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by nibabel: values (I, J, K) and voxel to RAS mm."""
    import nibabel

    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


def by_simpleitk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by SimpleITK: values (I, J, K) and voxel to RAS mm."""
    import SimpleITK as sitk

    if path.is_dir():
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
    else:
        image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


def by_monai(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by MONAI: values (I, J, K) and voxel to RAS mm."""
    from monai.data import NibabelReader, NrrdReader, PydicomReader
    from monai.transforms import LoadImage

    suffix = path.name.rpartition(".")[2]
    reader = {"nrrd": NrrdReader, "gz": NibabelReader, "mgz": NibabelReader, "mgh": NibabelReader}
    image: Any = LoadImage(reader=reader.get(suffix, PydicomReader), image_only=True)(path)
    return image.numpy(), image.affine.numpy()


def by_pynrrd(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by pynrrd: values (I, J, K) and voxel to RAS mm."""
    import nrrd

    array, head = nrrd.read(str(path))
    turn = {"left-posterior-superior": LPS, "left-anterior-superior": np.diag([-1.0, 1, 1, 1])}
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = head["space directions"].T, head["space origin"]
    return array, turn.get(head.get("space", ""), np.eye(4)) @ affine


def by_dcm2niix(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by dcm2niix: values (I, J, K) and voxel to RAS mm."""
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as given:
        source = path if path.is_dir() else Path(shutil.copy(path, given)).parent
        subprocess.run(["dcm2niix", "-o", there, "-f", "a", source], capture_output=True, check=True, timeout=SECONDS)
        made = [one for one in Path(there).iterdir() if one.name.endswith(".nii")]
        if len(made) != 1:
            raise ValueError(f"{len(made)} files")
        return by_nibabel(made[0])


def by_highdicom(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read by highdicom: values (I, J, K) and voxel to RAS mm."""
    import highdicom

    if path.is_dir():
        volume = highdicom.get_volume_from_series([highdicom.imread(str(file)) for file in path.iterdir()])
    else:
        volume = highdicom.imread(str(path)).get_volume()
    return np.asarray(volume.array), LPS @ volume.affine


class Tool(NamedTuple):
    """A tool: its name, how it reads, and how its version is asked."""

    name: str
    read: Read
    version: Callable[[], str | None]


def _of_package(name: str) -> Callable[[], str | None]:
    def ask() -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return ask


def _of_dcm2niix() -> str | None:
    if shutil.which("dcm2niix") is None:
        return None
    told = subprocess.run(["dcm2niix", "-v"], capture_output=True, text=True, timeout=SECONDS).stdout
    found = re.search(r"v\d[\d.]+", told)
    return None if found is None else found[0]


TOOLS = {
    "chiasm": Tool("chiasm", by_chiasm, lambda: ""),
    "nibabel": Tool("nibabel", by_nibabel, _of_package("nibabel")),
    "SimpleITK": Tool("SimpleITK", by_simpleitk, _of_package("SimpleITK")),
    "MONAI": Tool("MONAI", by_monai, _of_package("monai")),
    "pynrrd": Tool("pynrrd", by_pynrrd, _of_package("pynrrd")),
    "dcm2niix": Tool("dcm2niix", by_dcm2niix, _of_dcm2niix),
    "highdicom": Tool("highdicom", by_highdicom, _of_package("highdicom")),
}
#: Which tools claim to read a file, by the end of its name; "" is a DICOM series or object.
READERS: Mapping[str, Sequence[str]] = {
    ".nii.gz": ("chiasm", "nibabel", "SimpleITK", "MONAI"),
    ".mha": ("chiasm", "SimpleITK"),
    ".nrrd": ("chiasm", "SimpleITK", "MONAI", "pynrrd"),
    ".mgz": ("chiasm", "nibabel", "MONAI"),
    ".mgh": ("chiasm", "nibabel", "MONAI"),
    ".mnc": ("chiasm", "nibabel", "SimpleITK"),
    "": ("chiasm", "SimpleITK", "MONAI", "dcm2niix", "highdicom"),
}


def readers_of(path: Path) -> Sequence[str]:
    """Return the names of the tools that know a file's format."""
    return next(names for suffix, names in READERS.items() if path.name.endswith(suffix))


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
        write_volume(folder / name, voxels(), grid)
        found.append(File(f"{title}, float32", folder / name, Volume(voxels(), grid)))
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
            write_expected_error(path, image, pick_series(made.files[0]), unit="a.u.", model=MARK)
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


def verdict(file: File, read: Read) -> str:
    """Read a file by a tool and say what differs from what it holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array, affine = read(file.path)
    except ChiasmError as error:
        return f"refused: {error.reason}"
    except Exception as error:  # noqa: BLE001  # what a tool raises is what is measured
        return f"refused: {type(error).__name__}"
    if array.ndim > 3:
        array = array.squeeze()
    if array.ndim != 3:
        return f"{array.ndim} axes"
    found = canonical(Volume(array, Geometry(array.shape, np.asarray(affine, np.float64))))
    right = canonical(file.volume)
    if found.array.shape != right.array.shape:
        return f"{'x'.join(map(str, found.array.shape))} voxels"
    apart = np.abs(found.geometry.corners - right.geometry.corners).max() if _can_measure(found) else np.inf
    is_near = apart <= NEAR_MM
    same = np.allclose(found.array, right.array, rtol=1e-6, atol=1e-4, equal_nan=True)
    if same and is_near:
        return "same"
    differs = [] if same else ["other values" if is_near else "other voxels"]
    return ", ".join(differs + ([] if is_near else [f"{apart:.3g} mm off"]))


def _can_measure(volume: Volume) -> bool:
    return bool(np.isfinite(volume.geometry.affine).all())


def table(files: Sequence[File]) -> list[str]:
    """Return the lines of a table: files by tools."""
    installed = {name: tool.version() for name, tool in TOOLS.items()}
    used = [name for name in TOOLS if any(name in readers_of(file.path) for file in files)]
    heads = [name if name == "chiasm" else f"{name} {(installed[name] or 'absent').lstrip('v')}" for name in used]
    lines = ["| file | " + " | ".join(heads) + " |", "|---" * (1 + len(used)) + "|"]
    for file in files:
        asked = readers_of(file.path)
        cells = [
            verdict(file, TOOLS[name].read) if name in asked and installed[name] is not None else "" for name in used
        ]
        print(file.title, cells, flush=True)
        lines.append(f"| {file.title} | " + " | ".join(cells) + " |")
    return [*lines, "", f"Measured on {datetime.now(UTC):%Y-%m-%d}, Python {sys.version.split()[0]}."]


def main() -> None:
    """Write both tables into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    document = parser.parse_args().document
    for part, make in (("written", written), ("odd", odd)):
        with tempfile.TemporaryDirectory() as folder:
            lines = table(make(Path(folder)))
        text = document.read_text()
        before, begin, rest = text.partition(BEGIN.format(part))
        end, after = rest.partition(END.format(part))[1:]
        document.write_text("\n".join([before + begin, *lines, end + after]))


if __name__ == "__main__":
    main()
