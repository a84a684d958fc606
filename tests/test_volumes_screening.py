"""Every rule of reading and writing: what is odd is read right, what is broken is refused with its reason."""

from __future__ import annotations

import gzip
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes import Geometry, Reading, Volume, canonical, check_pair, read_volume, resample, write_volume
from chiasm.volumes.dicom_files import DicomFile, read_dataset, taming
from chiasm.volumes.dicom_frames import frames_of
from chiasm.volumes.dicom_series import TAGS
from chiasm.volumes.dicom_stacks import arrange
from chiasm.volumes.mirroring import find_mirrored
from chiasm.volumes.nifti import check_header
from chiasm.volumes.screening import check_affine, volume_files
from conftest import REAL
from dicom_patients import write_enhanced, write_source
from odd_files import AFFINE, CODES, SHAPE, metaimage, nifti, put, voxels

# ---------------------------------------------------------------- read right


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", list(CODES))
def test_every_real_type_in_both_byte_orders_and_versions_equals_nibabel(
    kind: str, order: str, version: int, tmp_path: Path
) -> None:
    path = put(tmp_path, nifti(voxels(kind), order=order, version=version))
    volume, theirs = read_volume(path), nib.load(path)
    np.testing.assert_array_equal(volume.array, theirs.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.geometry.affine, theirs.affine, atol=1e-6)
    assert volume.array.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "name", "packed"),
    [
        ({"scl_slope": 2.5, "scl_inter": -7.0}, "a.nii", False),
        ({"scl_slope": 0.0, "scl_inter": 9.0}, "a.nii", False),
        ({"scl_slope": -1.0}, "a.nii", False),
        ({"sform_code": 0}, "a.nii", False),
        ({"sform_code": 0, "pixdim": [0.0, 2, 1.5, 3, 0, 0, 0, 0]}, "a.nii", False),
        ({"sform_code": 0, "pixdim": [-1.0, 2, 1.5, 3, 0, 0, 0, 0]}, "a.nii", False),
        ({"sform_code": 0, "quatern": [0.0, 0.0, 1.0]}, "a.nii", False),
        ({"sform_code": 0, "quatern": [0.3, -0.2, 0.5]}, "a.nii", False),
        ({"qform_code": 0}, "a.nii", False),
        ({"dim": [5, 5, 6, 7, 1, 1, 1, 1]}, "a.nii", False),
        ({"tail": b"some words after the voxels"}, "a.nii", False),
        ({"extension": b"\1\0\0\0" + struct.pack("<2i", 16, 6) + b"comment\0"}, "a.nii", False),
        ({}, "gzip called.nii", True),
        ({}, "plain called.nii.gz", False),
        ({}, "no suffix at all", False),
    ],
)
def test_odd_but_legal_files_equal_nibabel(changes: dict[str, Any], name: str, packed: bool, tmp_path: Path) -> None:
    path = put(tmp_path, nifti(changes=changes), name, packed)
    plain = put(tmp_path, nifti(changes=changes), "plain.nii")
    volume, theirs = read_volume(path), nib.load(plain)
    np.testing.assert_array_equal(volume.array, np.squeeze(theirs.get_fdata(dtype=np.float32)))
    np.testing.assert_allclose(volume.geometry.affine, theirs.affine, atol=1e-5)
    assert volume.geometry.shape == SHAPE


@pytest.mark.parametrize(("code", "factor"), [(1, 1000.0), (3, 1e-3), (0, 1.0), (10, 1.0)])
def test_metres_and_microns_become_millimetres(code: int, factor: float, tmp_path: Path) -> None:
    matrix = AFFINE.copy()
    matrix[:3] /= factor
    spacing = [1.0, *(np.array([2.0, 1.5, 3.0]) / factor), 0, 0, 0, 0]
    changes = {
        "xyzt_units": code, "srow": matrix[:3].ravel().tolist(), "pixdim": spacing, "qoffset": matrix[:3, 3].tolist()
    }  # fmt: skip
    np.testing.assert_allclose(read_volume(put(tmp_path, nifti(changes=changes))).geometry.affine, AFFINE, rtol=1e-6)


def test_a_header_and_image_pair_is_read_by_either_name(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(voxels(), AFFINE), tmp_path / "pair.hdr")
    for name in ("pair.hdr", "pair.img"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, voxels())
    (tmp_path / "pair.img").unlink()
    with pytest.raises(VolumeError, match=r"pair\.img"):
        read_volume(tmp_path / "pair.hdr")


