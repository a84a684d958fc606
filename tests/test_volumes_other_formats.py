"""NRRD, MGH and MINC 2: grids and values against libraries that others wrote, and what must be refused."""

from __future__ import annotations

import bz2
import gzip
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import h5py
import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from chiasm.cohorts.completed import is_synthetic
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import VolumeError
from chiasm.prediction.folders import predict
from chiasm.reports.evaluation import evaluate
from chiasm.volumes.geometry import Geometry, Volume, canonical
from chiasm.volumes.screening import (
    SYNTHETIC,
    Reading,
    read_grid,
    read_volume,
    says_synthetic,
    volume_files,
    write_volume,
)

SHAPE = (5, 6, 7)


def geometries() -> Iterator[NDArray[np.float64]]:
    """Twenty affines: axis orders, flips, oblique ones, uneven spacings."""
    rng = np.random.default_rng(0)
    orders = list(permutations(range(3)))
    signs = list(product((1, -1), repeat=3))
    for index in range(20):
        matrix = np.zeros((3, 3))
        for column, row in enumerate(orders[index % 6]):
            matrix[row, column] = signs[index % 8][column]
        if index >= 10:
            matrix = Rotation.from_rotvec(rng.normal(0, 0.4, 3)).as_matrix() @ matrix
        affine = np.eye(4)
        affine[:3, :3] = matrix * rng.uniform(0.4, 4.0, 3)
        affine[:3, 3] = rng.uniform(-200, 200, 3)
        yield affine


AFFINES = list(geometries())


def voxels(seed: int = 0, dtype: str = "int16") -> NDArray[Any]:
    return np.random.default_rng(seed).integers(-300, 3000, SHAPE).astype(dtype)


def vector(values: NDArray[np.float64]) -> str:
    return f"({','.join(repr(float(value)) for value in values)})"


def header(affine: NDArray[np.float64], **changes: str | None) -> str:
    """A header of NRRD, in the space RAS; a change of None leaves a line out."""
    lines: dict[str, str | None] = {
        "type": "short",
        "dimension": "3",
        "space": "right-anterior-superior",
        "sizes": " ".join(map(str, SHAPE)),
        "space directions": " ".join(vector(column) for column in affine[:3, :3].T),
        "space origin": vector(affine[:3, 3]),
        "endian": "little",
        "encoding": "raw",
        **{name.replace("_", " "): value for name, value in changes.items()},
    }
    return "NRRD0005\n# made by a test\n" + "".join(f"{k}: {v}\n" for k, v in lines.items() if v is not None) + "\n"


def write_nrrd(path: Path, text: str, content: bytes) -> Path:
    path.write_bytes(text.encode() + content)
    return path


def agree(path: Path, affine: NDArray[np.float64], array: NDArray[Any], **options: Any) -> None:
    """Voxel values exactly and places within 1e-4 mm, whatever axis order the reader chose."""
    read, right = canonical(read_volume(path, **options)), canonical(Volume(array, Geometry(SHAPE, affine)))
    np.testing.assert_allclose(read.geometry.affine, right.geometry.affine, atol=1e-4)
    np.testing.assert_array_equal(read.array, right.array)
    np.testing.assert_array_equal(read_grid(path).affine, read_volume(path, **options).geometry.affine)


@pytest.mark.parametrize("affine", AFFINES)
def test_nrrd_of_simpleitk_lies_where_it_was_written(tmp_path: Path, affine: NDArray[np.float64]) -> None:
    image = sitk.GetImageFromArray(voxels().T)
    lps = np.diag([-1.0, -1, 1]) @ affine[:3]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:, 3].tolist())
    sitk.WriteImage(image, tmp_path / "a.nrrd", useCompression=True)
    agree(tmp_path / "a.nrrd", affine, voxels())


@pytest.mark.parametrize("space", ["RAS", "left-anterior-superior", "LPS"])
@pytest.mark.parametrize("affine", AFFINES[::5])
def test_nrrd_of_pynrrd_lies_where_its_space_says(tmp_path: Path, affine: NDArray[np.float64], space: str) -> None:
    turn = {"RAS": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "LPS": (-1, -1, 1)}[space]
    there = np.diag([*turn, 1.0]) @ affine
    nrrd.write(
        str(tmp_path / "a.nrrd"),
        voxels(),
        {"space": space, "space directions": there[:3, :3].T, "space origin": there[:3, 3], "kinds": ["domain"] * 3},
    )
    agree(tmp_path / "a.nrrd", affine, voxels())


