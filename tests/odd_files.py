"""Odd and broken volumes, made byte by byte, so that every reader meets the same ones.

`CORPUS` holds a file for each way in which each rule of reading can be broken
or stretched, with the verdict: read, with these voxels on this grid, or
refused, with this reason.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.volumes import Reading

SHAPE = (5, 6, 7)
AFFINE = np.array([[2.0, 0, 0, -10], [0, 1.5, 0, 20], [0, 0, 3.0, -5], [0, 0, 0, 1]])
CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}
NAN, INF = float("nan"), float("inf")


def voxels(kind: str = "i2") -> NDArray[Any]:
    return np.random.default_rng(0).integers(1, 100, SHAPE).astype(kind)


def nifti(
    array: NDArray[Any] | None = None, *, order: str = "<", version: int = 1, changes: Mapping[str, Any] | None = None
) -> bytes:
    """A single-file NIfTI; `changes` set header fields by name, "extension" and "tail" are raw bytes."""
    array = voxels() if array is None else array
    changes = dict(changes or {})
    extension = changes.pop("extension", b"\0\0\0\0")
    tail = changes.pop("tail", b"")
    dims = [array.ndim, *array.shape] + [1] * (7 - array.ndim)
    fields: dict[str, Any] = {
        "dim": dims,
        "datatype": CODES[array.dtype.str[1:]],
        "bitpix": array.dtype.itemsize * 8,
        "pixdim": [1.0, 2.0, 1.5, 3.0, 0, 0, 0, 0],
        "vox_offset": (348 if version == 1 else 540) + len(extension),
        "scl_slope": 0.0,
        "scl_inter": 0.0,
        "xyzt_units": 2,
        "qform_code": 1,
        "sform_code": 1,
        "quatern": [0.0, 0.0, 0.0],
        "qoffset": [-10.0, 20.0, -5.0],
        "srow": AFFINE[:3].ravel().tolist(),
        "magic": b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n",
    } | changes
    places = {
        1: {
            "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
            "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
            "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"),
            "srow": (280, "12f"), "magic": (344, "4s"),
        },
        2: {
            "dim": (16, "8q"), "datatype": (12, "h"), "bitpix": (14, "h"), "pixdim": (104, "8d"),
            "vox_offset": (168, "q"), "scl_slope": (176, "d"), "scl_inter": (184, "d"), "xyzt_units": (500, "i"),
            "qform_code": (344, "i"), "sform_code": (348, "i"), "quatern": (352, "3d"), "qoffset": (376, "3d"),
            "srow": (400, "12d"), "magic": (4, "8s"),
        },
    }[version]  # fmt: skip
    size = 348 if version == 1 else 540
    header = bytearray(size)
    struct.pack_into(order + "i", header, 0, changes.get("sizeof_hdr", size))
    fields.pop("sizeof_hdr", None)
    for name, value in fields.items():
        at, form = places[name]
        struct.pack_into(order + form, header, at, *(value if isinstance(value, list) else [value]))
    return bytes(header) + extension + array.astype(array.dtype.newbyteorder(order)).tobytes(order="F") + tail


def put(folder: Path, content: bytes, name: str = "odd.nii", packed: bool = False) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


def metaimage(array: NDArray[Any] | None = None, **changes: str) -> bytes:
    """A .mha with its voxels inside; a field set to "" is left out."""
    array = voxels() if array is None else array
    fields = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "1 2 3",
        "ElementSpacing": "2 1.5 3", "DimSize": "5 6 7", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
    } | changes  # fmt: skip
    fields["ElementDataFile"] = fields.pop("ElementDataFile")  # always the last
    text = "".join(f"{name} = {value}\n" for name, value in fields.items() if value)
    return text.encode() + array.tobytes(order="F")


# ---------------------------------------------------------------- the corpus

Kind = Literal["volume", "pair", "cohort", "predictions"]
#: Where `metaimage` lies: its offset and axes are LPS.
META = np.array([[-2.0, 0, 0, -1], [0, -1.5, 0, -2], [0, 0, 3.0, 3], [0, 0, 0, 1]])


@dataclass(frozen=True)
class Odd:
    """One odd file and what is to become of it.

    Attributes:
        name: Says what is odd, unique.
        rule: Number of the rule in docs/formats.md.
        write: Writes it into an empty folder and returns the path to read.
        reasons: With which it may be refused; empty where it is to be read.
        array: Voxels that a reader must find.
        affine: Voxel to RAS mm.
        options: For `read_volume`.
        labels: Whether it is read as a label map.
        kind: What it is; of a pair, `write` returns the folder of a.nii and b.nii.
        hostile: Whether it is made to cost memory or time.
    """

    name: str
    rule: int
    write: Callable[[Path], Path]
    reasons: tuple[str, ...] = ()
    array: NDArray[Any] | None = None
    affine: NDArray[np.float64] = field(default_factory=lambda: AFFINE)
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = False
    kind: Kind = "volume"
    hostile: bool = False


def _of(
    changes: Mapping[str, Any] | None = None,
    array: NDArray[Any] | None = None,
    name: str = "odd.nii",
    *,
    order: str = "<",
    version: int = 1,
    packed: bool = False,
    change: Callable[[bytes], bytes] = lambda content: content,
) -> Callable[[Path], Path]:
    """Write a NIfTI of which `change` gets the last, packed bytes."""

    def write(folder: Path) -> Path:
        content = nifti(array, order=order, version=version, changes=changes)
        return put(folder, change(gzip.compress(content, mtime=0) if packed else content), name)

    return write


def _raw(content: bytes, name: str = "odd.nii") -> Callable[[Path], Path]:
    return lambda folder: put(folder, content, name)


def _meta(change: Callable[[bytes], bytes] = lambda content: content, array: Any = None, **fields: str) -> Any:
    return lambda folder: put(folder, change(metaimage(array, **fields)), "odd.mha")


def _two(head: bytes, data: bytes, names: tuple[str, str], give: int = 0) -> Callable[[Path], Path]:
    """Write two files and give one of them."""

    def write(folder: Path) -> Path:
        paths = [put(folder, content, name) for content, name in zip((head, data), names) if name]
        return paths[give]

    return write


def _rows(matrix: Any) -> list[float]:
    return np.asarray(matrix, np.float64)[:3].ravel().tolist()  # type: ignore[no-any-return]


def _only_sform(matrix: Any) -> dict[str, Any]:
    return {"qform_code": 0, "srow": _rows(matrix)}


def _skewed(degrees: float) -> NDArray[np.float64]:
    """The second axis leans towards the first; its length stays."""
    matrix, lean = AFFINE.copy(), np.radians(degrees)
    matrix[:2, 1] = 1.5 * np.sin(lean), 1.5 * np.cos(lean)
    return matrix


def _flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x10
    return bytes(changed)


def _headers() -> Iterator[Odd]:
    """Rule 1: the raw header, before any library."""
    whole = [5, 6, 7, 1, 1, 1, 1]
    broken: list[tuple[str, str, dict[str, Any]]] = [
        ("no dimensions", "dimensions", {"dim": [0, *whole]}),
        ("eight dimensions", "dimensions", {"dim": [8, *whole]}),
        ("a negative number of dimensions", "dimensions", {"dim": [-3, *whole]}),
        ("an axis of no voxels", "dimensions", {"dim": [3, 5, 0, 7, 1, 1, 1, 1]}),
        ("a negative axis", "dimensions", {"dim": [3, 5, 6, -7, 1, 1, 1, 1]}),
        ("a fourth axis of none", "dimensions", {"dim": [4, 5, 6, 7, 0, 1, 1, 1]}),
        ("axes that multiply to terabytes", "too-large", {"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]}),
        ("axes of a gigabyte and no voxels", "truncated", {"dim": [3, 1000, 1000, 500, 1, 1, 1, 1]}),
        ("no datatype", "datatype", {"datatype": 0}),
        ("binary voxels", "datatype", {"datatype": 1, "bitpix": 1}),
        ("complex voxels", "datatype", {"datatype": 32, "bitpix": 64}),
        ("complex voxels of 128 bits", "datatype", {"datatype": 1792, "bitpix": 128}),
        ("complex voxels of 256 bits", "datatype", {"datatype": 2048, "bitpix": 256}),
        ("RGB voxels", "datatype", {"datatype": 128, "bitpix": 24}),
        ("RGBA voxels", "datatype", {"datatype": 2304, "bitpix": 32}),
        ("128-bit floats", "datatype", {"datatype": 1536, "bitpix": 128}),
        ("a datatype that nobody knows", "datatype", {"datatype": 77}),
        ("a negative datatype", "datatype", {"datatype": -4}),
        ("twice the bits", "bitpix", {"bitpix": 32}),
        ("half the bits", "bitpix", {"bitpix": 8}),
        ("no bits", "bitpix", {"bitpix": 0}),
        ("voxels inside the header", "vox-offset", {"vox_offset": 100}),
        ("voxels at 0", "vox-offset", {"vox_offset": 0}),
        ("voxels before the file", "vox-offset", {"vox_offset": -352}),
        ("voxels beyond the file", "truncated", {"vox_offset": 100_000}),
        ("voxels a terabyte away", "vox-offset", {"vox_offset": 10**12}),
        ("an extension of no size", "extension", {"extension": b"\1\0\0\0" + bytes(16)}),
        ("an extension of negative size", "extension",
         {"extension": b"\1\0\0\0" + struct.pack("<2i", -16, 4) + bytes(8)}),
        ("an extension beyond the voxels", "extension",
         {"extension": b"\1\0\0\0" + struct.pack("<2i", 1600, 6) + bytes(8)}),
        ("an extension of 17 bytes", "extension", {"extension": b"\1\0\0\0" + struct.pack("<2i", 17, 6) + bytes(24)}),
        ("an extension of 8 bytes", "extension", {"extension": b"\1\0\0\0" + struct.pack("<2i", 8, 6) + bytes(8)}),
        ("a second extension beyond the voxels", "extension",
         {"extension": b"\1\0\0\0" + struct.pack("<2i", 16, 6) + bytes(8) + struct.pack("<2i", 64, 6) + bytes(8)}),
        ("a magic that is none", "magic", {"magic": b"abc\0"}),
        ("the magic of the other version", "magic", {"magic": b"n+3\0"}),
        ("the magic of two files in one", "magic", {}),
    ]  # fmt: skip
    for version in (1, 2):
        for name, reason, changes in broken:
            if name == "the magic of two files in one":
                changes = {"magic": b"ni1\0" if version == 1 else b"ni2\0\r\n\x1a\n", "vox_offset": 0}
            yield Odd(f"NIfTI-{version}: {name}", 1, _of(changes, version=version), (reason,))
        yield Odd(f"NIfTI-{version}: big-endian, RGB", 1,
                  _of({"datatype": 128, "bitpix": 24}, order=">", version=version), ("datatype",))  # fmt: skip
    yield Odd("voxels at no number", 1, _of({"vox_offset": NAN}), ("vox-offset",))
    yield Odd("voxels at infinity", 1, _of({"vox_offset": INF}), ("vox-offset",))
    yield Odd("voxels at half a byte", 1, _of({"vox_offset": 352.5}), ("vox-offset",))
    yield Odd("a NIfTI-2 whose line ends were changed", 1, _of({"magic": b"n+2\0\n\n\x1a\n"}, version=2), ("magic",))
    yield Odd("ANALYZE 7.5", 1, _two(nifti(changes={"magic": bytes(4), "vox_offset": 0})[:348],
                                    voxels().tobytes(order="F"), ("odd.hdr", "odd.img")), ("magic",))  # fmt: skip
    for size in (0, 347, 349, -1, 2**31 - 1):
        yield Odd(f"a header of {size} bytes", 1, _of({"sizeof_hdr": size}), ("format", "magic"))
    yield Odd("byte orders mixed", 1, _raw(nifti(order=">")[:4] + nifti()[4:]), ("dimensions", "magic", "datatype"))
    yield Odd("an axis as short as one voxel's bytes", 1, _of({"dim": [3, 5, 6, 8, 1, 1, 1, 1]}), ("truncated",))
    array = np.random.default_rng(1).integers(0, 9, (5, 6, 4)).astype("i2")
    yield Odd("an offset that is no multiple of 16", 1, _of({"vox_offset": 357, "extension": bytes(9)}), array=voxels())
    comment = b"\1\0\0\0" + struct.pack("<2i", 32, 6) + bytes(24)
    yield Odd("an extension", 1, _of({"extension": comment}), array=voxels())
    yield Odd("two extensions", 1, _of({"extension": comment + comment[4:]}), array=voxels())
    yield Odd("two extensions, NIfTI-2, big-endian", 1,
              _of({"extension": b"\1\0\0\0" + 2 * (struct.pack(">2i", 16, 6) + bytes(8))}, version=2, order=">"),
              array=voxels())  # fmt: skip
    yield Odd("a gap without extensions", 1, _of({"extension": bytes(4 + 160)}), array=voxels())
    yield Odd("axes beyond the third of nonsense", 1, _of({"dim": [3, 5, 6, 4, 0, -3, 9, 77]}, array), array=array)
    yield Odd("seven dimensions, four of them 1", 1, _of({"dim": [7, 5, 6, 7, 1, 1, 1, 1]}), array=voxels())


def _streams() -> Iterator[Odd]:
    """Rule 2: bytes to the end, checked."""
    head, data = nifti(changes={"magic": b"ni1\0", "vox_offset": 0})[:348], voxels().tobytes(order="F")
    zipped = gzip.compress(nifti(), mtime=0)
    for keep in (0, 3, 100, 347, 348, 351, 352, 500, len(nifti()) - 1):
        yield Odd(f"only {keep} bytes", 2, _raw(nifti()[:keep]), ("format", "header", "truncated"))
    for keep in (2, 10, len(zipped) // 2, len(zipped) - 8, len(zipped) - 4, len(zipped) - 1):
        yield Odd(f"only {keep} bytes of a gzip", 2, _raw(zipped[:keep], "odd.nii.gz"), ("truncated", "corrupted"))
    yield Odd("a gzip with a wrong checksum", 2, _raw(_flipped(zipped, -6), "odd.nii.gz"), ("corrupted",))
    yield Odd("a gzip with a wrong length", 2, _raw(_flipped(zipped, -2), "odd.nii.gz"), ("corrupted",))
    yield Odd("a gzip with a wrong bit", 2, _raw(_flipped(zipped, len(zipped) // 2), "odd.nii.gz"), ("corrupted",))
    yield Odd("a gzip with a wrong method", 2, _raw(_flipped(zipped, 2), "odd.nii.gz"), ("corrupted",))
    yield Odd("a gzip with words behind it", 2, _raw(zipped + b"and words", "odd.nii.gz"), ("corrupted",))
    yield Odd("a gzip's second part with a wrong checksum", 2,
              _raw(gzip.compress(nifti()[:400]) + _flipped(gzip.compress(nifti()[400:]), -6), "odd.nii.gz"),
              ("corrupted",))  # fmt: skip
    yield Odd("a gzip's second part missing", 2, _raw(gzip.compress(nifti()[:400]), "odd.nii.gz"), ("truncated",))
    yield Odd("a gzip of a gzip", 2, _raw(gzip.compress(zipped), "odd.nii.gz"), ("format",))
    yield Odd("an empty gzip", 2, _raw(gzip.compress(b""), "odd.nii.gz"), ("format",))
    yield Odd("two megabytes behind the voxels", 2, _of({"tail": bytes(2**21)}), ("too-long",))
    yield Odd("two megabytes behind the voxels, gzipped", 2, _of({"tail": bytes(2**21)}, name="odd.nii.gz",
    packed=True),
              ("too-long",))  # fmt: skip
    yield Odd("a gzip of two parts", 2, _raw(gzip.compress(nifti()[:400]) + gzip.compress(nifti()[400:]), "odd.nii.gz"),
              array=voxels())  # fmt: skip
    yield Odd("a gzip that begins with an empty part", 2, _raw(gzip.compress(b"") + zipped, "odd.nii.gz"),
              array=voxels())  # fmt: skip
    yield Odd("a gzip filled up with zeros", 2, _raw(zipped + bytes(512), "odd.nii.gz"), array=voxels())
    name = struct.pack("<H", 60_000) + bytes(60_000)
    yield Odd("a gzip with a long preface", 2, _raw(zipped[:3] + b"\4" + zipped[4:10] + name + zipped[10:],
    "odd.nii.gz"),
              array=voxels())  # fmt: skip
    yield Odd("plain, called .nii.gz", 2, _of(name="odd.nii.gz"), array=voxels())
    yield Odd("gzipped, called .nii", 2, _of(packed=True), array=voxels())
    yield Odd("gzipped, without a suffix", 2, _of(name="odd", packed=True), array=voxels())
    yield Odd("NIfTI, called .mha", 2, _of(name="odd.mha"), array=voxels())
    yield Odd("words behind the voxels", 2, _of({"tail": b"some words"}), array=voxels())
    yield Odd("a pair, by its header", 2, _two(head, data, ("odd.hdr", "odd.img")), array=voxels())
    yield Odd("a pair, by its image", 2, _two(head, data, ("odd.hdr", "odd.img"), 1), array=voxels())
    yield Odd("a pair in capitals", 2, _two(head, data, ("ODD.HDR", "ODD.IMG")), array=voxels())
    yield Odd("a gzipped pair", 2, _two(gzip.compress(head), gzip.compress(data), ("odd.hdr.gz", "odd.img.gz")),
              array=voxels())  # fmt: skip
    yield Odd("a pair, its image gzipped", 2, _two(head, gzip.compress(data), ("odd.hdr", "odd.img.gz")),
              array=voxels())  # fmt: skip
    yield Odd("a pair without its image", 2, _two(head, data, ("odd.hdr", "")), ("not-found",))
    yield Odd("a pair without its header", 2, _two(data, b"", ("odd.img", "")), ("not-found",))
    yield Odd("a pair whose image is truncated", 2, _two(head, data[:-1], ("odd.hdr", "odd.img")), ("truncated",))
    yield Odd("a pair with a bad extension", 2, _two(head + b"\1\0\0\0" + struct.pack("<2i", 3, 6), data,
                                                     ("odd.hdr", "odd.img")), ("extension",))  # fmt: skip
    yield Odd("a pair whose header is truncated", 2, _two(head[:200], data, ("odd.hdr", "odd.img")), ("header",))
    yield from _places()
    yield from _bombs()


def _places() -> Iterator[Odd]:
    """Rule 2: what is no file, or another's."""

    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / "odd.nii")
        return folder / "odd.nii"

    def linked(target: str) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            put(folder, nifti(), "real.nii")
            (folder / "odd.nii").symlink_to(target)
            return folder / "odd.nii"

        return write

    def folder_called(name: str) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / name).mkdir()
            return folder / name

        return write

    yield Odd("a pipe", 2, pipe, ("special",))
    yield Odd("a device", 2, lambda _: Path("/dev/zero"), ("special",))
    yield Odd("a link that leads nowhere", 2, linked("nowhere.nii"), ("not-found",))
    yield Odd("a link to itself", 2, linked("odd.nii"), ("unreadable",))
    yield Odd("a link to a file", 2, linked("real.nii"), array=voxels())
    yield Odd("a folder", 2, folder_called("odd"), ("no-dicom",))
    yield Odd("a folder called .nii", 2, folder_called("odd.nii"), ("no-dicom",))
    yield Odd("no file", 2, lambda folder: folder / "odd.nii", ("not-found",))
    yield Odd("a name with NUL", 2, lambda folder: folder / "a\0b.nii", ("name",))
    yield Odd("a name too long", 2, lambda folder: folder / ("a" * 300 + ".nii"), ("unreadable",))
    yield Odd("a name that is no text", 2, lambda folder: put(folder, nifti(), "\udcff.nii"), array=voxels())
    for name, content in {
        "text": b"patient,t1,t2\n" * 40, "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(400),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
        "MINC 1": b"CDF\1" + bytes(600), "NRRD": b"NRRD0004\ntype: short\n", "a numpy array": b"\x93NUMPY" + bytes(400),
        "a pickle": b"\x80\x04K\x01.", "zeros": bytes(4000), "a zip": b"PK\3\4" + bytes(400),
    }.items():  # fmt: skip
        # an archive may hold DICOM, HDF5 and NRRD a volume, whatever their names
        reason = {"a zip": "corrupted", "HDF5": "corrupted", "NRRD": "header"}.get(name, "format")
        yield Odd(f"{name}, called .nii", 2, _raw(content), (reason,))


