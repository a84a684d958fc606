"""How each tool reads a file: voxel values, and where in the patient they lie.

`interoperability.py` asks these.  A tool that shows images but hands out no
geometry (pydicom, DCMTK, Orthanc) returns None for it, and one that shows grey
values returns pictures.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.volumes import read_volume
from dicom_patients import Archive, archive

LPS = np.diag([-1.0, -1, 1, 1])
SECONDS = 60
PROGRAMS = "/usr/bin:/usr/sbin:/usr/local/bin:/opt/homebrew/bin"  # pynetdicom brings some of the same names
CHROMIUM = Path("/usr/bin/chromium")
Affine = NDArray[np.float64]
Read = Callable[[Path], tuple[NDArray[Any], Affine | None]]


class Tool(NamedTuple):
    """A tool: how it reads, and how its version is asked; None where it is not installed.

    Attributes:
        read: Values (I, J, K) and voxel to RAS mm, which is None where the tool reports no geometry.
        version: Of what is installed.
        shows: Whether it hands out pictures, grey values without a unit.
    """

    read: Read
    version: Callable[[], str | None]
    shows: bool = False


def by_chiasm(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by chiasm."""
    volume = read_volume(path)
    return volume.array, volume.geometry.affine


def by_nibabel(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by nibabel."""
    import nibabel

    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


def by_simpleitk(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by SimpleITK; a folder through its ImageSeriesReader."""
    import SimpleITK as sitk

    if path.is_dir():
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
    else:
        image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image).T, _from_itk(image.GetDirection(), image.GetSpacing(), image.GetOrigin())