@pytest.mark.parametrize("affine", AFFINES)
def test_mgz_of_nibabel_lies_where_it_was_written(tmp_path: Path, affine: NDArray[np.float64]) -> None:
    nibabel.save(nibabel.MGHImage(voxels(), affine), tmp_path / "a.mgz")
    agree(tmp_path / "a.mgz", affine, voxels())


def as_nibabel_reads(path: Path) -> tuple[NDArray[np.float64], NDArray[Any]]:
    content = path.read_bytes()
    image = nibabel.MGHImage.from_bytes(gzip.decompress(content) if path.suffix == ".mgz" else content)
    return image.affine, np.asarray(image.dataobj)


def as_pynrrd_reads(path: Path) -> tuple[NDArray[np.float64], NDArray[Any]]:
    array, head = nrrd.read(str(path))
    assert head["space"] == "left-posterior-superior"
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = head["space directions"].T, head["space origin"]
    return np.diag([-1, -1, 1, 1]) @ affine, array


def as_simpleitk_reads(path: Path) -> tuple[NDArray[np.float64], NDArray[Any]]:
    image = sitk.ReadImage(path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine, sitk.GetArrayFromImage(image).T


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("a.nrrd", as_pynrrd_reads),
        ("a.nrrd", as_simpleitk_reads),
        ("a.mgz", as_nibabel_reads),
        ("a.mgh", as_nibabel_reads),
    ],
)
@pytest.mark.parametrize("affine", AFFINES)
def test_what_is_written_is_read_alike_by_others(
    tmp_path: Path, affine: NDArray[np.float64], name: str, theirs: Callable[[Path], tuple[Any, Any]]
) -> None:
    path, geometry = tmp_path / name, Geometry(SHAPE, affine)
    for array, labels in (
        (voxels().astype("float32") / 7, False),
        (voxels(), True),
        (voxels(dtype="int32") * 40, True),
        (voxels() > 0, True),
    ):
        write_volume(path, array, geometry, labels=labels)
        place, found = theirs(path)
        np.testing.assert_allclose(place, affine, atol=1e-4)
        np.testing.assert_array_equal(found, array)
        agree(path, affine, array.astype(found.dtype), labels=labels)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mgz"])
@pytest.mark.parametrize("affine", AFFINES[::3])
def test_a_grid_that_was_read_is_written_bit_for_bit(tmp_path: Path, affine: NDArray[np.float64], name: str) -> None:
    write_volume(tmp_path / name, voxels(), Geometry(SHAPE, affine))
    first = read_volume(tmp_path / name)
    write_volume(tmp_path / f"again-{name}", voxels(1), first.geometry)
    np.testing.assert_array_equal(read_grid(tmp_path / f"again-{name}").affine, first.geometry.affine)


def write_minc(
    path: Path,
    affine: NDArray[np.float64],
    array: NDArray[Any],
    limits: tuple[Any, Any] | None = None,
    *,
    change: Callable[[h5py.File], None] | None = None,
    **options: Any,
) -> Path:
    """Write MINC 2 as its tools do: axis names by the world axis that they run along most nearly, steps with signs."""
    names = np.array(["xspace", "yspace", "zspace"])
    world = np.argmax(np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)), axis=0)
    with h5py.File(path, "w") as file:
        image = file.create_dataset("minc-2.0/image/0/image", data=array.T, **options)
        image.attrs["dimorder"] = np.bytes_(",".join(names[world][::-1]))
        if limits is not None:
            for name, values in zip(("image-min", "image-max"), limits):
                file[f"minc-2.0/image/0/{name}"] = values
                slices = names[world][::-1][: np.ndim(values)]
                file[f"minc-2.0/image/0/{name}"].attrs["dimorder"] = np.bytes_(",".join(slices))
        steps = np.linalg.norm(affine[:3, :3], axis=0) * np.sign(affine[world, range(3)])
        directions = affine[:3, :3] / steps
        starts = np.linalg.solve(directions, affine[:3, 3])
        for column in range(3):
            axis = file.create_dataset(f"minc-2.0/dimensions/{names[world[column]]}", data=0)
            axis.attrs.update(step=steps[column], start=starts[column], direction_cosines=directions[:, column])
            axis.attrs["units"], axis.attrs["spacing"] = np.bytes_("mm"), np.bytes_("regular__")
        if change is not None:
            change(file)
    return path