@pytest.mark.parametrize("names", [("pair.hdr", "pair.img"), ("PAIR.HDR", "PAIR.IMG"), ("pair.hdr", "pair.img.gz")])
def test_the_files_of_a_pair_are_those_that_it_is_read_from(names: tuple[str, str], tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(voxels(), AFFINE), tmp_path / "made.hdr")
    header, image = (tmp_path / name for name in names)
    (tmp_path / "made.hdr").rename(header)
    content = (tmp_path / "made.img").read_bytes()
    image.write_bytes(gzip.compress(content) if image.suffix == ".gz" else content)
    np.testing.assert_array_equal(read_volume(header).array, voxels())
    assert volume_files(header) == [header, image]


def test_a_gzip_of_several_members_is_read_whole(tmp_path: Path) -> None:
    content = nifti()
    path = tmp_path / "members.nii.gz"
    path.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    np.testing.assert_array_equal(read_volume(path).array, voxels())


def test_labels_stay_whole_numbers_of_the_smallest_type(tmp_path: Path) -> None:
    empty = np.zeros(SHAPE, np.float32)
    assert read_volume(put(tmp_path, nifti(empty)), labels=True).array.dtype == np.uint8
    assert not read_volume(put(tmp_path, nifti(empty)), labels=True).array.any()
    stored = voxels("f4") * 10
    found = read_volume(put(tmp_path, nifti(stored)), labels=True).array
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, stored)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha"])
def test_oblique_flipped_and_permuted_grids_are_written_and_read_as_simpleitk_and_nibabel_do(
    seed: int, suffix: str, tmp_path: Path
) -> None:
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() * [1.0, 2.0, 3.0]
    affine[:3, seed % 3] *= -1 if seed % 2 else 1
    affine[:3, 3] = rng.normal(size=3) * 50
    array = rng.normal(size=SHAPE).astype(np.float32)
    path = tmp_path / f"image{suffix}"
    write_volume(path, array, Geometry(SHAPE, affine))
    mine, itk = read_volume(path), sitk.ReadImage(str(path))
    np.testing.assert_allclose(mine.geometry.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(mine.array, array)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).transpose(2, 1, 0), array)
    corner = [float(side - 1) for side in SHAPE]
    x, y, z = itk.TransformContinuousIndexToPhysicalPoint(corner)
    np.testing.assert_allclose([-x, -y, z], (affine @ [*corner, 1])[:3], atol=1e-3)
    if suffix != ".mha":
        np.testing.assert_allclose(nib.load(path).affine, affine, atol=1e-4)
        np.testing.assert_allclose(nib.load(path).get_qform(), affine, atol=1e-3)
    theirs = tmp_path / "theirs.mha"
    sitk.WriteImage(itk, str(theirs), useCompression=bool(seed % 2))
    again = read_volume(theirs)
    np.testing.assert_allclose(again.geometry.affine, affine, atol=1e-3)
    np.testing.assert_array_equal(again.array, array)


def test_a_metaimage_in_two_files_and_in_the_other_byte_order(tmp_path: Path) -> None:
    array = voxels()
    head = metaimage(array, ElementDataFile="voxels.raw", BinaryDataByteOrderMSB="True")
    (tmp_path / "image.mhd").write_bytes(head[: -array.nbytes])
    (tmp_path / "voxels.raw").write_bytes(array.astype(">i2").tobytes(order="F"))
    np.testing.assert_array_equal(read_volume(tmp_path / "image.mhd").array, array)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "image.mhd"))).T, array)


# ---------------------------------------------------------------- refused