def _bombs() -> Iterator[Odd]:
    """Rule 2: what a few bytes on disk would cost."""
    mebibytes = gzip.compress(bytes(2**24), 9, mtime=0)  # 16 of them: a gzip may have many parts

    def bomb(changes: Mapping[str, Any], parts: int, array: NDArray[Any] | None = None) -> Callable[[Path], Path]:
        return lambda folder: put(
            folder, gzip.compress(nifti(array, changes=changes)) + mebibytes * parts, "odd.nii.gz"
        )

    little = np.zeros((0, 0, 0), np.int16)

    def sparse(folder: Path) -> Path:
        with put(folder, nifti(little, changes={"dim": [3, 1000, 1000, 400, 1, 1, 1, 1]})).open("r+b") as file:
            file.truncate(10**9)
        return folder / "odd.nii"

    yield Odd("a gzip bomb behind a small volume", 2, bomb({}, 64), ("too-long",), hostile=True)
    yield Odd("a gzip bomb that keeps its promise", 2,
              bomb({"dim": [3, 1024, 1024, 512, 1, 1, 1, 1]}, 64, little), ("constant",), hostile=True)  # fmt: skip
    yield Odd("a gzip bomb that stops just short", 2,
              bomb({"dim": [3, 1024, 1024, 520, 1, 1, 1, 1]}, 64, little), ("truncated",), hostile=True)  # fmt: skip
    yield Odd("a gzip bomb before the voxels", 2, bomb({"vox_offset": 2**30}, 64), ("vox-offset",), hostile=True)
    yield Odd("a gzip too small for what it promises", 2,
              bomb({"dim": [3, 1024, 1024, 1000, 1, 1, 1, 1]}, 1, little), ("truncated",), hostile=True)  # fmt: skip
    yield Odd("a gzip of a hundred thousand empty parts", 2, _raw(gzip.compress(b"", mtime=0) * 100_000, "odd.nii.gz"),
              ("corrupted",), hostile=True)  # fmt: skip
    yield Odd("a file of a gigabyte that is all hole", 2, sparse, ("too-long",), hostile=True)
    yield Odd("a MetaImage that is a zlib bomb", 8,
              lambda folder: put(folder, metaimage(little, DimSize="1024 1024 512", CompressedData="True")
                                 + zlib.compress(bytes(2**28), 9), "odd.mha"),
                                 ("truncated",), hostile=True)  # fmt: skip
    yield Odd("a MetaImage that is a zlib bomb and keeps its promise", 8,
              lambda folder: put(folder, metaimage(little, DimSize="1024 1024 128", CompressedData="True")
                                 + zlib.compress(bytes(2**28), 9), "odd.mha"), ("constant",), hostile=True)  # fmt: skip
    yield Odd("a MetaImage that unpacks to more", 8,
              lambda folder: put(folder, metaimage(little, CompressedData="True") + zlib.compress(bytes(2**28), 9),
                                 "odd.mha"), ("too-long",), hostile=True)  # fmt: skip