@pytest.mark.parametrize("affine", AFFINES)
def test_minc_is_read_as_nibabel_reads_it(tmp_path: Path, affine: NDArray[np.float64]) -> None:
    limits = np.float64(-300), np.float64(3000)  # which float32 does not need, and nibabel does
    path = write_minc(tmp_path / "a.mnc", affine, voxels(dtype="float32"), limits)
    agree(path, affine, voxels(dtype="float32"))
    other = nibabel.load(path)
    theirs = canonical(Volume(np.asarray(other.get_fdata()), Geometry(other.shape, other.affine)))
    ours = canonical(read_volume(path))
    np.testing.assert_allclose(ours.geometry.affine, theirs.geometry.affine, atol=1e-4)
    np.testing.assert_allclose(ours.array, theirs.array, rtol=1e-6)
    assert read_grid(path).shape == read_volume(path).geometry.shape


def test_minc_scales_each_slice_by_its_own_range(tmp_path: Path) -> None:
    stored = voxels()
    limits = np.linspace(-10, 0, SHAPE[2]), np.linspace(50, 120, SHAPE[2])

    def change(file: h5py.File) -> None:
        file["minc-2.0/image/0/image"].attrs["valid_range"] = (-1000.0, 4000.0)

    path = write_minc(tmp_path / "a.mnc", np.diag([1.0, 2, 3, 1]), stored, limits, change=change, compression="gzip")
    least, most = limits
    right = (stored + 1000.0) / 5000 * (most - least) + least
    np.testing.assert_allclose(read_volume(path).array, right, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(read_volume(path).array, nibabel.load(path).get_fdata().T, rtol=1e-5, atol=1e-4)


def test_labels_of_each_format_stay_whole_numbers(tmp_path: Path) -> None:
    labels = (voxels() % 4).astype(np.uint8)
    affine = np.diag([2.0, 2, 3, 1])
    nibabel.save(nibabel.MGHImage(labels, affine), tmp_path / "a.mgz")
    place = {"space": "RAS", "space directions": affine[:3, :3], "space origin": [0.0] * 3}
    nrrd.write(str(tmp_path / "a.nrrd"), labels, place)
    write_minc(tmp_path / "a.mnc", affine, labels, (np.float64(0), np.float64(255)))
    for name in ("a.mgz", "a.nrrd", "a.mnc"):
        agree(tmp_path / name, read_grid(tmp_path / name).affine, labels, labels=True)
        assert read_volume(tmp_path / name, labels=True).array.dtype == np.uint8


def plain(array: NDArray[Any]) -> bytes:
    return array.tobytes(order="F")


def written(array: NDArray[Any], between: bytes = b" ") -> bytes:
    """Write numbers as text."""
    return between.join(str(value).encode() for value in array.ravel(order="F").tolist())


def first_axis_of_one() -> dict[str, str]:
    directions = "none (1,0,0) (0,1,0) (0,0,1)"
    return {"dimension": "4", "sizes": "1 5 6 7", "space_directions": directions, "space_origin": "(0,0,0)"}


def last_axis_of_one() -> dict[str, str]:
    changes = {"sizes": "5 6 7 1", "space_directions": "(1,0,0) (0,1,0) (0,0,1) none", "space": "RAST"}
    return first_axis_of_one() | changes


def time_of_one() -> dict[str, str]:
    """Vectors of four numbers, as the space of a file with a time has them."""
    directions = "(1,0,0,0) (0,1,0,0) (0,0,1,0) (0,0,0,2.5)"
    changes = {
        "space": "right-anterior-superior-time",
        "space_units": '"mm" "mm" "mm" "s"',
        "space_origin": "(0,0,0,7)",
    }
    return last_axis_of_one() | changes | {"space_directions": directions}


@pytest.mark.parametrize(
    ("changes", "content"),
    [
        (time_of_one(), plain),
        ({"endian": "big"}, lambda raw: plain(raw.astype(">i2"))),
        ({"encoding": "gzip"}, lambda raw: gzip.compress(plain(raw))),
        ({"encoding": "bzip2"}, lambda raw: bz2.compress(plain(raw))),
        ({"encoding": "gz", "byte_skip": "3"}, lambda raw: gzip.compress(b"abc" + plain(raw))),
        ({"byte_skip": "-1"}, lambda raw: b"whatever" + plain(raw)),
        ({"line_skip": "2", "byte_skip": "1"}, lambda raw: b"one\ntwo\n_" + plain(raw)),
        ({"type": "int16_t", "measurement_frame": "(0,1,0) (1,0,0) (0,0,1)"}, plain),
        (first_axis_of_one(), plain),
        (last_axis_of_one(), plain),
        (first_axis_of_one() | {"space_directions": "(nan,nan,nan) (1,0,0) (0,1,0) (0,0,1)"}, plain),
        ({"encoding": "ascii", "endian": None}, written),
        ({"encoding": "text", "line_skip": "1", "byte_skip": "2"}, lambda raw: b"one\nxy" + written(raw, b" , ")),
        ({"encoding": "hex", "endian": "big"}, lambda raw: plain(raw.astype(">i2")).hex(" ", 32).encode() + b"\n"),
        ({"kinds": "space ??? none", "centers": "node cell ???", "centerings": None, "content": "a:b: c"}, plain),
    ],
)
def test_encodings_of_nrrd(tmp_path: Path, changes: dict[str, str], content: Callable[[Any], bytes]) -> None:
    affine = np.eye(4)
    agree(write_nrrd(tmp_path / "a.nrrd", header(affine, **changes), content(voxels())), affine, voxels())


@pytest.mark.parametrize("number", ["float", "double"])
def test_fractions_are_read_from_text_as_pynrrd_reads_them(tmp_path: Path, number: str) -> None:
    array = np.random.default_rng(1).normal(0, 300, (40, 41, 42)).astype("f4" if number == "float" else "f8")
    text = header(np.eye(4), encoding="ascii", type=number, sizes="40 41 42")
    path = write_nrrd(tmp_path / "a.nrrd", text, written(array, b"\n"))
    np.testing.assert_array_equal(read_volume(path).array, nrrd.read(str(path))[0].astype("f4"))


@pytest.mark.parametrize(
    ("changes", "content", "reason"),
    [
        ({"encoding": "ascii"}, b"1 2 3", "truncated"),
        ({"encoding": "ascii"}, written(voxels()) + b" 7", "too-long"),
        ({"encoding": "ascii"}, b"1_0 " + written(voxels()), "corrupted"),
        ({"encoding": "ascii"}, b"0.5 " + written(voxels()), "corrupted"),
        ({"encoding": "ascii", "type": "uchar"}, written(voxels()), "corrupted"),
        ({"encoding": "ascii"}, b"0" * 2**20, "corrupted"),
        ({"encoding": "ascii", "sizes": "1000 1000 1000"}, written(voxels()), "truncated"),
        ({"encoding": "ascii", "type": "float"}, b"nan " + written(voxels()[:, :, 1:]) + b" 1" * 29, "not-finite"),
        ({"encoding": "hex"}, plain(voxels()).hex().encode()[:-1], "truncated"),
        ({"encoding": "hex"}, b"0x" + plain(voxels()).hex().encode(), "corrupted"),
        ({"encoding": "hex"}, plain(voxels()).hex().encode() + b"0", "corrupted"),
    ],
)
def test_text_that_is_no_volume_is_refused(
    tmp_path: Path, changes: dict[str, str | None], content: bytes, reason: str
) -> None:
    with pytest.raises(VolumeError) as caught:
        read_volume(write_nrrd(tmp_path / "a.nrrd", header(np.eye(4), **changes), content))
    assert caught.value.reason == reason


def test_keys_of_others_may_hold_colons(tmp_path: Path) -> None:
    text = header(np.eye(4)).removesuffix("\n") + "org.slicer:one:=1\norg.slicer:two:=x: y\nspace:=mars\n\n"
    agree(write_nrrd(tmp_path / "a.nrrd", text, plain(voxels())), np.eye(4), voxels())


def test_detached_voxels_lie_beside_their_header(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(plain(voxels()))
    path = write_nrrd(tmp_path / "a.nhdr", header(np.eye(4), data_file="a.raw"), b"")
    agree(path, np.eye(4), voxels())
    assert volume_files(path) == [path, tmp_path / "a.raw"]


@pytest.mark.parametrize("name", ["../a.raw", "/etc/hosts", "LIST", "a%03d.raw 1 7 1", "a.nhdr", "missing.raw"])
def test_voxels_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.raw").write_bytes(plain(voxels()))
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(VolumeError) as caught:
        read_volume(write_nrrd(folder / "a.nhdr", header(np.eye(4), data_file=name), b""))
    assert caught.value.reason in ("elsewhere", "not-found")


def test_a_space_without_a_name_is_taken_as_ras_only_when_asked(tmp_path: Path) -> None:
    bare = {"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3"}
    raw = plain(voxels())
    for changes in (bare, {"space": None, "space_dimension": "3"}, {"space": "3D-right-handed"}):
        path = write_nrrd(tmp_path / "a.nrrd", header(np.diag([1.0, 2, 3, 1]), **changes), raw)
        with pytest.raises(VolumeError) as caught:
            read_volume(path)
        assert caught.value.reason == "no-orientation" and "--assume-ras" in str(caught.value.hint)
        agree(path, np.diag([1.0, 2, 3, 1]), voxels(), reading=Reading(assume_ras=True))


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"centerings": "node node node"}, [-50.0, 10, 20]),
        ({"centers": "cell node ???"}, [-49.5, 10, 21.5]),
        ({"units": '"cm" "mm" "mm"', "spacings": "0.1 2 3"}, [-499.5, 11, 21.5]),
        ({"axis_mins": "nan nan 20", "space": "LPS"}, [0.0, 0, 21.5]),
    ],
)
def test_spacings_alone_begin_where_axis_mins_say(tmp_path: Path, changes: dict[str, str], start: list[float]) -> None:
    bare = {"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3"}
    text = header(np.eye(4), **(bare | {"axis_mins": "-50 10 20"} | changes))
    path = write_nrrd(tmp_path / "a.nrrd", text, plain(voxels()))
    affine = np.diag([1.0, 2, 3, 1])
    affine[:3, 3] = start
    agree(path, affine, voxels(), reading=Reading(assume_ras=True))
    if set(changes) <= {"centerings"}:  # else it refuses the file, or forgets the unit
        assert sitk.ReadImage(path).GetOrigin() == tuple(start)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dimension": "4", "sizes": "2 5 6 7", "space_directions": "none (1,0,0) (0,1,0) (0,0,1)"}, "four-d"),
        ({"dimension": "3", "space_directions": "none (1,0,0) (0,1,0)"}, "four-d"),
        ({"kinds": "space space time"}, "four-d"),
        ({"kinds": "RGB-color domain domain", "space_directions": "none (1,0,0) (0,1,0)"}, "four-d"),
        ({"kinds": "domain domain"}, "header"),
        ({"centerings": "cell"}, "header"),
        ({"encoding": "hologram"}, "header"),
        ({"endian": None}, "header"),
        ({"type": "block"}, "datatype"),
        ({"old_min": "0"}, "slope"),
        ({"sizes": "5 6"}, "header"),
        ({"sizes": "5 6 -7"}, "dimensions"),
        ({"sizes": "50000 60000 70000"}, "too-large"),
        ({"sizes": "5 6 8"}, "truncated"),
        ({"sizes": "5 6 6"}, "too-long"),
        ({"space": "mars"}, "header"),
        ({"space_directions": "(1,0,0) (0,1,0) (0,0,0)"}, "spacing"),
        ({"space_directions": "(1,0,0) (0,1,0) (1,1,0)"}, "singular"),
        ({"space_directions": "(1,0,0) (0.1,1,0) (0,0,1)"}, "skew"),
        ({"space_directions": "(nan,0,0) (0,1,0) (0,0,1)"}, "header"),
        ({"space_origin": "(0,0)"}, "header"),
        ({"space_units": '"furlong" "furlong" "furlong"'}, "header"),
        ({"spacings": "1 1 1"}, "header"),
        (time_of_one() | {"sizes": "5 6 1 7"}, "four-d"),
        (time_of_one() | {"space_directions": "(1,0,0,1) (0,1,0,0) (0,0,1,0) (0,0,0,1)"}, "header"),
    ],
)
def test_what_nrrd_must_not_say(tmp_path: Path, changes: dict[str, str | None], reason: str) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", header(np.eye(4), **changes), plain(voxels()))
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.reason == reason


