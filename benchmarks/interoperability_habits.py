"""Habits of tools that change images, masks or scores without a word, each measured again on what is made here.

`interoperability.py` writes them as a table.  A habit whose packages are not
installed is "not here"; one that a newer version has given up is seen by its
number.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from interoperability_readers import SECONDS, kept_archive, of_package, of_program
from numpy.typing import NDArray

from dicom_patients import segmentation, tool, write_source

ABSENT = "not here"


class Habit(NamedTuple):
    """What a tool does with valid input.

    Attributes:
        tools: Names of the packages, or of the programs, that must be here.
        done: What was done with it.
        measure: What came of it, as a phrase.
        instead: What to do instead.
    """

    tools: Sequence[str]
    done: str
    measure: Callable[[], str]
    instead: str


# --- resampling and filters ----------------------------------------------------------------------------------------


def _border_of_zeros(array: NDArray[Any]) -> str:
    empty = [int((np.moveaxis(array, axis, 0)[-1] == 0).all()) for axis in range(3)]
    return f"{'x'.join(map(str, array.shape))} voxels, the last slice is all 0 along {sum(empty)} of 3 axes"


def _constant() -> Any:
    import nibabel

    return nibabel.Nifti1Image(np.full((9, 9, 9), 100, np.float32), np.eye(4))


def resample_by_nibabel() -> str:
    """Take 9 x 9 x 9 voxels of the value 100 from 1 mm to 0.75 mm."""
    from nibabel.processing import resample_to_output

    return _border_of_zeros(np.asarray(resample_to_output(_constant(), (0.75, 0.75, 0.75)).dataobj))


def resample_by_nilearn() -> str:
    """Take 9 x 9 x 9 voxels of the value 100 from 1 mm to 0.75 mm."""
    from nilearn.image import resample_img

    made = resample_img(_constant(), target_affine=np.diag([0.75] * 3), copy_header=True, force_resample=True)
    return _border_of_zeros(made.get_fdata())


def resample_integers_by_simpleitk() -> str:
    """Shift a ramp and a ball of whole numbers by half a voxel, linear."""
    import SimpleITK as sitk

    def shifted(array: NDArray[Any]) -> NDArray[Any]:
        image = sitk.GetImageFromArray(array)
        move = sitk.TranslationTransform(3, (0.5, 0.5, 0.5))
        return sitk.GetArrayFromImage(sitk.Resample(image, image, move, sitk.sitkLinear, 0.0))

    i, j, k = np.indices((24, 24, 24)) - 11.5
    values = np.random.default_rng(0).integers(0, 1000, (24, 24, 24)).astype(np.int16)
    inner = (slice(2, -2),) * 3
    bias = float((shifted(values).astype(float) - shifted(values.astype(np.float32)))[inner].mean())
    ball = (i**2 + j**2 + k**2 <= 36).astype(np.uint8)
    return f"int16: {bias:+.2f} on average; a ball of 6 voxels keeps {shifted(ball).sum() / ball.sum():.0%}"


def write_minc_by_simpleitk() -> str:
    """Write a MINC file of an image whose first voxel lies at x = -10, y = -20 in RAS."""
    import nibabel
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.random.default_rng(0).uniform(0, 9, (7, 6, 5)).astype(np.float32))
    image.SetOrigin((10.0, 20.0, 30.0))  # LPS
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "a.mnc")
        sitk.WriteImage(image, path)
        x, y, z = nibabel.load(path).affine[:3, 3]
    return f"x {x:+.0f}, y {y:+.0f}, z {z:+.0f} mm for -10, -20, +30"


def correct_by_ants() -> str:
    """Correct shading with mask=None and with a mask of ones."""
    import ants

    rng = np.random.default_rng(0)
    i, j, k = np.indices((32, 32, 32)) - 15.5
    inside = i**2 + j**2 + k**2 < 100
    image = ants.from_numpy(np.where(inside, 100 + 3 * i, 0).astype(np.float32) + rng.uniform(0, 2, inside.shape))
    ones = ants.from_numpy(np.ones(inside.shape, np.float32))
    body = ants.from_numpy(inside.astype(np.float32))
    made = {name: ants.n4_bias_field_correction(image, mask=mask).numpy()[inside]
            for name, mask in (("none", None), ("ones", ones), ("body", body))}  # fmt: skip
    spread = {name: float(values.std() / values.mean()) for name, values in made.items()}
    same = np.abs(made["none"] - made["ones"]).max() < 1e-3
    return (
        f"mask=None is {'the whole image' if same else 'not the whole image'}: spread of a uniform body "
        f"{spread['none']:.1%}, with the body as mask {spread['body']:.1%}"
    )


def turn_integers_by_ants() -> str:
    """Hand a volume of int16 over."""
    import ants

    image = ants.from_numpy(np.full((4, 4, 4), -1000, np.int16))
    return f"{image.numpy().dtype}: -1000 becomes {image.numpy().flat[0]}"


def register_by_demons() -> str:
    """Register a ball that was moved by 3 mm, in LPS and in RAS order."""
    import SimpleITK as sitk

    i, j, k = np.indices((32, 32, 32)) - 15.5
    left = {}
    for name, direction in (("LPS", (1, 0, 0, 0, 1, 0, 0, 0, 1)), ("RAS", (-1, 0, 0, 0, -1, 0, 0, 0, 1))):
        pair = []
        for shift in (0, 3):
            image = sitk.GetImageFromArray(np.exp(-(i**2 + j**2 + (k - shift) ** 2) / 60).astype(np.float32) * 1000)
            image.SetDirection(direction)
            pair.append(image)
        demons = sitk.SymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(50)
        demons.SetStandardDeviations(1.5)
        field = sitk.DisplacementFieldTransform(sitk.Cast(demons.Execute(*pair), sitk.sitkVectorFloat64))
        made = sitk.GetArrayFromImage(sitk.Resample(pair[1], pair[0], field, sitk.sitkLinear, 0.0))
        fixed, moving = map(sitk.GetArrayFromImage, pair)
        left[name] = np.abs(made - fixed).mean() / np.abs(moving - fixed).mean()
    return f"of the difference {left['LPS']:.0%} is left in LPS order, {left['RAS']:.0%} in RAS order"


# --- scores --------------------------------------------------------------------------------------------------------


def _images() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two images in [0, 1] that differ everywhere, also along the border."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(3)
    real = gaussian_filter(rng.normal(size=(40, 44, 36)), 3)
    made = real + 0.3 * real.std() * rng.normal(size=real.shape)
    low, high = real.min(), real.max()
    first, second = (((one - low) / (high - low)).clip(0, 1).astype(np.float32) for one in (made, real))
    return first, second


def compare_by_torchmetrics() -> str:
    """SSIM of one pair in 3D, Gaussian window of 11 with sigma 1.5, range 1."""
    import torch
    from monai.metrics.regression import SSIMMetric
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = _images()
    words = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    reference = float(structural_similarity(x, y, **words))
    a, b = (torch.from_numpy(one)[None, None] for one in (x, y))
    theirs = float(structural_similarity_index_measure(a, b, data_range=1.0))
    monai = float(SSIMMetric(3, data_range=1.0)(a, b))
    return (  # it counts the border, whose windows are mirrored; the others leave it out
        f"{theirs:.4f} ({theirs / reference - 1:+.1%} against scikit-image {reference:.4f}); "
        f"MONAI {monai:.4f} ({monai / reference - 1:+.1%})"
    )


def compare_by_inpainting() -> str:
    """SSIM of the organisers' package inside a mask, against SSIM in 2D across the first axis and in 3D."""
    import torch
    from inpainting.challenge_metrics_2023 import generate_metrics
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(one)[None] for one in _images())
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[:, 8:30, 12:32, 10:26] = True
    theirs = generate_metrics(x, y, y, mask)["ssim"]
    low, high = np.percentile(y, [0.5, 99.5])
    a, b = (((one * mask).clip(max(low, 0), high) - max(low, 0)) / (high - max(low, 0)) for one in (x, y))
    flat = structural_similarity_index_measure(a, b, return_full_image=True)[1][mask].mean()
    solid = structural_similarity_index_measure(a[None], b[None], return_full_image=True)[1][0][mask].mean()
    return f"{theirs:.4f}; 2D across the first axis {flat:.4f}, 3D {solid:.4f}"