def _affines() -> Iterator[Odd]:
    """Rule 3: where the voxels lie."""
    half = np.sqrt(0.5)
    turned = AFFINE @ np.diag([-1.0, -1, 1, 1])
    quarter = np.array([[0, -1.5, 0, -10], [2.0, 0, 0, 20], [0, 0, 3, -5], [0, 0, 0, 1]])
    mirrored = AFFINE @ np.diag([1.0, 1, -1, 1])
    only_q = {"sform_code": 0}
    broken: list[tuple[str, str | tuple[str, ...], dict[str, Any]]] = [
        ("an sform of no numbers", "affine", {"qform_code": 0, "srow": [NAN] * 12}),
        ("an sform of no numbers beside a sound qform", "affine", {"srow": [NAN] * 12}),
        ("an sform with one infinity", "affine", {"qform_code": 0, "srow": [INF, *_rows(AFFINE)[1:]]}),
        ("an sform of 1e30", "affine", {"qform_code": 0, "srow": [1e30, *_rows(AFFINE)[1:]]}),
        ("an sform of zeros", ("spacing", "singular"), {"qform_code": 0, "srow": [0.0] * 12}),
        ("an sform with two equal axes", ("singular", "skew"),
         {"qform_code": 0, "srow": [2.0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]}),
        ("an sform with three axes in one plane", ("singular", "skew"),
         {"qform_code": 0, "srow": [2.0, 0, 2, 0, 0, 2, 2, 0, 0, 0, 0, 0]}),
        ("an axis of zero length", ("spacing", "singular"),
         {"qform_code": 0, "srow": [2.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]}),
        ("a spacing of a micron", "spacing", _only_sform(AFFINE * [[1e-3], [1], [1], [1]])),
        ("a spacing of 9 microns", "spacing", _only_sform(np.diag([0.009, 1, 1, 1]))),
        ("a spacing of 51 mm", "spacing", _only_sform(np.diag([51.0, 1, 1, 1]))),
        ("a spacing of 10 m", "spacing", _only_sform(np.diag([1e4, 1, 1, 1]))),
        ("an origin 2 km away", "affine", {"qform_code": 0, "srow": [2.0, 0, 0, 2e6, 0, 1.5, 0, 0, 0, 0, 3, 0]}),
        ("a skew of 0.2 degrees", "skew", _only_sform(_skewed(0.2))),
        ("a skew of 0.11 degrees", "skew", _only_sform(_skewed(0.11))),
        ("a skew of 30 degrees", "skew", _only_sform(_skewed(30))),
        ("two forms 0.1 mm apart", "two-forms", {"qoffset": [-10.0, 20.0, -4.9]}),
        ("two forms 0.02 mm apart", "two-forms", {"qoffset": [-10.0, 20.0, -4.98]}),
        ("two forms, one rotated", "two-forms", {"quatern": [0.0, 0.0, 1.0]}),
        ("two forms, one mirrored", "two-forms", {"pixdim": [-1.0, 2, 1.5, 3, 0, 0, 0, 0]}),
        ("two forms of two spacings", "two-forms", {"pixdim": [1.0, 2, 1.5, 3.01, 0, 0, 0, 0]}),
        ("two forms a degree apart", "two-forms", {"quatern": [0.0, 0.0, float(np.sin(np.radians(0.5)))]}),
        ("no form", "no-orientation", {"qform_code": 0, "sform_code": 0}),
        ("two negative codes", "no-orientation", {"qform_code": -1, "sform_code": -1}),
        ("a quaternion longer than 1", "quaternion", only_q | {"quatern": [0.9, 0.9, 0.9]}),
        ("a quaternion slightly longer than 1", "quaternion", only_q | {"quatern": [1.01, 0.0, 0.0]}),
        ("a quaternion of no numbers", "affine", only_q | {"quatern": [NAN, 0.0, 0.0]}),
        ("an infinite qoffset", "affine", only_q | {"qoffset": [INF, 0.0, 0.0]}),
        ("a qfac of no number", "affine", only_q | {"pixdim": [NAN, 2, 1.5, 3, 0, 0, 0, 0]}),
        ("a pixdim of zero", "spacing", only_q | {"pixdim": [1.0, 2, 0, 3, 0, 0, 0, 0]}),
        ("a negative pixdim", "spacing", only_q | {"pixdim": [1.0, 2, -1.5, 3, 0, 0, 0, 0]}),
        ("a pixdim of no number", "affine", only_q | {"pixdim": [1.0, 2, NAN, 3, 0, 0, 0, 0]}),
        ("a pixdim of infinity", "affine", only_q | {"pixdim": [1.0, 2, INF, 3, 0, 0, 0, 0]}),
        ("millimetres called metres", "spacing", {"xyzt_units": 1}),
        ("millimetres called microns", "spacing", {"xyzt_units": 3}),
    ]  # fmt: skip
    for name, reason, changes in broken:
        yield Odd(name, 3, _of(changes), (reason,) if isinstance(reason, str) else reason)
        if name in ("an sform of no numbers", "no form", "two forms 0.1 mm apart", "a skew of 0.2 degrees"):
            yield Odd(f"{name}, NIfTI-2, big-endian", 3, _of(changes, version=2, order=">"), (str(reason),))
    read: list[tuple[str, NDArray[np.float64], dict[str, Any]]] = [
        ("only an sform", AFFINE, {"qform_code": 0}),
        ("only an sform, the qform of no numbers", AFFINE, {"qform_code": 0, "quatern": [NAN] * 3}),
        ("only an sform, pixdim of other numbers", AFFINE, {"qform_code": 0, "pixdim": [0.0, 9, -9, NAN, 0, 0, 0, 0]}),
        ("only a qform", AFFINE, only_q),
        ("only a qform, the sform of no numbers", AFFINE, only_q | {"srow": [NAN] * 12}),
        ("a qfac of zero", AFFINE, only_q | {"pixdim": [0.0, 2, 1.5, 3, 0, 0, 0, 0]}),
        ("a qfac of -1", mirrored, only_q | {"pixdim": [-1.0, 2, 1.5, 3, 0, 0, 0, 0]}),
        ("a half turn", turned, only_q | {"quatern": [0.0, 0.0, 1.0]}),
        ("a quarter turn", quarter, only_q | {"quatern": [0.0, 0.0, half]}),
        ("a quaternion longer than 1 by rounding", turned, only_q | {"quatern": [0.0, 0.0, 1.00001]}),
        ("codes that nobody knows", AFFINE, {"sform_code": 77, "qform_code": 99}),
        ("two forms 0.004 mm apart", AFFINE, {"qoffset": [-10.0, 20.0, -4.996]}),
        ("a skew of 0.04 degrees", _skewed(0.04), _only_sform(_skewed(0.04))),
        ("a skew of 0.09 degrees", _skewed(0.09), _only_sform(_skewed(0.09))),
        ("a spacing of 0.01 mm", np.diag([0.01, 1, 1, 1]), _only_sform(np.diag([0.01, 1, 1, 1]))),
        ("a spacing of 0.02 mm", np.diag([0.02, 0.02, 0.02, 1]), _only_sform(np.diag([0.02, 0.02, 0.02, 1]))),
        ("a spacing of 49 mm", np.diag([49.0, 1, 1, 1]), _only_sform(np.diag([49.0, 1, 1, 1]))),
        ("an unknown unit", AFFINE, {"xyzt_units": 0}),
        ("a unit of time besides", AFFINE, {"xyzt_units": 2 | 8}),
    ]  # fmt: skip
    for name, affine, changes in read:
        yield Odd(name, 3, _of(changes), array=voxels(), affine=affine)
    for unit, code, factor in (("metres", 1, 1e-3), ("microns", 3, 1e3)):
        changes = {
            "xyzt_units": code, "srow": _rows(AFFINE * factor), "qoffset": [-10 * factor, 20 * factor, -5 * factor],
            "pixdim": [1.0, 2 * factor, 1.5 * factor, 3 * factor, 0, 0, 0, 0],
        }  # fmt: skip
        yield Odd(f"both forms in {unit}", 3, _of(changes), array=voxels())
        yield Odd(f"a qform in {unit}, NIfTI-2", 3, _of(changes | only_q, version=2), array=voxels())
    apart = {"qoffset": [-10.0, 20.0, -4.0]}
    moved = AFFINE + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    yield Odd("two forms, form=sform", 3, _of(apart), array=voxels(), options={"reading": Reading(form="sform")})
    yield Odd("two forms, form=qform", 3, _of(apart), array=voxels(), affine=moved,
              options={"reading": Reading(form="qform")})  # fmt: skip
    yield Odd("a qform of no numbers, form=sform", 3, _of({"quatern": [NAN] * 3}), array=voxels(),
              options={"reading": Reading(form="sform")})  # fmt: skip
    yield Odd("form=qform where only an sform is coded", 3, _of({"qform_code": 0}), array=voxels(),
              options={"reading": Reading(form="qform")})  # fmt: skip
    nowhere = {"qform_code": 0, "sform_code": 0}
    yield Odd("no form, assume_ras", 3, _of(nowhere), array=voxels(), affine=np.diag([2, 1.5, 3, 1.0]),
              options={"reading": Reading(assume_ras=True)})  # fmt: skip
    yield Odd("no form and a negative pixdim, assume_ras", 3, _of(nowhere | {"pixdim": [1.0, -2, 1.5, 3, 0, 0, 0, 0]}),
              ("spacing",), options={"reading": Reading(assume_ras=True)})  # fmt: skip
    yield Odd("a form, assume_ras", 3, _of(), array=voxels(), options={"reading": Reading(assume_ras=True)})
    yield Odd("axes in one plane, resample", 3, _of(_only_sform(_skewed(89.99))), ("singular",),
              options={"reading": Reading(resample=True)})  # fmt: skip