def test_damaged_packed_nrrd_is_refused(tmp_path: Path) -> None:
    for name, pack in (("gzip", gzip.compress), ("bzip2", bz2.compress)):
        packed = bytearray(pack(plain(voxels())))
        cut = write_nrrd(tmp_path / "cut.nrrd", header(np.eye(4), encoding=name), bytes(packed[:-20]))
        packed[len(packed) // 2] ^= 255
        flipped = write_nrrd(tmp_path / "flipped.nrrd", header(np.eye(4), encoding=name), bytes(packed))
        more = pack(plain(voxels())) + b"more"
        longer = write_nrrd(tmp_path / "longer.nrrd", header(np.eye(4), encoding=name), more)
        for path in (cut, flipped, longer):
            with pytest.raises(VolumeError) as caught:
                read_volume(path)
            assert caught.value.reason in ("corrupted", "truncated", "too-long")


@pytest.mark.parametrize(
    ("place", "form", "value", "reason"),
    [
        (16, ">i", 2, "four-d"),
        (20, ">i", 7, "datatype"),
        (30, ">f", 0.0, "spacing"),
        (30, ">f", float("nan"), "affine"),
        (4, ">i", 4, "too-long"),
        (4, ">i", 20000, "truncated"),
    ],
)
def test_what_mgh_must_not_say(tmp_path: Path, place: int, form: str, value: float, reason: str) -> None:
    nibabel.save(nibabel.MGHImage(np.repeat(voxels(), 60, axis=0).repeat(60, axis=1), np.eye(4)), tmp_path / "a.mgh")
    content = bytearray((tmp_path / "a.mgh").read_bytes())
    if reason == "too-long":
        content += bytes(2**21)
    struct.pack_into(form, content, place, value)
    (tmp_path / "a.mgh").write_bytes(content)
    with pytest.raises(VolumeError) as caught:
        read_volume(tmp_path / "a.mgh")
    assert caught.value.reason == reason


def test_mgh_without_orientation_is_refused_since_readers_disagree_on_it(tmp_path: Path) -> None:
    nibabel.save(nibabel.MGHImage(voxels(), np.eye(4)), tmp_path / "a.mgh")
    content = bytearray((tmp_path / "a.mgh").read_bytes())
    struct.pack_into(">h", content, 28, 0)
    (tmp_path / "a.mgh").write_bytes(content)
    with pytest.raises(VolumeError) as caught:
        read_volume(tmp_path / "a.mgh")
    assert caught.value.reason == "no-orientation"


def _external(file: h5py.File) -> None:
    del file["minc-2.0/image/0/image"]
    file["minc-2.0/image/0/image"] = h5py.ExternalLink("other.h5", "/image")


def _soft(file: h5py.File) -> None:
    del file["minc-2.0/dimensions/xspace"]
    file["minc-2.0/dimensions/xspace"] = h5py.SoftLink("/minc-2.0/dimensions/yspace")


def _irregular(file: h5py.File) -> None:
    file["minc-2.0/dimensions/zspace"].attrs["spacing"] = np.bytes_("irregular")


def _same(file: h5py.File) -> None:
    file["minc-2.0/dimensions/zspace"].attrs["direction_cosines"] = (1.0, 0.0, 0.0)


def _long(file: h5py.File) -> None:
    file["minc-2.0/image/0/image"].attrs["dimorder"] = np.bytes_("zspace," * 5000)


def _still(file: h5py.File) -> None:
    file["minc-2.0/dimensions/zspace"].attrs["step"] = 0.0


def _time(file: h5py.File) -> None:
    file["minc-2.0/image/0/image"].attrs["dimorder"] = np.bytes_("time,yspace,xspace")


def _other(file: h5py.File) -> None:
    del file["minc-2.0"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_external, "elsewhere"),
        (_soft, "elsewhere"),
        (_irregular, "spacing"),
        (_same, "affine"),
        (_still, "spacing"),
        (_long, "header"),
        (_time, "four-d"),
        (_other, "format"),
    ],
)
def test_what_minc_must_not_say(tmp_path: Path, change: Callable[[h5py.File], None], reason: str) -> None:
    path = write_minc(tmp_path / "a.mnc", np.eye(4), voxels(), change=change)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.reason == reason