def compare_by_konfai() -> str:
    """SSIM in a mask, of images that differ inside it and not around it."""
    import torch
    from konfai.metric.measure.regression import SSIM

    x, y = (torch.from_numpy(one * 2000 - 1000)[None, None] for one in _images())
    scores = []
    for room in (0, 20):
        around = (room,) * 6
        a, b = (torch.nn.functional.pad(one, around, value=-1000.0) for one in (x, y))
        mask = torch.nn.functional.pad(torch.ones_like(x), around)
        found = SSIM(dynamic_range=4000)(a, b, mask.to(torch.uint8))
        scores.append(float(found[1] if isinstance(found, tuple) else found))
    return f"{scores[0]:.4f}, and {scores[1]:.4f} with more air outside the mask"


def resample_by_konfai() -> str:
    """Which interpolation an 8-bit image gets where none is named, and what lies beyond the image."""
    import torch
    from konfai.data.sampling import default_interpolation
    from konfai.data.transform.resample import Resample

    kinds = {"uint8": torch.uint8, "int16": torch.int16}
    taken = [f"{name}: {default_interpolation(torch.zeros(1, dtype=kind))}" for name, kind in kinds.items()]
    return f"{', '.join(taken)}; {Resample(spacing=[1.0, 1.0, 1.0]).fill_value:g} beyond the image"


