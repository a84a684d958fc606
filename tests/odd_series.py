"""Odd and broken DICOM series, each with its verdict, as `odd_files` holds odd files of other formats."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicom_patients import PLANES, in_order, rewrite, scan, write_enhanced, write_source
from odd_files import Odd

Spoil = Callable[[list[Path]], object]

# --- broken by a change to the files of a sound series, in the order of their slices -----------------------------


def drop(files: list[Path]) -> None:
    files[2].unlink()


def twice(files: list[Path]) -> None:
    shutil.copy(files[2], files[2].with_name("copy"))


def conflict(files: list[Path]) -> None:
    copy = files[2].with_name("other")
    shutil.copy(files[2], copy)
    rewrite(copy, lambda d: d.update({"SOPInstanceUID": "1.2.3.4"}))


def one(**values: object) -> Callable[[list[Path]], None]:
    """Change the third slice."""
    return lambda files: rewrite(files[2], lambda d: d.update(values))


def every(**values: object) -> Callable[[list[Path]], None]:
    return lambda files: [rewrite(path, lambda d: d.update(values)) for path in files] and None


def without(name: str) -> Callable[[list[Path]], None]:
    return lambda files: rewrite(files[2], lambda d: d.__delitem__(name))


def cut(files: list[Path]) -> None:
    files[2].write_bytes(files[2].read_bytes()[:-100])


def moved(by: Callable[[int], tuple[float, float, float]]) -> Callable[[list[Path]], None]:
    """Shift each slice by some mm."""

    def shift(path: Path, mm: tuple[float, float, float]) -> None:
        def edit(d: Dataset) -> None:
            d.ImagePositionPatient = [f"{float(x) + s:.6f}" for x, s in zip(d.ImagePositionPatient, mm)]

        rewrite(path, edit)

    return lambda files: [shift(path, by(k)) for k, path in enumerate(files)] and None


def two_times(files: list[Path]) -> None:
    for k, path in enumerate(files):
        copy = path.with_name(f"later{k}")
        shutil.copy(path, copy)
        for at, file in enumerate((path, copy), start=1):
            values = {"TemporalPositionIdentifier": at, "SOPInstanceUID": f"1.2.{k + 1}.{at}"}
            rewrite(file, lambda d, values=values: d.update(values))


REFUSALS = {
    "missing-slice": ("missing-slice", drop, r"5 mm between .* \(slices 2 and 3 of 5\).*expected 2.5 mm"),
    "identical copy": ("duplicate-slice", twice, "one slice twice"),
    "two slices in one place": ("duplicate-slice", conflict, "two slices in one place"),
    "two orientations": ("orientation", one(ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"]), "2 orientations"),
    "no unit vectors": ("orientation", every(ImageOrientationPatient=["2", "0", "0", "0", "1", "0"]), "unit vectors"),
    "slices shifted": ("orientation", moved(lambda k: (3.0 * (k == 2), 0, 0)), "shifted against one another"),
    "two sizes": ("mixed-sizes", one(Rows=12, Columns=40), "24 x 20|40 x 12|20 x 24"),
    "two spacings": ("mixed-sizes", one(PixelSpacing=["1.2", "0.9"]), "pixel spacings"),
    "tilt": ("tilt", moved(lambda k: (0, 0.8 * k, 0)), r"17\.7 degrees"),
    "uneven": ("uneven", moved(lambda k: (0, 0, 0.3 * (k % 2))), "2.2 to 2.8 mm apart"),
    "two times": ("four-d", two_times, "temporal position: 1, 2"),
    "colour": ("colour", every(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0), "RGB"),
    "truncated": ("truncated", cut, "860 bytes of pixels"),
    "too many pixels": ("too-long", every(Rows=12), "beyond its pixels"),
    "no position": ("position", without("ImagePositionPatient"), "ImagePositionPatient"),
    "no orientation": ("position", without("ImageOrientationPatient"), "ImageOrientationPatient"),
    "no spacing": ("position", without("PixelSpacing"), "PixelSpacing"),
    "no pixels": ("no-pixels", without("PixelData"), "no pixels"),
    "spacing zero": ("spacing", every(PixelSpacing=["0", "1"]), "zero or negative spacing"),
    "two numbers for a position": ("header", one(ImagePositionPatient=["1", "2"]), "ImagePositionPatient"),
    "no bits": ("header", every(BitsAllocated=16, BitsStored=17), "bits"),
    "no rows": ("header", every(Rows=0), "rows|pixels"),
    "slope zero": ("header", every(RescaleSlope="0", RescaleIntercept="0"), "RescaleSlope"),
    "only a localizer": ("localizer", every(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "mosaic": ("mosaic", every(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "side by side"),
    "a file without series": ("header", without("SeriesInstanceUID"), "SeriesInstanceUID"),
    "two slices": ("thin", lambda files: [path.unlink() for path in files[2:]] and None, "zip archive"),
}  # fmt: skip

#: What is wrong with a multi-frame file: the edit, and the reason.
MULTI_FRAME: dict[str, tuple[Callable[[Dataset], object], str]] = {
    "another number of frames": (lambda d: d.update({"NumberOfFrames": 5}), "header"),
    "no groups": (lambda d: d.__delitem__("PerFrameFunctionalGroupsSequence"), "position"),
    "no shared groups": (lambda d: d.__delitem__("SharedFunctionalGroupsSequence"), "position"),
    "a frame without a place": (
        lambda d: d.PerFrameFunctionalGroupsSequence[1].__delitem__("PlanePositionSequence"), "position",
    ),
    "two stacks": (
        lambda d: setattr(d.PerFrameFunctionalGroupsSequence[1].FrameContentSequence[0], "StackID", "2"), "four-d",
    ),
    "a frame apart": (
        lambda d: setattr(
            d.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0], "ImagePositionPatient",
            [-31.25, -47.5, 14.825],
        ), "uneven",
    ),
    "truncated": (lambda d: setattr(d, "PixelData", d.PixelData[:-48]), "truncated"),
}  # fmt: skip


# --- hostile


def spliced(path: Path, before_pixels: bytes = b"", before_rows: bytes = b"") -> Path:
    """Put bytes into a file, in front of its pixels or of its first attributes."""
    content = path.read_bytes()
    pixels, first = content.index(b"\xe0\x7f\x10\x00OW"), content.index(b"\x08\x00\x05\x00CS")
    path.write_bytes(content[:first] + before_rows + content[first:pixels] + before_pixels + content[pixels:])
    return path


EMPTY_ITEM = b"\xfe\xff\x00\xe0" + bytes(4)
GROUPS = b"\x00\x52\x30\x92SQ\x00\x00"  # PerFrameFunctionalGroupsSequence
HOSTILE = {
    "elements": {"before_rows": b"\x07\x00\x01\x00LO\x02\x00ab" * 250_000},
    "items": {"before_pixels": GROUPS + b"\xff" * 4 + EMPTY_ITEM * 200_000 + b"\xfe\xff\xdd\xe0" + bytes(4)},
    "packed items": {"before_pixels": GROUPS + (8 * 50_000).to_bytes(4, "little") + EMPTY_ITEM * 50_000},
    "packed bytes": {"before_pixels": GROUPS + (2**22).to_bytes(4, "little") + bytes(2**22)},
}


# --- odd, and to be read -----------------------------------------------------------------------------------------


def stored(how: str) -> Spoil:
    """Write the same voxels in another way."""

    def edit(path: Path) -> None:
        dataset = pydicom.dcmread(path)
        if how == "big-endian":
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            pydicom.dcmwrite(path, dataset, little_endian=False, implicit_vr=False)
        elif how == "deflated":
            dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
            dataset.save_as(path)
        elif how == "headless":
            del dataset.file_meta
            pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
            path.write_bytes(path.read_bytes().partition(b"DICM")[2] or path.read_bytes())

    return lambda files: [edit(path) for path in files]


def packed(syntax: pydicom.uid.UID) -> Spoil:
    return lambda files: [rewrite(path, lambda d: d.compress(syntax, generate_instance_uid=False)) for path in files]


def rescaled(files: list[Path]) -> None:
    for k, path in enumerate(files):
        rewrite(path, lambda d, k=k: d.update({"RescaleSlope": f"{0.5 + k}", "RescaleIntercept": f"{-10 * k}"}))


def renamed(files: list[Path]) -> None:
    for k, path in enumerate(files):
        path.rename(path.with_name(f"{len(files) - k:03d}.png" if k % 2 else f"z{k}"))
    (files[0].parent / "README.txt").write_text("not DICOM")


def archived(files: list[Path]) -> Path:
    made = files[0].parent.with_suffix(".zip")
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, f"somebody/{path.name}")
    return made


def _series(
    name: str, spoil: Spoil = lambda files: None, reasons: tuple[str, ...] = (), *, array: Any = None,
    truth: Any = None, plane: str = "axial", hostile: bool = False, **changes: Any,
) -> Odd:  # fmt: skip
    """A classic series in a folder, changed by `spoil`, which may return another place to read."""
    array = scan() if array is None else array

    def write(folder: Path) -> Path:
        files = in_order(write_source(folder / "series", array, plane, **changes))
        place = spoil(files)
        return place if isinstance(place, Path) else folder / "series"

    # where the slices lie, by the words of `write_source`
    row, column = (np.array(direction, float) for direction in PLANES[plane])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * 0.9, column * 1.1, np.cross(row, column) * 2.5], axis=1)
    affine[:3, 3] = -31.25, -47.5, 12.125
    return Odd(name, 9, write, reasons, None if reasons else array if truth is None else truth,
               np.diag([-1.0, -1, 1, 1]) @ affine, hostile=hostile)  # fmt: skip


def _multi(name: str, reasons: tuple[str, ...] = (), *, truth: Any = None, **options: Any) -> Odd:
    like = _series(name, reasons=reasons, plane=options.get("plane", "axial"), truth=truth)
    return Odd(name, 9, lambda folder: write_enhanced(folder / "one.dcm", scan(), **options), reasons, like.array,
               like.affine)  # fmt: skip


def _to_be_read() -> Iterator[Odd]:
    for plane in PLANES:
        yield _series(f"a series, {plane}", plane=plane)
        yield _multi(f"a multi-frame file, {plane}", plane=plane)
    yield _multi("a multi-frame CT", modality="CT")
    yield _multi("frames in another order", order=[3, 0, 5, 1, 4, 2])
    slopes = [1.0, 2.0, 0.5, 3.0, 1.5, 0.25]
    yield _multi("a slope for each frame", slopes=slopes, truth=scan() * slopes)
    factors = np.arange(6)
    yield _series("a slope for each slice", rescaled, truth=scan() * (0.5 + factors) - 10 * factors)
    stray = scan() % 2048 - 1024
    yield _series("stray bits above 12 signed ones", array=(stray & 0x0FFF) | np.int16(0x5000), truth=stray,
                  BitsStored=12, HighBit=11)  # fmt: skip
    raised = ((stray.astype(np.int32) & 0x0FFF) << 4).astype(np.uint16).view(np.int16) | np.int16(5)
    yield _series("twelve bits at the top of sixteen", array=raised, truth=stray, BitsStored=12, HighBit=15)
    yield _series("MONOCHROME1", array=scan() % 4096, truth=4095 - scan() % 4096, BitsStored=12, HighBit=11,
                  PhotometricInterpretation="MONOCHROME1", PixelRepresentation=0)  # fmt: skip
    yield _series("a CT with an intercept", modality="CT", RescaleIntercept="-1024", truth=scan() - 1024)
    yield _series("names of files that mean nothing", renamed)
    yield _series("implicit VR", implicit=True)
    for how in ("big-endian", "deflated", "headless"):
        yield _series(f"stored {how}", stored(how))
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        larger = scan((64, 72, 3))
        yield _series(f"packed as {syntax.name}", packed(syntax), array=larger, PixelRepresentation=0)
    yield _series("one file of a series", lambda files: files[3])
    yield _series("an archive", archived)
    yield _series("text burned in, which only training refuses", every(BurnedInAnnotation="YES"))
    yield _series("private attributes without a creator", one_with(0x00291010, b"junk" * 1000))


def one_with(tag: int, content: bytes) -> Spoil:
    return lambda files: rewrite(files[2], lambda d: d.add_new(tag, "OB", content))


# --- broken, found by a second corpus ----------------------------------------------------------------------------


def _bytes(change: Callable[[bytes], bytes], which: int = 2) -> Spoil:
    return lambda files: files[which].write_bytes(change(files[which].read_bytes())) and None


def _before(name: bytes) -> Callable[[bytes], bytes]:
    """Cut a file in front of an attribute, given by its four bytes."""
    return lambda content: content[: content.index(name, 300)]


def _of_zip(*members: tuple[str, bytes]) -> Spoil:
    def write(files: list[Path]) -> Path:
        made = archived(files)
        with zipfile.ZipFile(made, "a", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return made

    return write


def lying(files: list[Path]) -> Path:
    """An archive with a member of 256 MB of which its entry says a thousand bytes."""
    made = _of_zip(("bomb", bytes(128) + b"DICM" + bytes(2**28)))(files)
    content = bytearray(made.read_bytes())  # type: ignore[union-attr]
    at = content.rindex(b"PK\1\2")
    content[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    made.write_bytes(content)  # type: ignore[union-attr]
    return made  # type: ignore[return-value]


def placed(*heights: float) -> Spoil:
    """Move slices along the normal, mm."""

    def put(path: Path, height: float) -> None:
        rewrite(path, lambda d: setattr(d, "ImagePositionPatient", ["0", "0", f"{height:.4f}"]))

    return lambda files: [put(path, height) for path, height in zip(files, heights, strict=True)]


def _to_be_refused() -> Iterator[Odd]:
    for name, (reason, spoil, _) in REFUSALS.items():
        yield _series(f"a series: {name}", spoil, (reason,))
    for name, (edit, reason) in MULTI_FRAME.items():
        yield _multi(f"a multi-frame file: {name}", (reason,), edit=edit)
    yield _multi("a multi-frame file: a frame lacks", ("missing-slice",), order=[0, 1, 3, 4, 5])
    yield _multi("a multi-frame file: a frame twice", ("duplicate-slice",), order=[0, 1, 2, 2, 3, 4, 5])
    for which, where in ((2, "in the middle"), (5, "at an end")):
        yield _series(f"an empty file {where}", _bytes(lambda _: b"", which), ("truncated",))
        yield _series(f"a file of zeros {where}", _bytes(lambda content: bytes(len(content)), which), ("truncated",))
        yield _series(f"a file cut inside the letters DICM {where}", _bytes(lambda c: c[:131], which), ("truncated",))
        yield _series(f"a header cut before its Rows {where}", _bytes(_before(b"\x28\0\x10\0"), which),
                      ("truncated",))  # fmt: skip
        yield _series(f"a header cut before its series {where}", _bytes(_before(b"\x20\0\x0e\0"), which),
                      ("header",))  # fmt: skip
    yield _series("a link that leads nowhere at an end", lambda files: files[5].unlink() or files[5].symlink_to("gone"),
                  ("not-found",))  # fmt: skip
    yield _series("a link in a circle at an end", lambda files: files[5].unlink() or files[5].symlink_to(files[5]),
                  ("not-found",))  # fmt: skip
    yield _series("pixels shorter than their own length", _bytes(
        lambda c: c.replace(b"OW\0\0" + (960).to_bytes(4, "little"), b"OW\0\0" + (2**31).to_bytes(4, "little"))
    ), ("truncated",))  # fmt: skip
    yield _series("slices lack here and there", placed(0, 2.5, 7.5, 12.5, 15, 20), ("missing-slice",))
    yield _series("slices far from the others", placed(0, 2.5, 5, 105, 107.5, 110), ("missing-slice",))
    yield _series("a map by a table", every(ModalityLUTSequence=[Dataset()]), ("lut",))
    yield _series("an archive that leads outside", _of_zip(("../outside", b"x")), ("zip-slip",))
    yield _series("an archive with an empty slice", _of_zip(("somebody/IM00009", b"")), ("truncated",))
    yield _series("an archive with a bomb", _of_zip(("bomb", bytes(2**28))), ("bomb",), hostile=True)
    yield _series("an archive that lies about a bomb", lying, ("corrupted",), hostile=True)
    for name, splice in HOSTILE.items():
        yield _series(f"a header without end: {name}",
                      lambda files, splice=splice: spliced(files[2], **splice).parent, ("too-large",),
                      hostile=True)  # fmt: skip


SERIES: tuple[Odd, ...] = (*_to_be_read(), *_to_be_refused())