def test_minc_is_refused_by_size_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.mnc"

    def change(file: h5py.File) -> None:
        del file["minc-2.0/image/0/image"]
        image = file.create_dataset("minc-2.0/image/0/image", (40_000,) * 3, "f8", chunks=(64,) * 3, compression="gzip")
        image.attrs["dimorder"] = np.bytes_("zspace,yspace,xspace")

    write_minc(path, np.eye(4), voxels(), change=change)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.reason == "too-large"


@pytest.mark.parametrize("chunks", [(100, 100, 100), (2, 2, 2)])
def test_a_minc_whose_voxels_were_never_written_is_refused(tmp_path: Path, chunks: tuple[int, int, int]) -> None:
    def change(file: h5py.File) -> None:
        del file["minc-2.0/image/0/image"]
        image = file.create_dataset("minc-2.0/image/0/image", (100, 100, 200), "u1", chunks=chunks, compression="gzip")
        image.attrs["dimorder"] = np.bytes_("zspace,yspace,xspace")
        image[:, :, :150] = np.arange(150, dtype="u1")

    path = write_minc(tmp_path / "a.mnc", np.eye(4), voxels(), change=change)
    if chunks == (100, 100, 100):
        assert read_volume(path).array.shape == (200, 100, 100)
    else:
        with pytest.raises(VolumeError) as caught:
            read_volume(path)
        assert caught.value.reason == "truncated"