# --- DICOM ---------------------------------------------------------------------------------------------------------


def _series(folder: Path, **options: Any) -> list[Path]:
    import pydicom

    found = write_source(folder, **options)
    return sorted(found, key=lambda path: int(pydicom.dcmread(path, stop_before_pixels=True).InstanceNumber))


def store_label_map() -> str:
    """Store a LABELMAP SEG by C-STORE in DCMTK's storescp and in Orthanc."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = _series(place / "source")
        labels = np.zeros((20, 24, 6), np.uint8)
        labels[5:9, 6:12, 2:4] = 1
        path = segmentation(files, labels, place / "seg.dcm", kind="LABELMAP")
        (place / "store").mkdir()
        running, _ = kept_archive()
        running.clear()
        said = {}
        for name, port in (("Orthanc", running.dicom_port), ("DCMTK", None)):
            said[name] = _stored(path, place / "store", port)
    return ", ".join(f"{name}: {'stored' if well else 'refused'}" for name, well in said.items())


def _stored(path: Path, store: Path, port: int | None) -> bool:
    from dicom_patients import reserved_port, wait_for

    if port is not None:
        return _is_sent(path, port)
    with reserved_port() as own:
        words = [tool("storescp"), "-aet", "ARCHIVE", "-od", str(store), str(own)]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(own, server)
            return _is_sent(path, own)
        finally:
            server.terminate()
            server.wait(SECONDS)


def _is_sent(path: Path, port: int) -> bool:
    sent = [sys.executable, "-c", _SENDER, str(path), str(port)]
    return subprocess.run(sent, capture_output=True, timeout=SECONDS).returncode == 0


#: Sends by pynetdicom, which offers the class whether the other side knows it or not.
_SENDER = """
import sys, pydicom
from pynetdicom import AE
dataset = pydicom.dcmread(sys.argv[1])
ae = AE()
ae.add_requested_context(dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.TransferSyntaxUID)
link = ae.associate("127.0.0.1", int(sys.argv[2]), ae_title="ARCHIVE")
sys.exit(0 if link.is_established and link.accepted_contexts and link.send_c_store(dataset).Status == 0 else 1)
"""


def order_by_highdicom() -> str:
    """Take a volume from an axial series, and write a segmentation with empty slices."""
    import highdicom
    import pydicom

    with tempfile.TemporaryDirectory() as folder:
        files = _series(Path(folder) / "source")
        volume = highdicom.get_volume_from_series([highdicom.imread(str(file)) for file in files])
        labels = np.zeros((20, 24, 6), np.uint8)
        labels[5:9, 6:12, 2:4] = 1
        path = segmentation(files, labels, Path(folder) / "seg.dcm")
        frames = int(pydicom.dcmread(path, stop_before_pixels=True).NumberOfFrames)
    steps = volume.affine[:3, :3][2]
    down = steps[int(np.abs(steps).argmax())] < 0
    return f"slices run {'down' if down else 'up'} from the {'head' if down else 'feet'}; {frames} of 6 frames are kept"


def _ring(shape: tuple[int, int], spacing_mm: tuple[float, float]) -> NDArray[np.bool_]:
    """A ring, shape (rows, columns)."""
    i, j = (np.arange(n) - (n - 1) / 2 for n in shape)
    radius = np.hypot(i[:, None] * spacing_mm[0], j * spacing_mm[1])
    return (radius < 8.5) & (radius > 4.5)


def write_by_rt_utils() -> str:
    """Write a structure on slices of 28 rows x 20 columns with pixels of 1.5 mm x 0.8 mm, and look at its points."""
    from rt_utils import RTStructBuilder

    with tempfile.TemporaryDirectory() as folder:
        shape, at = (20, 28, 6), (4, 22)
        _series(Path(folder) / "source", array=_grey(shape), spacing=(0.8, 1.5, 2.5))
        made = RTStructBuilder.create_new(dicom_series_path=str(Path(folder) / "source"))
        mask = np.zeros((28, 20, 6), bool)
        mask[at[1] : at[1] + 4, at[0] : at[0] + 4, 3] = True
        made.add_roi(mask=mask, name="box")
        contour = made.ds.ROIContourSequence[0].ContourSequence[0].ContourData
        points = np.reshape([float(x) for x in contour], (-1, 3))
        back = made.get_roi_mask_by_name("box")
    wanted = np.array([-31.25 + at[0] * 0.8, -47.5 + at[1] * 1.5])
    apart = np.abs(points.min(0)[:2] - wanted).max()
    return f"points are {apart:.1f} mm off; read again, {int(back.sum())} of {int(mask.sum())} voxels"


def _grey(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)


def _ring_written(plane: str) -> tuple[tempfile.TemporaryDirectory[str], Path, Path, NDArray[np.bool_]]:
    """Write a ring by rt-utils on square slices with square pixels, where it is right."""
    from rt_utils import RTStructBuilder

    folder = tempfile.TemporaryDirectory()
    source = Path(folder.name) / "source"
    _series(source, array=_grey((28, 28, 6)), spacing=(1.0, 1.0, 2.5), plane=plane)
    made = RTStructBuilder.create_new(dicom_series_path=str(source))
    mask = np.zeros((28, 28, 6), bool)
    mask[:, :, 1:5] = _ring((28, 28), (1.0, 1.0))[..., None]
    made.add_roi(mask=mask, name="ring")
    path = Path(folder.name) / "rs.dcm"
    made.save(str(path))
    return folder, source, path, mask


def read_rings(read: Callable[[Path, Path], NDArray[Any]]) -> str:
    """Read a ring that rt-utils wrote, on axial and on tilted slices, and compare its voxels with those drawn.

    Args:
        read: Takes the folder of the scan and the file of the structures, and returns an array (slices, rows, columns).
    """
    said = []
    for plane in ("axial", "steep"):
        folder, source, path, mask = _ring_written(plane)
        with folder:
            found, drawn = read(source, path) > 0, mask.transpose(2, 0, 1)
        said.append(f"{(found & drawn).sum() / drawn.sum():.0%} of its voxels and {(found & ~drawn).sum()} others")
    return "; on tilted slices ".join(said)


def read_by_platipy(source: Path, path: Path) -> NDArray[Any]:
    """Read the only structure of a set."""
    import pydicom
    import SimpleITK as sitk
    from platipy.dicom.io.rtstruct_to_nifti import read_dicom_image, transform_point_set_from_dicom_struct

    found, _ = transform_point_set_from_dicom_struct(read_dicom_image(source), pydicom.dcmread(path))
    return sitk.GetArrayFromImage(found[0])


def read_by_dicomrttool(source: Path, path: Path) -> NDArray[Any]:
    """Read the structure called ring."""
    from DicomRTTool.ReaderWriter import DicomReaderWriter

    shutil.copy(path, source / "rs.dcm")
    reader = DicomReaderWriter(Contour_Names=["ring"], arg_max=True, verbose=False)
    reader.walk_through_folders(str(source))
    reader.get_images_and_mask()
    return np.asarray(reader.mask)


def read_by_chiasm(_: Path, path: Path) -> NDArray[Any]:
    """Read the only structure of a set."""
    from chiasm.volumes import read_volume

    return read_volume(path, labels=True).array.T


# --- BIDS and networks ---------------------------------------------------------------------------------------------


def validate_bids() -> str:
    """Ask for what a derivative misses: an image of T2 contrast, of a skull-stripped brain, without a side file."""
    import nibabel

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        image = root / "sub-01" / "anat" / "sub-01_space-orig_desc-synthetic_T2w.nii.gz"
        image.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((8, 8, 8)), np.eye(4)), image)
        about = {"Name": "a", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
        (root / "dataset_description.json").write_text(json.dumps(about))
        (root / "README").write_text("Made for a measurement.\n" * 10)
        ct = image.with_name("sub-01_desc-synthetic_ct.nii.gz")
        shutil.copy(image, ct)
        validator = Path(sys.executable).with_name("bids-validator-deno")
        words = [str(validator if validator.is_file() else shutil.which("bids-validator-deno")), "--format", "json"]
        said = subprocess.run([*words, str(root)], capture_output=True, text=True, timeout=SECONDS)
        issues = json.loads(said.stdout)["issues"]["issues"]
    asked = {issue.get("subCode") or issue["code"] for issue in issues}
    wanted = [name for name in ("SkullStripped", "SpatialReference", "GeneratedBy") if name in asked]
    refused = "refused" if any("ct.nii" in issue.get("location", "") for issue in issues) else "accepted"
    return f"asks for {', '.join(wanted) or 'nothing'}; an image of CT is {refused}"


def run_by_openvino() -> str:
    """Compare layers from ONNX, and one from a module, with torch."""
    import torch

    class Shrink(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 16, 16)).astype(np.float32))
    layers = {
        "interpolate(antialias)": (Shrink(), True),
        "AvgPool2d(3, 2, padding=1, ceil_mode)": (torch.nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), True),
        "Softplus(beta=2)": (torch.nn.Softplus(beta=2), False),
    }
    return "; ".join(f"{name} {_apart(layer, x, by_onnx):.2g}" for name, (layer, by_onnx) in layers.items())


def _apart(layer: Any, x: Any, by_onnx: bool) -> float:
    """Return OpenVINO's largest difference from torch over a layer."""
    import openvino
    import torch

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = layer(x).detach().numpy()
        if by_onnx:
            path = Path(folder) / "a.onnx"
            torch.onnx.export(layer, (x,), str(path), verbose=False)
            model = openvino.Core().read_model(str(path))
        else:
            model = openvino.convert_model(layer, example_input=x)
        found = next(iter(openvino.Core().compile_model(model, "CPU")(x.numpy()).values()))
    return math.inf if found.shape != wanted.shape else float(np.abs(found - wanted).max())


