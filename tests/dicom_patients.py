"""Series of a patient who cannot be missed, written by hand, and the tools of others that assess what we write."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
)

from chiasm.volumes import Geometry, Volume

#: What must never leave the DICOM files: each is found nowhere else by chance.
TELLTALE = {
    "PatientName": "Zwetschgenknoedel^Ottilie",
    "PatientID": "QX-7781-ZZ",
    "PatientBirthDate": "19330417",
    "AccessionNumber": "ACC5550123",
    "ReferringPhysicianName": "Quackenbusch^Hilarius",
    "StudyDescription": "Weltschmerz protocol",
    "StudyID": "STU90210",
}
SHAPE = (20, 24, 6)

#: Row and column direction of the slices in the patient (LPS).
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "oblique": ((0.9961947, 0.0, -0.0871557), (0.0075961, 0.9961947, 0.0868241)),
}
DIRECTIONS = PLANES | {"steep": ((0.9510565, 0.0, -0.3090170), (0.1816356, 0.8090170, 0.5590170))}


def tool(name: str) -> str:
    """The path of a program of others, or a reason to skip."""
    # pynetdicom brings programs of the same names: judges must not be of one family with what they judge
    found = shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin:/opt/homebrew/bin")
    if found is None:
        pytest.skip(f"{name} is not installed (apt: dicom3tools, dcmtk, dcm2niix, orthanc, orthanc-dicomweb)")
    return found


def run_tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [tool(str(words[0])), *map(str, words[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, errors="replace")


def faults(path: Path) -> list[str]:
    """What dciodvfy calls an error, but for SyntheticData, which its edition does not know."""
    done = run_tool("dciodvfy", path)
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if line.startswith("Error") and "(0x0008,0x001c)" not in line]


def scan(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> NDArray[np.int16]:
    """Something like a body: bright texture in an ellipsoid, air around, no symmetry."""
    from synthetic_cohort import pair

    return np.rint(pair(seed, 5.0, shape)[0]).astype(np.int16)


def write_source(
    folder: Path,
    array: NDArray[np.int16] | None = None,
    plane: str = "axial",
    *,
    modality: str = "MR",
    spacing: tuple[float, float, float] = (0.9, 1.1, 2.5),
    implicit: bool = False,
    **changes: object,
) -> list[Path]:
    """Write a classic series, array (I, J, K) with I along a row; file names are in no order."""
    array = scan() if array is None else array
    row, column = (np.array(direction, float) for direction in DIRECTIONS[plane])
    normal = np.cross(row, column)

    def uid(*words: str) -> str:
        return str(pydicom.uid.generate_uid(prefix="1.2.826.0.1.3680043.10.99.", entropy_srcs=[str(folder), *words]))

    folder.mkdir(parents=True)
    paths = []
    for k in range(array.shape[2]):
        d = Dataset()
        d.SpecificCharacterSet = "ISO_IR 100"
        for name, value in TELLTALE.items():
            setattr(d, name, value)
        d.PatientSex, d.PatientAge, d.PatientWeight = "F", "091Y", "61.5"
        d.StudyDate, d.StudyTime, d.SeriesDate, d.SeriesTime = "20240229", "120000", "20240229", "120500"
        d.ContentDate, d.ContentTime = "20240229", "120501"
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = uid("study"), uid("series"), uid("frame")
        d.SOPInstanceUID = uid("slice", str(k))
        d.SOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
        d.Modality, d.SeriesNumber, d.InstanceNumber = modality, 4, k + 1
        d.SeriesDescription, d.Manufacturer, d.PositionReferenceIndicator = "t1 of the test", "Nobody", ""
        d.PatientPosition, d.BodyPartExamined = "HFS", "HEAD"
        d.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "M"]
        d.ImagePositionPatient = [f"{x:.7f}"[:16] for x in np.array([-31.25, -47.5, 12.125]) + k * spacing[2] * normal]
        d.ImageOrientationPatient = [f"{x:.7f}" for x in (*row, *column)]
        d.PixelSpacing, d.SliceThickness = [f"{spacing[1]:.3f}", f"{spacing[0]:.3f}"], f"{spacing[2]:.4f}"
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = *array.shape[1::-1], 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        if modality == "CT":
            d.RescaleIntercept, d.RescaleSlope, d.RescaleType, d.KVP, d.AcquisitionNumber = "0", "1", "HU", "120", "1"
        else:
            d.ScanningSequence, d.SequenceVariant, d.ScanOptions, d.MRAcquisitionType = "SE", "NONE", "", "2D"
            d.RepetitionTime, d.EchoTime, d.EchoTrainLength = "500", "10", "1"
        for name, value in changes.items():
            setattr(d, name, value)
        d.PixelData = np.ascontiguousarray(array[:, :, k].T).astype("<i2").tobytes()
        d["PixelData"].VR = "OW"
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = UID(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)
        path = folder / f"IM{(k * 7) % array.shape[2]:05d}"
        d.save_as(path, enforce_file_format=True)
        paths.append(path)
    return sorted(paths)


def rewrite(path: Path, edit: Callable[[Dataset], object]) -> None:
    """Change one file in place."""
    dataset = pydicom.dcmread(path)
    edit(dataset)
    dataset.save_as(path, enforce_file_format=True)


def in_order(files: Iterable[Path]) -> list[Path]:
    """Sort the files of a series by InstanceNumber, as `write_source` numbers them."""
    return sorted(files, key=lambda path: int(pydicom.dcmread(path, stop_before_pixels=True).InstanceNumber))


def write_enhanced(
    path: Path,
    array: NDArray[np.int16],
    plane: str = "axial",
    *,
    modality: str = "MR",
    spacing: tuple[float, float, float] = (0.9, 1.1, 2.5),
    order: Sequence[int] | None = None,
    slopes: Sequence[float] | None = None,
    edit: Callable[[Dataset], object] = lambda _: None,
) -> Path:
    """Write one multi-frame file, array (I, J, K); its frames in any order, each with a slope of its own."""
    row, column = (np.array(direction, float) for direction in DIRECTIONS[plane])
    normal = np.cross(row, column)
    order = range(array.shape[2]) if order is None else order

    def item(**values: object) -> Sequence[Dataset]:
        d = Dataset()
        for name, value in values.items():
            setattr(d, name, value)
        return [d]

    d = Dataset()
    for name, value in TELLTALE.items():
        setattr(d, name, value)
    d.StudyInstanceUID, d.SeriesInstanceUID, d.SOPInstanceUID, d.FrameOfReferenceUID = (
        f"1.2.826.0.1.3680043.10.98.{end}" for end in (1, 2, 3, 4)
    )
    d.SOPClassUID = EnhancedMRImageStorage if modality == "MR" else EnhancedCTImageStorage
    d.Modality, d.SeriesNumber, d.InstanceNumber, d.SeriesDescription = modality, 7, 1, "enhanced"
    d.ImageType, d.Manufacturer = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "Nobody"
    d.StudyDate, d.StudyTime, d.ContentDate, d.ContentTime = "20240229", "120000", "20240229", "120501"
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = *array.shape[1::-1], 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
    d.NumberOfFrames = len(order)
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[f"{x:.7f}" for x in (*row, *column)])
    shared.PixelMeasuresSequence = item(
        PixelSpacing=[spacing[1], spacing[0]], SliceThickness=spacing[2], SpacingBetweenSlices=spacing[2]
    )
    d.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for place, k in enumerate(order):
        frame = Dataset()
        position = np.array([-31.25, -47.5, 12.125]) + k * spacing[2] * normal
        frame.PlanePositionSequence = item(ImagePositionPatient=[f"{x:.7f}"[:16] for x in position])
        frame.FrameContentSequence = item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])
        slope = 1.0 if slopes is None else slopes[place]
        frame.PixelValueTransformationSequence = item(RescaleIntercept=0, RescaleSlope=slope, RescaleType="US")
        frames.append(frame)
    d.PerFrameFunctionalGroupsSequence = frames
    d.PixelData = np.ascontiguousarray(array[:, :, list(order)].transpose(2, 1, 0)).astype("<i2").tobytes()
    d["PixelData"].VR = "OW"
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = UID(ExplicitVRLittleEndian)
    edit(d)
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path, enforce_file_format=True)
    return path


def write_mixed(
    folder: Path,
    kinds: Sequence[Mapping[str, object]],
    arrays: Sequence[NDArray[np.int16]],
    *,
    alternate: bool = False,
    **changes: Any,
) -> Path:
    """Write classic images of several kinds under one SeriesInstanceUID, array i for kind i; returns the folder.

    Args:
        folder: A new one.
        kinds: Attributes of each.
        arrays: Voxels of each, (I, J, K).
        alternate: Whether slice k is there in kind k modulo their number only, rather than in all.
        changes: Attributes of all.
    """
    folder.mkdir(parents=True)
    uids = {name: f"1.2.826.0.1.3680043.10.96.{sum(str(folder).encode())}.{end}" for end, name in enumerate(
        ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"), start=1
    )}  # fmt: skip
    for number, (kind, array) in enumerate(zip(kinds, arrays, strict=True)):
        apart = folder.with_name(f"{folder.name}-{number}")
        for k, path in enumerate(in_order(write_source(apart, array, **{**uids, **changes, **kind}))):
            if not alternate or k % len(kinds) == number:
                path.rename(folder / f"{number}{path.name}")
        shutil.rmtree(apart)
    return folder


def write_enhanced_mixed(
    path: Path, kinds: Sequence[Mapping[str, Mapping[str, object]]], arrays: Sequence[NDArray[np.int16]],
    *, alternate: bool = False, **options: Any,
) -> Path:  # fmt: skip
    """As `write_mixed`, as one multi-frame file in which kinds alternate; a kind is functional groups by name."""
    count = arrays[0].shape[2]
    frames = [(k, i) for k in range(count) for i in range(len(kinds)) if not alternate or k % len(kinds) == i]
    edit = options.pop("edit", lambda _: None)

    def mix(d: Dataset) -> None:
        for group, (_, i) in zip(d.PerFrameFunctionalGroupsSequence, frames, strict=True):
            for name, values in kinds[i].items():
                item = Dataset()
                for attribute, value in values.items():
                    setattr(item, attribute, value)
                setattr(group, name, [item])
        d.PixelData = b"".join(np.ascontiguousarray(arrays[i][:, :, k].T).astype("<i2").tobytes() for k, i in frames)
        d["PixelData"].VR = "OW"
        edit(d)

    return write_enhanced(path, arrays[0], order=[k for k, _ in frames], edit=mix, **options)


def segmentation(files: list[Path], labels: NDArray[Any], path: Path, **options: object) -> Path:
    """Write a label map (I, J, K), or shares of segments (I, J, K, segments), as highdicom does."""
    seg = pytest.importorskip("highdicom.seg")
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.sr.coding import CodedConcept

    concept = CodedConcept("108369006", "SCT", "Neoplasm")
    algorithm = AlgorithmIdentificationSequence("none", CodedConcept("123110", "DCM", "AI"), "1")
    descriptions = [
        seg.SegmentDescription(number, f"s{number}", concept, concept, "AUTOMATIC", algorithm)
        for number in range(1, (int(labels.max()) if labels.ndim == 3 else labels.shape[3]) + 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = seg.Segmentation(
            [pydicom.dcmread(file) for file in files],
            np.ascontiguousarray(labels.transpose(2, 1, 0, *range(3, labels.ndim))),
            options.pop("kind", "BINARY"),
            descriptions,
            "1.2.826.0.1.3680043.10.98.21", 30, "1.2.826.0.1.3680043.10.98.22", 1,
            "Nobody", "none", "1", "none", **options,
        )  # fmt: skip
        made.save_as(path)
    return path


def grid_of(files: list[Path]) -> Geometry:
    """The grid of a series by the formula of PS3.3 C.7.6.2.1.1, first file to last along the normal."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    row, column = np.array(headers[0].ImageOrientationPatient, float).reshape(2, 3)
    headers.sort(key=lambda d: float(np.cross(row, column) @ np.array(d.ImagePositionPatient, float)))
    first, last = (np.array(headers[end].ImagePositionPatient, float) for end in (0, -1))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * headers[0].PixelSpacing[1], column * headers[0].PixelSpacing[0]
    affine[:3, 2], affine[:3, 3] = (last - first) / (len(headers) - 1), first
    return Geometry((headers[0].Columns, headers[0].Rows, len(headers)), np.diag([-1.0, -1, 1, 1]) @ affine)