def by_itk(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by ITK's own Python package, floating point."""
    import itk

    names: Any = str(path)
    if path.is_dir():
        found = itk.GDCMSeriesFileNames.New(Directory=str(path))
        names = list(found.GetFileNames(found.GetSeriesUIDs()[0]))
    image = itk.imread(names, itk.F)
    place = _from_itk(itk.array_from_matrix(image.GetDirection()), image.GetSpacing(), image.GetOrigin())
    return itk.array_from_image(image).T, place


def by_ants(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by ANTsPy."""
    import ants

    image = ants.dicom_read(str(path)) if path.is_dir() else ants.image_read(str(path))
    return image.numpy(), _from_itk(image.direction, image.spacing, image.origin)


def _from_itk(direction: Any, spacing: Any, origin: Any) -> Affine:
    """Turn ITK's direction, spacing and origin (LPS) into voxel to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(list(spacing))
    affine[:3, 3] = list(origin)
    return LPS @ affine


def by_torchio(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by TorchIO."""
    import torchio

    image = torchio.ScalarImage(path)
    return image.numpy()[0], np.asarray(image.affine)


def by_monai(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by MONAI, by the reader for the format that does not go through ITK."""
    from monai.data import NibabelReader, NrrdReader, PydicomReader
    from monai.transforms import LoadImage

    suffix = path.name.rpartition(".")[2]
    reader = {"nrrd": NrrdReader, "gz": NibabelReader, "mgz": NibabelReader, "mgh": NibabelReader}
    image: Any = LoadImage(reader=reader.get(suffix, PydicomReader), image_only=True)(path)
    return image.numpy(), image.affine.numpy()


def by_pynrrd(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by pynrrd; a file without a space has no place in the patient."""
    import nrrd

    array, head = nrrd.read(str(path))
    turn = {
        "left-posterior-superior": LPS,
        "left-anterior-superior": np.diag([-1.0, 1, 1, 1]),
        "right-anterior-superior": np.eye(4),
    }
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = head["space directions"].T, head["space origin"]
    return array, turn[head["space"]] @ affine if "space" in head else None


def by_dcm2niix(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by dcm2niix."""
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as given:
        source = path if path.is_dir() else Path(shutil.copy(path, given)).parent
        subprocess.run(["dcm2niix", "-o", there, "-f", "a", source], capture_output=True, check=True, timeout=SECONDS)
        made = [one for one in Path(there).iterdir() if one.name.endswith(".nii")]
        if len(made) != 1:
            raise ValueError(f"{len(made)} files")
        return by_nibabel(made[0])


def by_highdicom(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by highdicom."""
    import highdicom

    if path.is_dir():
        volume = highdicom.get_volume_from_series([highdicom.imread(str(file)) for file in path.iterdir()])
    else:
        volume = highdicom.imread(str(path)).get_volume()
    return np.asarray(volume.array), LPS @ volume.affine


def slices_of(path: Path) -> list[Path]:
    """Return the files of a series from the first slice to the last one, or the one file."""
    import pydicom

    if path.is_file():
        return [path]
    heads = {file: pydicom.dcmread(file, stop_before_pixels=True) for file in path.iterdir()}
    row, column = np.reshape(next(iter(heads.values())).ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(row, column)
    return sorted(heads, key=lambda file: float(normal @ np.array(heads[file].ImagePositionPatient, float)))


def by_pydicom(path: Path) -> tuple[NDArray[Any], None]:
    """Read by pydicom: its pixels and its rescaling, slice by slice or frame by frame."""
    import pydicom
    from pydicom.pixels.processing import apply_rescale

    planes = []
    for file in slices_of(path):
        dataset = pydicom.dcmread(file)
        pixels = dataset.pixel_array
        planes.append(apply_rescale(pixels, dataset) if "RescaleSlope" in dataset else pixels)
    return np.concatenate([plane.reshape(-1, *plane.shape[-2:]) for plane in planes]).T, None


def by_dcmtk(path: Path) -> tuple[NDArray[Any], None]:
    """Show by DCMTK's dcmj2pnm: 16-bit pictures of each slice or frame, from black to white over its own range."""
    planes = []
    with tempfile.TemporaryDirectory() as there:
        for number, file in enumerate(slices_of(path)):
            stem = Path(there) / f"{number:04d}"
            words = ["dcmj2pnm", "--write-16-bit-png", "--min-max-window", "--all-frames", file, stem]
            subprocess.run(words, capture_output=True, check=True, timeout=SECONDS)
            made = sorted(Path(there).glob(f"{stem.name}*"), key=lambda one: (len(one.name), one.name))
            planes += [_picture(one.read_bytes()) for one in made]
    return np.stack(planes, -1), None


def by_orthanc(path: Path) -> tuple[NDArray[Any], None]:
    """Store in Orthanc by C-STORE, and take its previews of each slice or frame."""
    import json

    import pydicom

    names = slices_of(path)
    with _orthanc() as running:
        words = ["/usr/bin/storescu", "-R", "-aec", "ARCHIVE", "127.0.0.1", str(running.dicom_port), *map(str, names)]
        said = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        if said.returncode or len(json.loads(running.ask("/instances"))) != len(names):
            raise ValueError("not stored")
        held = {json.loads(running.ask(f"/instances/{one}/tags?simplify"))["SOPInstanceUID"]: one
                for one in json.loads(running.ask("/instances"))}  # fmt: skip
        planes = []
        for file in names:
            one = held[str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID)]
            frames = len(json.loads(running.ask(f"/instances/{one}/frames")))
            planes += [_picture(running.ask(f"/instances/{one}/frames/{frame}/preview")) for frame in range(frames)]
    return np.stack(planes, -1), None


@contextmanager
def _orthanc() -> Iterator[Archive]:
    """An empty archive for the block; one process serves the whole run."""
    running, _ = kept_archive()
    running.clear()
    yield running


@cache
def kept_archive() -> tuple[Archive, object]:
    """Return an Orthanc that runs until the process ends, and what keeps it running."""
    import atexit
    from contextlib import ExitStack

    stack = ExitStack()
    running = stack.enter_context(archive(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
    atexit.register(stack.close)
    return running, stack


def _picture(png: bytes) -> NDArray[Any]:
    """Decode a picture: shape (columns, rows)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png))).T


def by_niivue(path: Path) -> tuple[NDArray[Any], Affine]:
    """Read by NiiVue in Chromium, with the slope of its header as it shows it under the cursor."""
    page = _browser()
    said = page.evaluate(_NIIVUE, [base64.b64encode(path.read_bytes()).decode(), path.name])
    values = np.frombuffer(base64.b64decode(said["values"]), "<f4").reshape(said["dims"], order="F")
    return values, np.array(said["affine"], np.float64).reshape(4, 4)


_NIIVUE = """async ([text, name]) => {
  const bytes = Uint8Array.from(atob(text), one => one.charCodeAt(0));
  const image = await niivue.NVImage.loadFromFile({file: new File([bytes], name), name});
  const slope = image.hdr.scl_slope || 1, values = Float32Array.from(image.img, v => v * slope + image.hdr.scl_inter);
  const raw = new Uint8Array(values.buffer);
  let packed = "";
  for (let at = 0; at < raw.length; at += 4096) packed += String.fromCharCode(...raw.subarray(at, at + 4096));
  return {values: btoa(packed), dims: Array.from(image.hdr.dims.slice(1, 4)), affine: image.hdr.affine.flat()};
}"""


@cache
def _browser() -> Any:
    """Open a page with NiiVue's script, the one that chiasm's pages hold."""
    import atexit

    from playwright.sync_api import sync_playwright

    running = sync_playwright().start()
    flags = ["--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader"]
    browser = running.chromium.launch(executable_path=str(CHROMIUM), args=flags)
    atexit.register(running.stop)
    atexit.register(browser.close)
    page = browser.new_page()
    page.set_content("<canvas></canvas>")
    page.add_script_tag(content=_niivue().read_text("utf-8"))
    return page


def _niivue() -> Path:
    return Path(str(files("chiasm"))) / "reports" / "static" / "niivue.umd.js"


# --- versions ------------------------------------------------------------------------------------------------------


def of_package(name: str) -> Callable[[], str | None]:
    """Return a function that asks the version of an installed package."""

    def ask() -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return ask


def of_program(pattern: str, *words: str) -> Callable[[], str | None]:
    """Return a function that asks a program for its version."""

    def ask() -> str | None:
        program = shutil.which(words[0], path=PROGRAMS)
        if program is None:
            return None
        said = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=SECONDS)
        found = re.search(pattern, said.stdout + said.stderr)
        return None if found is None else found[1]

    return ask


def _of_niivue() -> str | None:
    if not _niivue().is_file() or not CHROMIUM.is_file() or of_package("playwright")() is None:
        return None
    lock = (Path(__file__).parents[1] / "package-lock.json").read_text("utf-8")
    found = re.search(r'"node_modules/@niivue/niivue": \{\s*"version": "([\d.]+)"', lock)
    return found[1] if found else "?"


TOOLS: Mapping[str, Tool] = {
    "chiasm": Tool(by_chiasm, lambda: ""),
    "nibabel": Tool(by_nibabel, of_package("nibabel")),
    "SimpleITK": Tool(by_simpleitk, of_package("SimpleITK")),
    "ITK": Tool(by_itk, of_package("itk")),
    "ANTsPy": Tool(by_ants, of_package("antspyx")),
    "TorchIO": Tool(by_torchio, of_package("torchio")),
    "MONAI": Tool(by_monai, of_package("monai")),
    "pynrrd": Tool(by_pynrrd, of_package("pynrrd")),
    "NiiVue": Tool(by_niivue, _of_niivue),
    "dcm2niix": Tool(by_dcm2niix, of_program(r"v(\d[\d.]+)", "dcm2niix", "-v")),
    "highdicom": Tool(by_highdicom, of_package("highdicom")),
    "pydicom": Tool(by_pydicom, of_package("pydicom")),
    "DCMTK": Tool(by_dcmtk, of_program(r"v(\d[\d.]+)", "dcmj2pnm", "--version"), shows=True),
    "Orthanc": Tool(by_orthanc, of_program(r"(\d+\.[\d.]+)", "Orthanc", "--version"), shows=True),
}
_ITK_FAMILY = ("SimpleITK", "ITK", "ANTsPy", "TorchIO")
_DICOM = ("chiasm", *_ITK_FAMILY, "MONAI", "dcm2niix", "highdicom", "pydicom", "DCMTK", "Orthanc")
#: Which tools claim to read a file, by the end of its name; "" is a DICOM series or object.
READERS: Mapping[str, Sequence[str]] = {
    ".nii.gz": ("chiasm", "nibabel", *_ITK_FAMILY, "MONAI", "NiiVue"),
    ".mha": ("chiasm", *_ITK_FAMILY, "NiiVue"),
    ".nrrd": ("chiasm", *_ITK_FAMILY, "MONAI", "pynrrd", "NiiVue"),
    ".mgz": ("chiasm", "nibabel", "ITK", "TorchIO", "MONAI", "NiiVue"),
    ".mgh": ("chiasm", "nibabel", "ITK", "TorchIO", "MONAI", "NiiVue"),
    ".mnc": ("chiasm", "nibabel", *_ITK_FAMILY),
    "": _DICOM,
}


def readers_of(path: Path) -> Sequence[str]:
    """Return the names of the tools that know a file's format."""
    return next(names for suffix, names in READERS.items() if path.name.endswith(suffix))