def _values() -> Iterator[Odd]:
    """Rules 4 and 5: what the numbers mean, and whether they are numbers."""
    for kind in CODES:
        for version, order in ((1, "<"), (1, ">"), (2, "<"), (2, ">")):
            if kind in ("i2", "u2", "f4", "f8", "i8") or (version, order) == (1, "<"):
                yield Odd(f"{kind}, NIfTI-{version}, {'big' if order == '>' else 'little'}-endian", 4,
                          _of(array=voxels(kind), version=version, order=order), array=voxels(kind))  # fmt: skip
    plain = voxels().astype(np.float64)
    wide = {
        "uint16 beyond 32767": np.linspace(0, 65535, 210).reshape(SHAPE).astype("u2"),
        "uint32 beyond 2**31": np.linspace(0, 2**32 - 1, 210).reshape(SHAPE).astype("u4"),
        "int64 beyond 2**53": np.linspace(-(2.0**60), 2.0**60, 210).reshape(SHAPE).astype("i8"),
        "uint64 beyond 2**63": np.linspace(0, 1.8e19, 210).reshape(SHAPE).astype("u8"),
        "float64 of 1e30": plain * 1e30,
        "float32 of 1e-40": (plain * 1e-40).astype("f4"),
        "negative HU": (plain * 20 - 1024).astype("i2"),
    }
    for name, array in wide.items():
        yield Odd(name, 4, _of(array=array), array=array)
    for name, slope, inter, truth in (
        ("a slope and an intercept", 2.5, -7.0, plain * 2.5 - 7),
        ("a negative slope", -1.0, 0.0, -plain),
        ("a slope of 0", 0.0, 9.0, plain),
        ("a slope of 0, an intercept of no number", 0.0, NAN, plain),
        ("a tiny slope", 1e-30, 0.0, plain * 1e-30),
    ):
        yield Odd(name, 4, _of({"scl_slope": slope, "scl_inter": inter}), array=truth)
    yield Odd("a slope and an intercept, NIfTI-2, big-endian", 4,
              _of({"scl_slope": 2.5, "scl_inter": -7.0}, version=2, order=">"), array=plain * 2.5 - 7)  # fmt: skip
    for name, slope, inter, reason in (
        ("a slope of no number", NAN, 0.0, "slope"), ("an infinite slope", INF, 0.0, "slope"),
        ("a negative infinite slope", -INF, 0.0, "slope"), ("an intercept of no number", 1.0, NAN, "slope"),
        ("an infinite intercept", 2.0, INF, "slope"), ("a slope that leaves float32", 1e38, 0.0, "not-finite"),
        ("an intercept that drowns the values", 1e-3, 1e6, "precision"),
    ):  # fmt: skip
        yield Odd(name, 4, _of({"scl_slope": slope, "scl_inter": inter}), (reason,))
    four = np.random.default_rng(2).integers(0, 99, (5, 6, 7, 3)).astype("i2")
    yield Odd("three volumes in one", 4, _of(array=four), ("four-d",))
    yield Odd("three volumes in one, only an sform", 4, _of({"qform_code": 0}, four), ("four-d",))
    yield Odd("a vector for each voxel", 4, _of(array=four.reshape(5, 6, 7, 1, 3)), ("four-d",))
    yield Odd("a seventh axis of two", 4, _of(array=four[..., :2].reshape(5, 6, 7, 1, 1, 1, 2)), ("four-d",))
    yield Odd("one volume in four dimensions", 4, _of(array=voxels()[..., None]), array=voxels())
    yield Odd("one volume in five dimensions", 4, _of(array=voxels()[..., None, None]), array=voxels())
    for axes in ((2, 0, 1), (1, 0, 2), (2, 1, 0)):
        array = voxels().transpose(axes)
        affine = AFFINE[:, [*axes, 3]]
        yield Odd(f"axes stored in the order {axes}", 4, _of(_only_sform(affine), array), array=array, affine=affine)
    flip = AFFINE @ np.diag([-1.0, 1, -1, 1])
    yield Odd("axes that run to the left and down", 4, _of(_only_sform(flip)), array=voxels(), affine=flip)
    yield Odd("axes that run to the left and down, NIfTI-2, big-endian", 4,
              _of(_only_sform(flip), version=2, order=">"), array=voxels(), affine=flip)  # fmt: skip
    b, c, d = 0.1, 0.2, 0.3
    a = np.sqrt(1 - b * b - c * c - d * d)
    oblique = np.eye(4)
    oblique[:3, :3] = np.array([
        [a*a+b*b-c*c-d*d, 2*b*c-2*a*d, 2*b*d+2*a*c], [2*b*c+2*a*d, a*a+c*c-b*b-d*d, 2*c*d-2*a*b],
        [2*b*d-2*a*c, 2*c*d+2*a*b, a*a+d*d-c*c-b*b]]) * [2, 1.5, 3]  # fmt: skip
    oblique[:3, 3] = -10, 20, -5
    yield Odd("an oblique qform", 4, _of({"sform_code": 0, "quatern": [b, c, d]}), array=voxels(), affine=oblique)
    yield Odd("an oblique sform", 4, _of(_only_sform(oblique)), array=voxels(), affine=oblique)
    yield Odd("an oblique sform and qform", 4, _of({"quatern": [b, c, d], "srow": _rows(oblique)}), array=voxels(),
              affine=oblique)  # fmt: skip

    for name, value, kind in (("NaN", NAN, "f4"), ("infinity", INF, "f4"), ("-infinity", -INF, "f8"),
    ("NaN", NAN, "f8"),
                              ("1e300", 1e300, "f8"), ("-1e39", -1e39, "f8")):  # fmt: skip
        array = voxels(kind)
        array[2, 3, 4] = value
        yield Odd(f"one voxel of {name} in {kind}", 5, _of(array=array), ("not-finite",))
    yield Odd("nothing but NaN", 5, _of(array=np.full(SHAPE, NAN, "f4")), ("not-finite",))
    yield Odd("constant", 5, _of(array=np.full(SHAPE, 3, "i2")), ("constant",))
    yield Odd("nothing but zeros", 5, _of(array=np.zeros(SHAPE, "f4")), ("constant",))
    drowned = voxels("i8") + 2**53
    yield Odd("int64 that float32 cannot separate", 5, _of(array=drowned), ("precision", "constant"))
    yield Odd("float64 that float32 cannot separate", 5, _of(array=1e9 + voxels("f8") / 100), ("precision", "constant"))
    one, two = voxels()[..., :1], voxels()[:2]
    yield Odd("one slice", 5, _of(array=one), ("thin",))
    yield Odd("two dimensions", 5, _of(array=one[..., 0]), ("thin",))
    yield Odd("one dimension", 5, _of(array=voxels()[:, 0, 0]), ("thin",))
    yield Odd("two voxels across", 5, _of(array=two), ("thin",))
    yield Odd("one slice, allow_thin", 5, _of(array=one), array=one, options={"allow_thin": True})
    yield Odd("constant, allow_constant", 5, _of(array=np.full(SHAPE, 3, "i2")),
              array=np.full(SHAPE, 3, "i2"), options={"allow_constant": True})  # fmt: skip
    yield Odd("three voxels across", 5, _of(array=voxels()[:3]), array=voxels()[:3])