def test_a_minc_that_is_packed_twice_is_refused(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["minc-2.0/image/0/image"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((100, 100, 100))
        settings.set_deflate(9)
        settings.set_deflate(9)
        space = h5py.h5s.create_simple((100, 100, 100))
        made = h5py.h5d.create(file.id, b"minc-2.0/image/0/image", h5py.h5t.NATIVE_UINT8, space, settings)
        image = h5py.Dataset(made)
        image.attrs["dimorder"] = np.bytes_("zspace,yspace,xspace")
        image[...] = np.zeros((100, 100, 100), "u1")

    path = write_minc(tmp_path / "a.mnc", np.eye(4), voxels(), change=change)
    assert path.stat().st_size < 20_000
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.reason == "format" and "twice" in str(caught.value)


def test_the_meaning_of_minc_takes_no_more_memory_than_float32(tmp_path: Path) -> None:
    shape = (90, 300, 300)
    stored = np.random.default_rng(0).integers(0, 200, shape[::-1]).astype("u1")
    path = write_minc(tmp_path / "a.mnc", np.eye(4), stored, (np.float64(0), np.float64(10)))
    tracemalloc.start()
    array = read_volume(path).array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(array[::50], stored[::50] / 255 * 10, rtol=1e-6)
    assert peak < 7.5 * stored.size + 60 * 2**20  # stored, float32, and blocks that are worked out


@pytest.mark.parametrize(("number", "least", "most"), [("i2", -(2**15), 2**15 - 1), ("u1", 0, 255)])
def test_labels_that_a_range_rounds_are_whole_again_and_images_keep_their_steps(
    tmp_path: Path, number: str, least: int, most: int
) -> None:
    labels = (voxels() % 10).astype("u1")
    stored = np.rint(labels / 9 * (most - least) + least).astype(number)
    path = write_minc(tmp_path / "a.mnc", np.eye(4), stored, (np.float64(0), np.float64(9)))
    agree(path, np.eye(4), labels, labels=True)
    meant = (stored.astype(float) - least) / (most - least) * 9
    np.testing.assert_array_equal(read_volume(path).array, meant.astype("f4"))


def test_a_gzipped_minc_is_to_be_unpacked(tmp_path: Path) -> None:
    plain_file = write_minc(tmp_path / "a.mnc", np.eye(4), voxels())
    (tmp_path / "b.mnc").write_bytes(gzip.compress(plain_file.read_bytes()))
    with pytest.raises(VolumeError) as caught:
        read_volume(tmp_path / "b.mnc")
    assert caught.value.reason == "format" and "gunzip" in str(caught.value.hint)


@pytest.mark.parametrize("value", [1e9, -3e8])
def test_differences_that_float32_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    array = value + voxels() % 7
    path = write_minc(tmp_path / "a.mnc", np.eye(4), array)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.reason == "precision"


def test_a_truncated_minc_is_refused(tmp_path: Path) -> None:
    path = write_minc(tmp_path / "a.mnc", np.eye(4), voxels(), compression="gzip")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.reason in ("corrupted", "truncated")


@pytest.mark.parametrize(
    ("given", "container", "written"),
    [
        (".nhdr", "volume", ".nrrd"),
        (".mgh", "volume", ".mgz"),
        (".nii.gz", "nrrd", ".nrrd"),
        (".nrrd", "nifti", ".nii.gz"),
    ],
)
def test_a_case_is_predicted_and_scored_in_any_format(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, given: str, container: Any, written: str
) -> None:
    case = find_cohort(toy_cohort).cases[0]
    cohort = tmp_path / "cohort" / case.id
    cohort.mkdir(parents=True)
    for name in ("t1", "t2"):
        volume = read_volume(case.images[name])
        path = cohort / f"{case.id}_{name}{given}"
        if given == ".nhdr":
            turned = np.diag([-1.0, -1, 1, 1]) @ volume.geometry.affine
            place = {"space": "LPS", "space directions": turned[:3, :3].T, "space origin": turned[:3, 3]}
            nrrd.write(str(path), volume.array, place)
        else:
            write_volume(path, volume.array, volume.geometry)
    made = predict(finished_run, [cohort.parent], tmp_path / "made", container=container)
    plain = predict(finished_run, [case], tmp_path / "plain")
    assert not made.problems and made.manifest.cases[0].image == f"{case.id}_t2{written}"
    found, right = (
        canonical(read_volume(tmp_path / folder / one.manifest.cases[0].image))
        for folder, one in (("made", made), ("plain", plain))
    )
    np.testing.assert_allclose(found.geometry.affine, right.geometry.affine, atol=1e-4)
    np.testing.assert_allclose(found.array, right.array, atol=1e-4 * float(np.ptp(right.array)))
    assert not evaluate(tmp_path / "made", cohort.parent, tmp_path / "scored").problems


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("a.nii", [sitk.ReadImage, nibabel.load]),
        ("a.nii.gz", [sitk.ReadImage, nibabel.load]),
        ("a.mha", [sitk.ReadImage]),
        ("a.nrrd", [sitk.ReadImage, nrrd.read]),
        ("a.mgz", [nibabel.load]),
    ],
)
def test_a_remark_lies_in_the_header_and_disturbs_nobody(
    tmp_path: Path, name: str, others: list[Callable[[str], Any]]
) -> None:
    plain, marked = tmp_path / f"plain-{name}", tmp_path / name
    array, geometry = voxels().astype("float32"), Geometry(SHAPE, AFFINES[11])
    write_volume(plain, array, geometry)
    write_volume(marked, array, geometry, remark=SYNTHETIC + "}")
    assert says_synthetic(marked) and not says_synthetic(plain)
    agree(marked, AFFINES[11], array)
    for read in others:
        found = [read(str(path)) for path in (plain, marked)]
        first, second = (
            sitk.GetArrayFromImage(one) if read is sitk.ReadImage else one[0] if read is nrrd.read else one.get_fdata()
            for one in found
        )
        np.testing.assert_array_equal(first, second)
    if name.startswith("a.nii"):
        image: Any = nibabel.load(marked)
        (extension,) = image.header.extensions
        assert extension.get_code() == 6 and json.loads(extension.text) == {"SyntheticData": "YES"}


def test_a_prediction_says_of_itself_that_it_was_made(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    case = find_cohort(toy_cohort).cases[0]
    made = predict(finished_run, [case], tmp_path / "made")
    (entry,) = made.manifest.cases
    assert entry.mask is not None and entry.expected_error is not None
    assert is_synthetic(made.folder / entry.image) and is_synthetic(made.folder / entry.expected_error)
    assert not is_synthetic(made.folder / entry.mask) and not is_synthetic(case.images["t1"])
    copied = tmp_path / "cohort" / case.id
    copied.mkdir(parents=True)
    shutil.copy(case.images["t1"], copied / f"{case.id}_t1.nii.gz")
    shutil.copy(made.folder / entry.image, copied / f"{case.id}_t2.nii.gz")
    assert [problem.reason for problem in find_cohort(copied.parent).problems] == ["synthetic"]