BROKEN = {
    "magic": {"magic": b"abc\0"},
    "dimensions": {"dim": [9, 5, 6, 7, 1, 1, 1, 1]},
    "dimensions-0": {"dim": [0, 5, 6, 7, 1, 1, 1, 1]},
    "dimensions-negative": {"dim": [3, 5, -6, 7, 1, 1, 1, 1]},
    "datatype": {"datatype": 128, "bitpix": 24},
    "datatype-complex": {"datatype": 32, "bitpix": 64},
    "datatype-unknown": {"datatype": 77},
    "bitpix": {"bitpix": 32},
    "too-large": {"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]},
    "vox-offset": {"vox_offset": 100.0},
    "vox-offset-nan": {"vox_offset": float("nan")},
    "truncated": {"vox_offset": 100000.0},
    "extension": {"extension": b"\1\0\0\0" + struct.pack("<2i", 1600, 6) + bytes(8)},
    "slope": {"scl_slope": float("nan")},
    "slope-inf": {"scl_slope": 1.0, "scl_inter": float("inf")},
    "affine": {"srow": [float("nan")] * 12, "qform_code": 0},
    "singular": {"srow": [2.0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0], "qform_code": 0},
    "spacing": {"srow": [1e-4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], "qform_code": 0},
    "spacing-large": {"srow": [80.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0], "qform_code": 0},
    "skew": {"srow": [2.0, 0.01, 0, 0, 0, 1.5, 0, 0, 0, 0, 3, 0], "qform_code": 0},
    "two-forms": {"qoffset": [-10.0, 20.0, -4.9]},
    "no-orientation": {"qform_code": 0, "sform_code": 0},
    "quaternion": {"sform_code": 0, "quatern": [0.9, 0.9, 0.9]},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("rule", list(BROKEN))
def test_a_broken_header_is_refused_with_its_reason(rule: str, version: int, packed: bool, tmp_path: Path) -> None:
    if version == 2 and rule == "vox-offset-nan":
        changes: dict[str, Any] = {"vox_offset": -1}
    else:
        changes = {k: int(v) if version == 2 and k == "vox_offset" else v for k, v in BROKEN[rule].items()}
    path = put(tmp_path, nifti(version=version, changes=changes), "odd.nii.gz", packed)
    with pytest.raises(VolumeError, match=r"odd\.nii\.gz") as caught:
        read_volume(path)
    reasons = [
        rule,
        *(
            rule[: -len(end)]
            for end in ("-0", "-nan", "-inf", "-large", "-negative", "-complex", "-unknown")
            if rule.endswith(end)
        ),
    ]
    assert caught.value.reason in reasons
    assert caught.value.path == path


def test_several_volumes_colours_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    cases: dict[str, NDArray[Any]] = {
        "four-d": np.ones((5, 6, 7, 2), np.int16),
        "not-finite": np.where(voxels("f4") > 90, np.inf, voxels("f4")).astype(np.float32),
        "constant": np.full(SHAPE, 3, np.int16),
        "thin": np.arange(40, dtype=np.int16).reshape(5, 8, 1),
    }
    for reason, array in cases.items():
        with pytest.raises(VolumeError) as caught:
            read_volume(put(tmp_path, nifti(array)))
        assert caught.value.reason == reason
    huge = voxels("f8")
    huge[0, 0, 0] = 1e300  # finite in the file, not in float32
    with pytest.raises(VolumeError, match="finite"):
        read_volume(put(tmp_path, nifti(huge)))
    assert read_volume(put(tmp_path, nifti(cases["thin"])), allow_thin=True).array.shape == (5, 8, 1)
    assert read_volume(put(tmp_path, nifti(cases["constant"])), allow_constant=True).array.max() == 3


def test_an_option_names_which_form_to_believe(tmp_path: Path) -> None:
    path = put(tmp_path, nifti(changes=BROKEN["two-forms"]))
    by_s, by_q = (read_volume(path, reading=Reading(form=form)).geometry for form in ("sform", "qform"))  # type: ignore[arg-type]
    np.testing.assert_allclose(by_s.affine, AFFINE)
    np.testing.assert_allclose(by_q.affine[:3, 3], [-10, 20, -4.9], atol=1e-6)
    write_volume(tmp_path / "b.nii", voxels(), by_q)  # what was believed is what is written
    np.testing.assert_allclose(read_volume(tmp_path / "b.nii").geometry.affine, by_q.affine, atol=1e-6)
    path = put(tmp_path, nifti(changes=BROKEN["no-orientation"]))
    np.testing.assert_allclose(
        read_volume(path, reading=Reading(assume_ras=True)).geometry.affine, np.diag([2, 1.5, 3, 1])
    )


def test_damaged_gzips_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(nifti())
    crc = bytearray(whole)
    crc[-7] ^= 1
    length = bytearray(whole)
    length[-1] ^= 1
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 16
    for name, content in {
        "cut": whole[: len(whole) // 2], "no end": whole[:-4], "crc": crc, "length": length, "middle": middle,
        "empty": b"", "only magic": whole[:5],
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(bytes(content))
        with pytest.raises(VolumeError) as caught:
            read_volume(path)
        assert caught.value.reason in ("truncated", "corrupted", "format", "header"), name


@pytest.mark.parametrize("shape", [SHAPE, (30, 30, 30)])
def test_a_file_cut_short_is_refused_at_every_length(shape: tuple[int, int, int], tmp_path: Path) -> None:
    content = nifti(np.ones(shape, np.int16))
    for keep in (0, 3, 100, 347, 351, 352, len(content) // 2, len(content) - 1):
        with pytest.raises(VolumeError):
            read_volume(put(tmp_path, content[:keep]))


@pytest.mark.slow
def test_a_gzip_bomb_stops_early_in_time_and_memory(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(2**22)
    content = packer.compress(nifti()) + b"".join(packer.compress(block) for _ in range(256)) + packer.flush()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(content)  # a megabyte that unpacks to one GiB
    program = (
        "import re, sys, time\nfrom chiasm.errors import VolumeError\nfrom chiasm.volumes import read_volume\n"
        "start = time.process_time()\n"
        "try:\n    read_volume(sys.argv[1])\nexcept VolumeError as error:\n    assert error.reason == 'too-long'\n"
        "else:\n    raise SystemExit('was read')\n"
        "most = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "print(int(most[1]) / 1024, time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 300 and seconds < 2


def test_labels_that_are_no_whole_numbers_or_not_declared_are_refused(tmp_path: Path) -> None:
    for array in (voxels("f4") + 0.5, np.where(voxels("f4") > 50, np.nan, 1).astype(np.float32)):
        with pytest.raises(VolumeError) as caught:
            read_volume(put(tmp_path, nifti(array)), labels=True)
        assert caught.value.reason == "labels"
    labels = np.random.default_rng(0).choice([0, 1, 2, 4], SHAPE).astype(np.uint8)
    path = put(tmp_path, nifti(labels))
    np.testing.assert_array_equal(read_volume(path, labels=True, declared=(1, 2, 4)).array, labels)
    with pytest.raises(VolumeError, match="found 4"):
        read_volume(path, labels=True, declared=(1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ElementDataFile": "/etc/passwd"}, "elsewhere"),
        ({"ElementDataFile": "../other.raw"}, "elsewhere"),
        ({"ElementDataFile": "LIST"}, "elsewhere"),
        ({"ElementDataFile": "slice%03d.raw 1 7 1"}, "elsewhere"),
        ({"ElementDataFile": "absent.raw"}, "not-found"),
        ({"ElementDataFile": ""}, "header"),
        ({"DimSize": ""}, "header"),
        ({"DimSize": "5 6"}, "header"),
        ({"DimSize": "5 6 nan"}, "header"),
        ({"DimSize": "5 6 -7"}, "dimensions"),
        ({"DimSize": "5 6 8"}, "truncated"),
        ({"DimSize": "50000 50000 8"}, "too-large"),
        ({"NDims": "4", "DimSize": "5 6 7 2", "TransformMatrix": "", "Offset": "", "ElementSpacing": ""}, "four-d"),
        ({"ElementType": "MET_STRING"}, "datatype"),
        ({"ElementNumberOfChannels": "3"}, "four-d"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "singular"),
        ({"ElementSpacing": "0 1 1"}, "spacing"),
        ({"BinaryData": "False"}, "text-voxels"),
        ({"CompressedData": "True"}, "corrupted"),
    ],
)
def test_a_broken_metaimage_is_refused_with_its_reason(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"odd\.mha") as caught:
        read_volume(put(tmp_path, metaimage(**changes), "odd.mha"))
    assert caught.value.reason == reason


def test_a_metaimage_may_not_lead_out_of_its_folder_by_a_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "voxels.raw").write_bytes(voxels().tobytes(order="F"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "voxels.raw").symlink_to(secret / "voxels.raw")
    path = put(data, metaimage(ElementDataFile="voxels.raw"), "odd.mhd")
    with pytest.raises(VolumeError):
        read_volume(path)


def test_folders_without_dicom_and_other_formats_are_refused(tmp_path: Path) -> None:
    for name, content, told in [
        ("slice", bytes(128) + b"DICM" + bytes(60), "names no series"),
        ("image.png", b"\x89PNG\r\n\x1a\n" + bytes(200), "is of no format that is read .*PNG.*nrrd"),
        ("array.npy", b"\x93NUMPY" + bytes(200), "is of no format"),
        ("model.pkl", b"\x80\x04K\x01.", "is of no format"),
    ]:
        with pytest.raises(VolumeError, match=told):
            read_volume(put(tmp_path, content, name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="holds no DICOM file"):
        read_volume(tmp_path / "empty")
    with pytest.raises(VolumeError, match="does not exist"):
        read_volume(tmp_path / "nowhere.nii")


MUTATIONS = 50  # for each example
TEMPTING = (
    b"\0", b"\xff", b"\x7f", b"\x80", b"\1", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\x7f", bytes(8),
    b"\xff" * 8,
)  # fmt: skip
WORDS = (
    b"nan", b"-1", b"0", b"1e400", b"9" * 40, b"", b"True", b"LOCAL", b"x.raw", b"\0", b"\n", b"=", b"-0.0", b"3 3",
)  # fmt: skip


def mutated(content: bytes, longest: int, draw: random.Random, tempting: Sequence[bytes]) -> bytes:
    """Spoil the first bytes of a file in one to six places, and sometimes its length."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(min(len(changed), longest))
        value = draw.choice(tempting) if draw.random() < 0.5 else bytes([draw.randrange(256)])
        changed[at : at + (len(value) if draw.random() < 0.9 else draw.randrange(9))] = value
    if draw.random() < 0.05:
        del changed[draw.randrange(len(changed)) :]
    return bytes(changed)


def screen(kind: str, content: bytes, path: Path) -> None:
    """Check a header alone, as `read_volume` does before it reads voxels."""
    if kind.startswith("NIfTI"):
        header = check_header(content, path)
        check_affine(Geometry(header.shape, header.affine), path)
    else:
        part = DicomFile(path)
        with taming(part):
            dataset = read_dataset(part, BytesIO(content), tags=TAGS)
            check_affine(arrange(frames_of(dataset, part), path).geometry, path)


def check_mutated(kind: str, seed: int, folder: Path) -> None:
    """Check spoiled headers, and read one file of 25: right, or refused by our own error, and soon."""
    draw = random.Random(seed)
    content, longest, name = HEADS[kind]
    path = folder / name
    for number in range(MUTATIONS):
        spoiled = mutated(content, longest, draw, WORDS if kind == "MetaImage" else TEMPTING)
        start = time.process_time()
        try:
            if number % 25 and kind != "MetaImage":
                screen(kind, spoiled, path)
            else:
                path.write_bytes(spoiled)
                volume = read_volume(path, allow_thin=True)
                assert np.isfinite(volume.array).all() and np.isfinite(volume.geometry.affine).all()
        except VolumeError:
            pass
        assert time.process_time() - start < 2, f"{kind}, seed {seed}, number {number}"


def dicom_file(multi_frame: bool) -> bytes:
    """The bytes of one file, the same each time."""
    array = np.arange(60, dtype=np.int16).reshape(4, 5, 3)
    uids = {f"{name}UID": f"1.2.3.{name.count('e')}" for name in ("SOPInstance", "SeriesInstance", "StudyInstance")}
    with tempfile.TemporaryDirectory() as folder:
        if multi_frame:
            return write_enhanced(Path(folder) / "one", array).read_bytes()
        return write_source(Path(folder) / "in", array, FrameOfReferenceUID="1.2.4", **uids)[0].read_bytes()


#: Kind of header to a sound file, how many of its bytes are spoiled, and its name.
HEADS = {
    "NIfTI-1": (nifti(), 400, "fuzz.nii"),
    "NIfTI-1, big-endian": (nifti(order=">"), 400, "fuzz.nii"),
    "NIfTI-2": (nifti(version=2), 600, "fuzz.nii"),
    "MetaImage": (metaimage(), 300, "fuzz.mha"),
    "DICOM": (dicom_file(False), 2000, "fuzz.dcm"),
    "DICOM, multi-frame": (dicom_file(True), 2500, "fuzz.dcm"),
}
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS)
def test_no_mutated_header_raises_anything_but_our_error(kind: str, seed: int, tmp_path: Path) -> None:
    check_mutated(kind, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "examples"), [
    ("NIfTI-1", 700), ("NIfTI-1, big-endian", 300), ("NIfTI-2", 750), ("MetaImage", 200), ("DICOM", 40),
    ("DICOM, multi-frame", 10),
])  # fmt: skip
def test_a_hundred_thousand_mutated_headers_raise_nothing_but_our_error(
    kind: str, examples: int, tmp_path: Path
) -> None:
    @settings(max_examples=examples, deadline=None, database=None)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        check_mutated(kind, seed, tmp_path)

    check()


# ---------------------------------------------------------------- written


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_is_written_keeps_the_sources_geometry_bit_for_bit(
    suffix: str, order: str, version: int, tmp_path: Path
) -> None:
    changes = {
        "sform_code": 3, "qform_code": 2, "xyzt_units": 10, "quatern": [0.1, 0.2, 0.3],
        "pixdim": [-1.0, 2, 1.5, 3, 1, 0, 0, 0], "scl_slope": 3.0, "scl_inter": 4.0,
    }  # fmt: skip
    changes["sform_code"] = 0
    source = read_volume(put(tmp_path, nifti(order=order, version=version, changes=changes)))
    path = tmp_path / f"out{suffix}"
    write_volume(path, source.array * 2, source.geometry)
    a, b = nib.load(tmp_path / "odd.nii").header, nib.load(path).header
    for name in ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
                 "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):  # fmt: skip
        assert a[name].tobytes() == b[name].tobytes(), name
    np.testing.assert_array_equal(nib.load(path).get_fdata(dtype=np.float32), source.array * 2)


def test_a_metaimage_keeps_its_lines_of_place(tmp_path: Path) -> None:
    odd = {"TransformMatrix": "0 1 0 -1 0 0 0 0 1", "Offset": "1.10 -2 3e1", "AnatomicalOrientation": "LPS"}
    source = read_volume(put(tmp_path, metaimage(**odd), "odd.mha"))
    write_volume(tmp_path / "out.mha", source.array, source.geometry)
    text = (tmp_path / "out.mha").read_bytes().partition(b"ElementDataFile")[0].decode()
    for name, value in odd.items():
        assert f"{name} = {value}\n" in text
    write_volume(tmp_path / "out.nii.gz", source.array, source.geometry)  # and crosses over to the other format
    np.testing.assert_allclose(read_volume(tmp_path / "out.nii.gz").geometry.affine, source.geometry.affine, atol=1e-5)


def test_equal_volumes_give_equal_bytes_and_carry_no_texts_of_the_source(tmp_path: Path) -> None:
    content = bytearray(nifti())
    content[148:163] = b"DOE^JANE 1970-1"
    source = read_volume(put(tmp_path, bytes(content)))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, source.array, source.geometry)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert b"DOE" not in gzip.decompress((tmp_path / "a.nii.gz").read_bytes())


def test_values_too_large_are_cut_and_counted_never_wrapped(tmp_path: Path) -> None:
    grid = Geometry(SHAPE, AFFINE)
    labels = np.zeros(SHAPE, np.int64)
    labels[0, 0, 0], labels[1, 1, 1] = 2**40, 40_000
    assert write_volume(tmp_path / "a.nii.gz", labels, grid, labels=True) == 1
    found = nib.load(tmp_path / "a.nii.gz").get_fdata()
    assert found[0, 0, 0] == 2**31 - 1 and found[1, 1, 1] == 40_000
    image = np.full(SHAPE, 1.0)
    image[0, 0, 0] = 1e300
    assert write_volume(tmp_path / "b.nii.gz", image, grid) == 1
    assert np.isfinite(nib.load(tmp_path / "b.nii.gz").get_fdata()).all()


def test_a_wrong_name_or_shape_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"\.nii\.gz"):
        write_volume(tmp_path / "image.png", voxels(), Geometry(SHAPE, AFFINE))
    with pytest.raises(ValueError, match="does not fit"):
        write_volume(tmp_path / "image.nii", np.ones((2, 2, 2)), Geometry(SHAPE, AFFINE))
    with pytest.raises(ValueError, match="whole"):
        write_volume(tmp_path / "image.nii", np.full(SHAPE, 0.5), Geometry(SHAPE, AFFINE), labels=True)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- pairs


def head(seed: int = 0, shape: tuple[int, int, int] = (40, 44, 36)) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two contrasts of one lopsided head."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    tissue = ndimage.gaussian_filter(rng.normal(size=shape), 3)
    axes = np.meshgrid(*(np.linspace(-1.3, 1.3, n) for n in shape), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 1
    a = np.where(inside, 100 + 400 * tissue + rng.normal(size=shape) * 3, 0)
    b = np.where(inside, 300 - 900 * tissue**2 * np.sign(tissue) + rng.normal(size=shape) * 3, 0)
    return a.astype(np.float32), b.astype(np.float32)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(), (0,), (1, 2), (0, 1, 2)])
def test_the_same_space_in_another_axis_order_is_brought_together(
    axes: tuple[int, int, int], flips: tuple[int, ...]
) -> None:
    a, b = head()
    image = nib.Nifti1Image(b, AFFINE)
    turned = np.flip(b.transpose(axes), flips) if flips else b.transpose(axes)
    affine = AFFINE[:, [*axes, 3]].copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
        affine[:3, axis] *= -1
    source = Volume(a, Geometry(a.shape, AFFINE))  # type: ignore[arg-type]
    found = check_pair(source, Volume(turned, Geometry(turned.shape, affine)))
    np.testing.assert_array_equal(found.array, np.asarray(image.dataobj))
    assert found.geometry is source.geometry


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m @ np.diag([1.0, 1, 1.02, 1]), "grid"),
        (lambda m: m + np.array([[0, 0, 0, 0.1], [0] * 4, [0] * 4, [0] * 4]), "grid"),
        (lambda m: m + np.array([[0, 0, 0, 5000], [0] * 4, [0] * 4, [0] * 4]), "no-overlap"),
    ],
)
def test_a_pair_on_two_grids_is_refused_with_both_told(change: Any, reason: str) -> None:
    a, b = head()
    with pytest.raises(VolumeError, match="mprage") as caught:
        check_pair(
            Volume(a, Geometry(a.shape, AFFINE)),  # type: ignore[arg-type]
            Volume(b, Geometry(b.shape, change(AFFINE))),  # type: ignore[arg-type]
            a_name="mprage",
            b_name="t2",
        )
    assert caught.value.reason == reason and caught.value.hint
    with pytest.raises(VolumeError, match="grid differs"):
        check_pair(Volume(a, Geometry(a.shape, AFFINE)), Volume(b[:-1], Geometry(b[:-1].shape, AFFINE)))  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_mirrored_pair_is_refused_and_a_true_one_is_not(axis: int, seed: int) -> None:
    a, b = head(seed)
    grid = Geometry(a.shape, AFFINE)  # type: ignore[arg-type]
    check_pair(Volume(a, grid), Volume(b, grid))
    with pytest.raises(VolumeError, match=f"axis {'IJK'[axis]}") as caught:
        check_pair(Volume(a, grid), Volume(np.flip(b, axis), grid))
    assert caught.value.reason == "mirrored"
    told = str(caught.value)  # what was measured, and no cause that may not be the true one
    assert re.search(r"shared information of \d\.\d\d nats mirrored, \d\.\d\d as stored", told)
    assert "flipped" in told and "badly aligned" in told


@pytest.mark.slow
def test_true_pairs_of_simulated_patients_in_large_voxels_are_not_called_mirrored() -> None:
    from chiasm.simulation.patient import DIFFICULTIES, draw_subject

    hits = 0
    for number in (1, 2, 3, 4, 5, 6, 13):  # 3 and 13: coils that shade two scans from opposite sides
        subject = draw_subject(number, 1, heads=None, spacing_mm=4.0, difficulty=DIFFICULTIES["standard"])
        for stripped in (True, False):
            images = {name: image * subject.stripped if stripped else image for name, image in subject.images.items()}
            for first, second in combinations(sorted(images), 2):
                assert find_mirrored(images[first], images[second]) is None, (number, first, second, stripped)
        for axis in range(3):
            turned = np.flip(subject.images["t2"] * subject.stripped, axis)
            found = find_mirrored(subject.images["t1"] * subject.stripped, turned)
            hits += found is not None and found.axis == axis and found.information > 1.3 * found.as_stored
    assert hits == 21


def test_unrelated_and_symmetric_content_is_no_mirror_image() -> None:
    rng = np.random.default_rng(0)
    assert find_mirrored(rng.normal(size=(40, 40, 40)), rng.normal(size=(40, 40, 40))) is None
    x = np.linspace(-1, 1, 40)
    ball = np.exp(-(x[:, None, None] ** 2 + x[None, :, None] ** 2 + x[None, None] ** 2))
    assert find_mirrored(ball, 1 - ball) is None


# ---------------------------------------------------------------- real scans


@pytest.mark.slow
@pytest.mark.realdata
def test_real_scans_are_read_as_nibabel_reads_them_and_their_pairs_fit() -> None:
    cases = sorted((REAL / "tumour_tcga").iterdir())
    assert len(cases) == 6
    for case in cases:
        paths = {path.name.rpartition("_")[2].partition(".")[0]: path for path in case.glob("*.nii.gz")}
        volumes = {name: read_volume(path, labels=name == "seg") for name, path in paths.items()}
        for name, volume in volumes.items():
            theirs = nib.load(paths[name])
            np.testing.assert_array_equal(volume.array, theirs.get_fdata(dtype=np.float32))
            np.testing.assert_allclose(volume.geometry.affine, theirs.affine, atol=1e-6)
            check_pair(volumes["t1"], volume, labels=name == "seg")
        for name in ("t2", "flair"):
            wrong = Volume(np.flip(volumes[name].array, 0), volumes[name].geometry)
            with pytest.raises(VolumeError, match="mirrored"):
                check_pair(volumes["t1"], wrong)


@pytest.mark.realdata
def test_a_real_scan_comes_back_from_resampling_and_turning(tmp_path: Path) -> None:
    path = next((REAL / "tumour_tcga").rglob("*_t1.nii.gz"))
    volume = read_volume(path)
    upright = canonical(volume)
    assert nib.aff2axcodes(upright.geometry.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(resample(upright, upright.geometry).array, upright.array)
    write_volume(tmp_path / "out.nii.gz", volume.array, volume.geometry)
    a, b = nib.load(path).header, nib.load(tmp_path / "out.nii.gz").header
    for name in ("pixdim", "srow_x", "srow_y", "srow_z", "qform_code", "sform_code", "quatern_b"):
        assert a[name].tobytes() == b[name].tobytes()


@pytest.mark.parametrize("angle", [179.99, 180.0, 180.01])
@pytest.mark.parametrize("axis", [[0, 0, 1.0], [1.0, 0, 0], [0.6, 0.8, 0]])
def test_a_half_turn_is_not_mistaken_for_two_places(angle: float, axis: list[float], tmp_path: Path) -> None:
    from scipy.spatial.transform import Rotation

    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.radians(angle) * np.array(axis)).as_matrix()
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(200, 200, 150)).astype(np.float32), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "turned.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "turned.nii").geometry.affine, affine, atol=1e-5)
    content = bytearray((tmp_path / "turned.nii").read_bytes())
    struct.pack_into("<f", content, 276, 0.05)  # qoffset_z: what is truly elsewhere is still found
    with pytest.raises(VolumeError, match="two positions"):
        read_volume(put(tmp_path, bytes(content)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_large_volume_is_written_a_few_planes_at_a_time(suffix: str, tmp_path: Path) -> None:
    array = np.zeros((128, 128, 512), np.float32, order="F")  # 32 MiB
    array[40:60, 30:50, ::3] = np.arange(171, dtype=np.float32)
    path = tmp_path / f"large{suffix}"
    tracemalloc.start()
    write_volume(path, array, Geometry(array.shape, np.eye(4)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < array.nbytes / 4
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), array)
    bent = np.ascontiguousarray(array[::-1, :-3, ::2])[3:]  # laid out in another order, and not whole
    write_volume(path, bent, Geometry(bent.shape, np.eye(4)))
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), bent)


@pytest.mark.parametrize(
    ("kind", "slope", "kept"),
    [
        *[("<i2", 1, "int16"), ("<u2", 1, "uint16"), ("u1", 1, "uint8"), (">i2", 1, "float32")],
        *[("<i2", 2, "float32"), ("<i4", 1, "float32"), ("<f8", 1, "float32")],
    ],
)
def test_small_integers_stay_as_they_are_stored_where_that_is_allowed(
    kind: str, slope: float, kept: str, tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(0, 200, (9, 8, 7)).astype(kind)
    header = nib.Nifti1Header(endianness=">" if kind.startswith(">") else "<")
    image = nib.Nifti1Image(array, np.eye(4), header)
    image.header.set_data_dtype(array.dtype)
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / "image.nii.gz")
    narrow, usual = (read_volume(tmp_path / "image.nii.gz", narrow=narrow).array for narrow in (True, False))
    assert narrow.dtype == kept and usual.dtype == np.float32
    np.testing.assert_array_equal(narrow, usual)