def _pairs() -> Iterator[Odd]:
    """Rule 6: two volumes that belong together."""

    def pair(affine: NDArray[np.float64], b: NDArray[Any] | None = None) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            put(folder, nifti(changes={"qform_code": 0}), "a.nii")
            put(folder, nifti(b, changes=_only_sform(affine)), "b.nii")
            return folder

        return write

    def moved(*voxel: float) -> NDArray[np.float64]:
        matrix = AFFINE.copy()
        matrix[:3, 3] += AFFINE[:3, :3] @ voxel
        return matrix

    wider = AFFINE @ np.diag([1.0, 1, 1.01, 1])
    both = {"kind": "pair", "array": voxels()}
    yield Odd("a pair on one grid", 6, pair(AFFINE), **both)  # type: ignore[arg-type]
    yield Odd("a pair 0.008 voxels apart", 6, pair(moved(0.008, 0, 0)), **both)  # type: ignore[arg-type]
    for axes, signs in (((2, 0, 1), (1, 1, 1)), ((0, 1, 2), (-1, 1, -1)), ((1, 2, 0), (-1, -1, 1))):
        affine, array = AFFINE[:, [*axes, 3]].copy(), voxels().transpose(axes)
        for axis, sign in enumerate(signs):
            if sign < 0:
                array = np.flip(array, axis)
                affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
                affine[:3, axis] *= -1
        yield Odd(f"a pair, one in the order {axes} {signs}", 6, pair(affine, array), **both)  # type: ignore[arg-type]
    for name, affine, array, reason in (
        ("0.02 voxels apart", moved(0.02, 0, 0), None, "grid"), ("half a voxel apart", moved(0, 0.5, 0), None, "grid"),
        ("of two spacings", wider, None, "grid"), ("of two shapes", AFFINE, voxels()[:-1], "grid"),
        ("that does not overlap", moved(100, 0, 0), None, "no-overlap"),
        ("of two shapes that does not overlap", moved(0, 0, -50), voxels()[:-1], "no-overlap"),
        ("one voxel of which is turned", AFFINE[:, [1, 0, 2, 3]], None, "grid"),
    ):  # fmt: skip
        yield Odd(f"a pair {name}", 6, pair(affine, array), (reason,), kind="pair")