def made_of(files: list[Path], low: float = 0.0, high: float = 1500.0, seed: int = 3) -> Volume:
    """A synthetic image on the grid of a series, with fractional values."""
    grid = grid_of(files)
    return Volume(np.random.default_rng(seed).uniform(low, high, grid.shape).astype(np.float32), grid)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Hold a port of this machine: no other process gets it by chance, and a server that is given it can listen."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers set it; this one never listens
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes] | None = None, seconds: float = 120) -> None:
    """Wait until something listens on a port of this machine."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process is None or process.poll() is None, "the server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@dataclass(frozen=True)
class Archive:
    """A picture archive of others, running on this machine alone.

    Attributes:
        dicom_port: Where it takes C-STORE, as ARCHIVE.
        http_port: Where it takes STOW-RS and REST.
    """

    dicom_port: int
    http_port: int

    def ask(self, path: str, body: bytes | None = None, method: str | None = None, **headers: str) -> bytes:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", body, named, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def files(self) -> list[bytes]:
        """Every instance that it holds, as it hands them out."""
        names: list[Any] = json.loads(self.ask("/instances"))
        return [self.ask(f"/instances/{name}/file") for name in names]

    def clear(self) -> None:
        """Forget everything."""
        for name in json.loads(self.ask("/patients")):
            self.ask(f"/patients/{name}", method="DELETE")

    def knows(self, name: str, aet: str, port: int) -> None:
        """Make a node of this machine known to it, by name."""
        self.ask(f"/modalities/{name}", json.dumps([aet, "127.0.0.1", port]).encode(), method="PUT")

    def stow(self, files: list[Path]) -> None:
        edge = "chiasm-edge"
        parts = b"".join(
            f"--{edge}\r\nContent-Type: application/dicom\r\n\r\n".encode() + path.read_bytes() + b"\r\n"
            for path in files
        )
        kind = f'multipart/related; type="application/dicom"; boundary={edge}'
        body = parts + f"--{edge}--".encode()
        self.ask("/dicom-web/studies", body, Content_Type=kind, Accept="application/dicom+json")


@contextmanager
def archive(folder: Path) -> Iterator[Archive]:
    """Run Orthanc on loopback, with DICOMweb, until the block ends."""
    binary = tool("Orthanc")
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    if not plugin.exists():
        pytest.skip("the DICOMweb plugin of Orthanc is not installed (apt: orthanc-dicomweb)")
    folder.mkdir(parents=True, exist_ok=True)
    with reserved_port() as dicom_port, reserved_port() as http_port, (folder / "orthanc.log").open("wb") as log:
        made = Archive(dicom_port, http_port)
        settings = {
            "Name": "archive", "StorageDirectory": str(folder / "store"), "IndexDirectory": str(folder / "store"),
            "TemporaryDirectory": str(folder), "Plugins": [str(plugin)], "HttpPort": http_port,
            "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomPort": dicom_port,
            "DicomAet": "ARCHIVE", "DicomAlwaysAllowStore": True, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(settings))
        process = subprocess.Popen([binary, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            wait_for(made.http_port, process)
            wait_for(made.dicom_port, process)
            yield made
        finally:
            process.terminate()
            process.wait(60)