HABITS = (
    Habit(["nibabel"], "`resample_to_output` to 0.75 mm, an image of one value", resample_by_nibabel,
          "cut the last slices off, or resample with `chiasm register` or SimpleITK"),
    Habit(["nilearn"], "`resample_img` to 0.75 mm, an image of one value", resample_by_nilearn,
          "give `target_shape`, or cut the last slices off"),
    Habit(["SimpleITK"], "`Resample` of whole numbers, linear, by half a voxel", resample_integers_by_simpleitk,
          "cast to float32 before; for label maps take nearest neighbour"),
    Habit(["SimpleITK", "nibabel"], "`WriteImage` of a `.mnc`, read by nibabel", write_minc_by_simpleitk,
          "write NIfTI, and convert it with MINC's own tools"),
    Habit(["SimpleITK"], "`SymmetricForcesDemons` of a ball moved by 3 mm", register_by_demons,
          "convert both images to LPS order before (`chiasm register` does)"),
    Habit(["antspyx"], "`n4_bias_field_correction`", correct_by_ants, "give the mask of the body"),
    Habit(["antspyx"], "`from_numpy` of int16", turn_integers_by_ants, "cast to float32 before"),
    Habit(["torchmetrics", "monai", "scikit-image"], "SSIM of one pair, 3D, Gaussian", compare_by_torchmetrics,
          "name the library beside the number; `chiasm evaluate` equals scikit-image inside a mask"),
    Habit(["inpainting", "torchmetrics"], "SSIM of `generate_metrics`, inside a mask", compare_by_inpainting,
          "`--convention brasyn2023` is in 3D, `--convention brats-inpainting` as the package"),
    Habit(["konfai"], "SSIM with a mask, one pair", compare_by_konfai, "cut both images to the mask's box"),
    Habit(["konfai"], "`Resample` by default: interpolation, and what it fills with", resample_by_konfai,
          "name interpolation and `fill` (-1000 for CT)"),
    Habit(["storescp", "Orthanc", "highdicom"], "C-STORE of a LABELMAP SEG", store_label_map,
          "store BINARY SEG; chiasm reads both"),
    Habit(["highdicom"], "the order of a volume; empty frames of a SEG", order_by_highdicom,
          "go by its affine, as chiasm does, never by the index"),
    Habit(["rt-utils"], "an RTSTRUCT on pixels of 1.5 x 0.8 mm, 28 rows, 20 columns", write_by_rt_utils,
          "write on square slices of square pixels only"),
    Habit(["platipy", "rt-utils"], "a ring that rt-utils wrote, read", partial(read_rings, read_by_platipy),
          "read it with chiasm"),
    Habit(["dicomrttool", "rt-utils"], "a ring that rt-utils wrote, read", partial(read_rings, read_by_dicomrttool),
          "read it with chiasm"),
    Habit(["chiasm", "rt-utils"], "a ring that rt-utils wrote, read", partial(read_rings, read_by_chiasm), ""),
    Habit(["bids-validator-deno"], "a derivative without a side file", validate_bids,
          "`chiasm bids` writes the fields; BIDS has no place for CT"),
    Habit(["openvino"], "largest difference from torch", run_by_openvino,
          "`chiasm export` compares what it exports with torch and refuses a difference"),
)  # fmt: skip


def version_of(name: str) -> str | None:
    """Return the version of a package or a program; None where it is not here."""
    programs = {
        "storescp": of_program(r"v(\d[\d.]+)", "storescp", "--version"),
        "Orthanc": of_program(r"(\d+\.[\d.]+)", "Orthanc", "--version"),
    }
    return programs.get(name, of_package(name))()


def table() -> list[str]:
    """Return the lines of the table of habits."""
    lines = ["| tool | what | measured | instead |", "|---" * 4 + "|"]
    for habit in HABITS:
        found = {name: version_of(name) for name in habit.tools}
        shown = f"{habit.tools[0]} {found[habit.tools[0]] or ''}".strip()
        said = ABSENT if None in found.values() else _measure(habit)
        print(shown, "|", habit.done, "|", said, flush=True)
        lines.append(f"| {shown} | {habit.done} | {said} | {habit.instead} |")
    return lines


def _measure(habit: Habit) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return habit.measure()