def _label_maps() -> Iterator[Odd]:
    """Rule 7: labels."""
    some = np.random.default_rng(3).choice([0, 1, 2, 4], SHAPE).astype("u1")
    for kind in ("u1", "i2", "f4", "f8", "u8"):
        yield Odd(f"labels of {kind}", 7, _of(array=some.astype(kind)), array=some, labels=True)
    yield Odd("an empty label map", 7, _of(array=np.zeros(SHAPE, "u1")), array=np.zeros(SHAPE), labels=True)
    yield Odd("an empty label map of floats, declared", 7, _of(array=np.zeros(SHAPE, "f4")), array=np.zeros(SHAPE),
              labels=True, options={"declared": (1, 2)})  # fmt: skip
    yield Odd("a label map of one label", 7, _of(array=np.ones(SHAPE, "u1")), array=np.ones(SHAPE), labels=True)
    yield Odd("labels scaled to whole numbers", 7, _of({"scl_slope": 2.0}, some), array=some * 2, labels=True)
    yield Odd("labels, declared", 7, _of(array=some), array=some, labels=True, options={"declared": (1, 2, 4)})
    for name, array, changes, declared in (
        ("of a half", some + np.float32(0.5), {}, None), ("interpolated", some * np.float32(0.999), {}, None),
        ("scaled to fractions", some, {"scl_slope": 0.3}, None), ("not declared", some, {}, (1, 2, 3)),
        ("negative, not declared", some.astype("i2") - 1, {}, (1, 2, 3)),
        ("of NaN", np.where(some == 4, NAN, some).astype("f4"), {}, None),
        ("of infinity", np.where(some == 4, INF, some).astype("f4"), {}, None),
        ("of 1e20", np.where(some == 4, 1e20, some).astype("f4"), {}, None),
        ("of 2**40", np.where(some == 4, np.int64(2**40), some), {}, None),
    ):  # fmt: skip
        yield Odd(f"labels {name}", 7, _of(changes, array), ("labels",), labels=True,
                  options={} if declared is None else {"declared": declared})  # fmt: skip


def _metaimages() -> Iterator[Odd]:
    """Rule 8: MetaImage."""
    body = voxels().tobytes(order="F")
    head = metaimage()[: -len(body)]
    zipped = zlib.compress(body)

    def packed(data: bytes, **fields: str) -> Callable[[Path], Path]:
        content = metaimage(np.zeros((0, 0, 0), "i2"), CompressedData="True", **fields)
        return lambda folder: put(folder, content + data, "odd.mha")

    def sibling(name: str, data: bytes = body, called: str = "voxels.raw", **fields: str) -> Callable[[Path], Path]:
        content = metaimage(np.zeros((0, 0, 0), "i2"), ElementDataFile=name, **fields)
        return _two(content, data, ("odd.mhd", called))

    def elsewhere(folder: Path) -> Path:
        (folder / "other").mkdir()
        put(folder / "other", body, "voxels.raw")
        (folder / "voxels.raw").symlink_to(folder / "other" / "voxels.raw")
        return sibling("voxels.raw", called="")(folder)

    def piped(folder: Path) -> Path:
        os.mkfifo(folder / "voxels.raw")
        return sibling("voxels.raw", called="")(folder)

    two = {"NDims": "2", "DimSize": "5 42", "TransformMatrix": "1 0 0 1", "Offset": "1 2", "ElementSpacing": "2 1.5"}
    four = {"NDims": "4", "TransformMatrix": "", "Offset": "1 2 3 0", "ElementSpacing": "2 1.5 3 1"}
    reads: list[tuple[str, Callable[[Path], Path]]] = [
        ("in one file", _meta()),
        ("with CRLF", _raw(head.replace(b"\n", b"\r\n") + body, "odd.mha")),
        ("with spaces around", _raw(head.replace(b" = ", b"   =  ") + body, "odd.mha")),
        ("with a long comment", _meta(Comment="x" * 20_000)),
        ("with a comment that is not ASCII", _meta(Comment="Kopf, axial, geprüft")),
        ("with the voxels beside it", sibling("voxels.raw")),
        ("with a sibling whose name has a space", sibling("the voxels.raw", called="the voxels.raw")),
        ("with a sibling that begins like a gzip", None),  # type: ignore[list-item]
        ("with a sibling and a HeaderSize", sibling("voxels.raw", b"before" + body, HeaderSize="6")),
        ("with a sibling and a HeaderSize of -1", sibling("voxels.raw", b"before" + body, HeaderSize="-1")),
        ("compressed", packed(zipped)),
        ("compressed, with its length", packed(zipped, CompressedDataSize=str(len(zipped)))),
        ("compressed as gzip", packed(gzip.compress(body, mtime=0))),
        ("compressed beside it", sibling("voxels.zraw", zipped, "voxels.zraw", CompressedData="True")),
        ("of four dimensions, one of them 1", _meta(DimSize="5 6 7 1", **four)),
        ("with Origin and Orientation", _meta(TransformMatrix="", Offset="", Origin="1 2 3",
        Orientation="1 0 0 0 1 0 0 0 1")),
        ("with AnatomicalOrientation", _meta(AnatomicalOrientation="RAI")),
        ("with two equal lines", _meta(lambda content: b"NDims = 3\n" + content)),
        ("called .nii", _raw(metaimage(), "odd.nii")),
    ]  # fmt: skip
    for name, write in reads:
        if write is None:
            lucky = voxels()
            lucky[0, 0, 0] = np.int16(0x8B1F - 2**16)
            yield Odd(f"MetaImage {name}", 8, sibling("voxels.raw", lucky.tobytes(order="F")), array=lucky, affine=META)
        else:
            yield Odd(f"MetaImage {name}", 8, write, array=voxels(), affine=META)
    big = voxels().astype(">i2").tobytes(order="F")
    for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
        fields = {"BinaryDataByteOrderMSB": "", key: "True"}
        yield Odd(f"MetaImage big-endian by {key}", 8,
                  lambda folder, f=fields: put(folder, metaimage(np.zeros((0, 0, 0), "i2"), **f) + big, "odd.mha"),
                  array=voxels(), affine=META)  # fmt: skip
    for kind, name in (("u1", "UCHAR"), ("u2", "USHORT"), ("i4", "INT"), ("f4", "FLOAT"), ("f8", "DOUBLE"),
                       ("i8", "LONG_LONG")):  # fmt: skip
        yield Odd(f"MetaImage of {name}", 8, _meta(array=voxels(kind), ElementType=f"MET_{name}"), array=voxels(kind),
                  affine=META)  # fmt: skip
    turn = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]])  # lines are axes
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn.T * [2, 1.5, 3], (1, 2, 3)
    yield Odd("MetaImage rotated by a quarter", 8, _meta(TransformMatrix="0 1 0 -1 0 0 0 0 1"), array=voxels(),
              affine=np.diag([-1.0, -1, 1, 1]) @ affine)  # fmt: skip
    broken: list[tuple[str, str | tuple[str, ...], Callable[[Path], Path]]] = [
        ("a path from the root", "elsewhere", _meta(ElementDataFile="/etc/passwd")),
        ("a path upwards", "elsewhere", _meta(ElementDataFile="../other.raw")),
        ("a path downwards", "elsewhere", _meta(ElementDataFile="deeper/other.raw")),
        ("a path with backslashes", "elsewhere", _meta(ElementDataFile="..\\other.raw")),
        ("a list", "elsewhere", _meta(ElementDataFile="LIST")),
        ("a list of slices", "elsewhere", _meta(ElementDataFile="LIST 2")),
        ("a pattern", "elsewhere", _meta(ElementDataFile="slice%03d.raw 1 7 1")),
        ("its own name", "elsewhere", _meta(ElementDataFile="odd.mha")),
        ("two dots", "elsewhere", _meta(ElementDataFile="..")),
        ("an absent sibling", "not-found", sibling("absent.raw")),
        ("a name too long", "not-found", sibling("x" * 300)),
        ("a link out of the folder", "not-found", elsewhere),
        ("a pipe beside it", "not-found", piped),
        ("no ElementDataFile", "header", _meta(ElementDataFile="")),
        ("no DimSize", "header", _meta(DimSize="")),
        ("no NDims", "header", _meta(NDims="")),
        ("no ElementType", "datatype", _meta(ElementType="")),
        ("a DimSize of two", "header", _meta(DimSize="5 6")),
        ("a DimSize of no number", "header", _meta(DimSize="5 6 nan")),
        ("a DimSize of words", "header", _meta(DimSize="five 6 7")),
        ("a negative DimSize", "dimensions", _meta(DimSize="5 6 -7")),
        ("a DimSize of zero", "dimensions", _meta(DimSize="5 0 7")),
        ("a DimSize of a half", "dimensions", _meta(DimSize="5 6 7.5")),
        ("a DimSize of terabytes", "too-large", _meta(DimSize="50000 50000 5000")),
        ("a DimSize of a gigabyte", "truncated", _meta(DimSize="1000 1000 500")),
        ("one slice too few", "truncated", _meta(DimSize="5 6 8")),
        ("one slice too many", "too-long", _meta(DimSize="5 6 6")),
        ("one byte too few", "truncated", _meta(lambda content: content[:-1])),
        ("one byte too many", "too-long", _meta(lambda content: content + b"\0")),
        ("a sibling one byte short", "truncated", sibling("voxels.raw", body[:-1])),
        ("a sibling one byte long", "too-long", sibling("voxels.raw", body + b"\0")),
        ("NDims of 0", "dimensions", _meta(NDims="0")),
        ("NDims of 9", "dimensions", _meta(NDims="9")),
        ("NDims of words", "header", _meta(NDims="three")),
        ("two dimensions", "thin", _meta(**two)),
        ("four real dimensions", "four-d", _meta(DimSize="5 6 1 7", **four)),
        ("three channels", "four-d", _meta(ElementNumberOfChannels="3")),
        ("strings", "datatype", _meta(ElementType="MET_STRING")),
        ("arrays", "datatype", _meta(ElementType="MET_FLOAT_ARRAY")),
        ("a matrix with two equal lines", ("singular", "skew"), _meta(TransformMatrix="1 0 0 1 0 0 0 0 1")),
        ("a matrix of zeros", ("singular", "spacing", "affine"), _meta(TransformMatrix="0 0 0 0 0 0 0 0 0")),
        ("a matrix of no numbers", "header", _meta(TransformMatrix="nan 0 0 0 1 0 0 0 1")),
        ("a matrix that leans", "skew", _meta(TransformMatrix="1 0 0 0.0175 0.99985 0 0 0 1")),
        ("a matrix of length 2", "affine", _meta(TransformMatrix="2 0 0 0 2 0 0 0 2")),
        ("a matrix of four", "header", _meta(TransformMatrix="1 0 0 1")),
        ("a spacing of 0", "spacing", _meta(ElementSpacing="0 1 1")),
        ("a negative spacing", "spacing", _meta(ElementSpacing="2 -1.5 3")),
        ("a spacing of no number", "header", _meta(ElementSpacing="nan 1 1")),
        ("a spacing of a metre", "spacing", _meta(ElementSpacing="1000 1 1")),
        ("an offset of infinity", "header", _meta(Offset="inf 0 0")),
        ("voxels as text", "text-voxels", _meta(BinaryData="False")),
        ("neither true nor false", "header", _meta(CompressedData="perhaps")),
        ("two byte orders", "header", _meta(ElementByteOrderMSB="True")),
        ("two DimSizes", "header", _meta(lambda content: content.replace(b"DimSize", b"DimSize = 7 6 5\nDimSize"))),
        ("a tube", "header", _meta(ObjectType="Tube")),
        ("a slope of its own", "slope", _meta(ElementToIntensityFunctionSlope="2")),
        ("a header without end", "header", _raw(b"ObjectType = Image\n" + b"Comment = x\n" * 20_000, "odd.mha")),
        ("a header of one endless line", "header", _raw(b"ObjectType = " + b"x" * 200_000, "odd.mha")),
        ("a header with NUL", "header", _meta(Comment="a\0b")),
        ("a HeaderSize of -2", "vox-offset", sibling("voxels.raw", HeaderSize="-2")),
        ("a HeaderSize beyond the file", "truncated", sibling("voxels.raw", HeaderSize="100000")),
        ("compressed, but it is not", "corrupted", _meta(CompressedData="True")),
        ("compressed, but it does not say so", ("truncated", "too-long"),
         _raw(metaimage(np.zeros((0, 0, 0), "i2")) + zipped, "odd.mha")),
        ("compressed, truncated", "truncated", packed(zipped[:-9])),
        ("compressed, without its checksum", "truncated", packed(zipped[:-4])),
        ("compressed, a wrong checksum", "corrupted", packed(_flipped(zipped, -2))),
        ("compressed, a wrong bit", "corrupted", packed(_flipped(zipped, len(zipped) // 2))),
        ("compressed, too few voxels", "truncated", packed(zlib.compress(body[:-2]))),
        ("compressed, too many voxels", "too-long", packed(zlib.compress(body + b"\0\0"))),
        ("compressed, words behind it", "too-long", packed(zipped + b"words")),
        ("compressed, a length too short", "too-long", packed(zipped, CompressedDataSize=str(len(zipped) - 1))),
        ("compressed, a length too long", "truncated", packed(zipped, CompressedDataSize=str(len(zipped) + 1))),
    ]  # fmt: skip
    for name, reason, write in broken:
        yield Odd(f"MetaImage: {name}", 8, write, (reason,) if isinstance(reason, str) else reason)


def _manifests() -> Iterator[Odd]:
    """Rule 10: manifests that lead elsewhere."""

    def cohort(*rows: str, header: str = "subject,t1,t2") -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            put(folder, nifti(), "outside.nii")
            (folder / "cohort").mkdir()
            for name in ("a.nii", "b.nii"):
                put(folder / "cohort", nifti(), name)
            (folder / "cohort" / "link.nii").symlink_to(folder / "outside.nii")
            (folder / "cohort" / "circle.nii").symlink_to(folder / "cohort" / "circle.nii")
            (folder / "cohort" / "manifest.csv").write_text("\n".join([header, *rows]))
            return folder / "cohort"

        return write

    def predictions(**changes: object) -> Callable[[Path], Path]:
        entry = {"case": "p1", "role": "new", "sources": [], "image": "p1_t2.nii.gz", "mask": "p1_mask.nii.gz",
                 "expected_error": None, "warnings": []} | changes  # fmt: skip
        twice = entry.pop("twice", False)
        content = {"model": "m", "sha256": "0", "method": "A7", "seed": 0, "fold": 0, "sources": ["t1"], "target": "t2",
                   "unit": "a.u.", "cases": [entry] * (2 if twice else 1), "failed": []}  # fmt: skip

        def write(folder: Path) -> Path:
            (folder / "out").mkdir()
            (folder / "out" / "leads-out").symlink_to(folder)
            (folder / "out" / "predictions.json").write_text(json.dumps(content))
            return folder / "out"

        return write

    def objects(text: str) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            place = cohort("p1,a.nii,b.nii")(folder)
            (place / "manifest.csv").unlink()
            (place / "manifest.json").write_text(text)
            return place

        return write

    yield Odd("a sound manifest", 10, cohort("p1,a.nii,b.nii"), kind="cohort")
    yield Odd("a manifest that begins with empty lines", 10, cohort("p1,a.nii,b.nii", header="\n\nsubject,t1,t2"),
              kind="cohort")  # fmt: skip
    for name, text, reason in (
        ("half a character", '[{"subject": "p1", "t1": "\\ud800.nii", "t2": "b.nii"}]', "outside"),
        ("a cell of cells", '[{"subject": {"id": 1}, "t1": "a.nii", "t2": "b.nii"}]', "json"),
        ("NUL", '[{"subject": "p1", "t1": "a\\u0000.nii", "t2": "b.nii"}]', "nul"),
        ("a hundred thousand brackets", '[{"subject": ' + "[" * 100_000, "damaged"),
    ):
        yield Odd(f"a manifest in JSON with {name}", 10, objects(text), (reason,), kind="cohort")
    for name, row, reason in (
        ("a path upwards", "p1,../outside.nii,b.nii", "outside"),
        ("a path from the root", "p1,/etc/passwd,b.nii", "outside"),
        ("a path upwards within", "p1,x/../a.nii,b.nii", "outside"),
        ("backslashes upwards", "p1,..\\outside.nii,b.nii", "outside"),
        ("a link that leads out", "p1,link.nii,b.nii", "outside"), ("NUL", "p1,a\0.nii,b.nii", "nul"),
        ("an id with a slash", "p/1,a.nii,b.nii", "unsafe-id"), ("an id of two dots", "..,a.nii,b.nii", "unsafe-id"),
        ("an empty id", ",a.nii,b.nii", "unsafe-id"), ("an id with a bell", "p\a1,a.nii,b.nii", "unsafe-id"),
        ("an id twice", "p1,a.nii,b.nii\np1,b.nii,a.nii", "duplicate-id"),
        ("a row too long", "p1,a.nii,b.nii,c.nii", "ragged"),
        ("a file that is absent", "p1,absent.nii,b.nii", "no-cases"),
        ("a name too long", f"p1,{'x' * 5000}.nii,b.nii", "outside"),
        ("a link in a circle", "p1,circle.nii,b.nii", "outside"),
    ):  # fmt: skip
        yield Odd(f"a manifest with {name}", 10, cohort(row), (reason,), kind="cohort")
    yield Odd("sound predictions", 10, predictions(), kind="predictions")
    for name, changes, reason in (
        ("a path upwards", {"image": "../x.nii"}, "outside"),
        ("a path from the root", {"mask": "/etc/passwd"}, "outside"),
        ("a link that leads out", {"image": "leads-out"}, "outside"), ("NUL", {"image": "a\0b"}, "outside"),
        ("a case twice", {"twice": True}, "duplicate"), ("an id with a slash", {"case": "a/b"}, "unsafe-id"),
    ):  # fmt: skip
        yield Odd(f"predictions with {name}", 10, predictions(**changes), (reason,), kind="predictions")


CORPUS: tuple[Odd, ...] = tuple(
    odd
    for part in (_headers, _streams, _affines, _values, _pairs, _label_maps, _metaimages, _manifests)
    for odd in part()
)
