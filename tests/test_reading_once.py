"""How often a command unpacks each image: once to examine it, once more to prepare it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

import chiasm
from chiasm.errors import VolumeError
from chiasm.methods import make_recipe
from chiasm.volumes import dicom_scan, streams
from chiasm.volumes.dicom_files import DicomFile, visit
from chiasm.volumes.dicom_headers import KeptHeaders
from conftest import QUICK
from dicom_patients import rewrite, write_source
from synthetic_cohort import pair


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Files whose content was unpacked, and how often, wherever that function was imported."""
    counts: Counter[Path] = Counter()
    unpack = streams.blocks

    def counted(stream: streams.Stream):  # type: ignore[no-untyped-def]
        counts[stream.path.resolve()] += 1
        return unpack(stream)

    for module in [module for name, module in sys.modules.items() if name.startswith("chiasm.")]:
        if getattr(module, "blocks", None) is unpack:
            monkeypatch.setattr(module, "blocks", counted)
    return counts


def test_each_image_is_unpacked_once_and_twice_by_training(
    toy_cohort: Path, tmp_path: Path, unpacked: Counter[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.preparation import examination
    from chiasm.preparation.inspection import inspect_folder

    monkeypatch.setattr(examination, "state_of", lambda path: None)  # each step examines, as in a process of its own
    recipe = make_recipe("A7", "tiny", QUICK)
    steps = {
        "inspect": (1, lambda: inspect_folder(toy_cohort, ["t1"], "t2")),
        "plan": (1, lambda: chiasm.plan(toy_cohort, recipe, tmp_path / "plan", say=lambda _: None)),
        "train": (2, lambda: chiasm.train(toy_cohort, recipe, tmp_path / "run", say=lambda _: None)),
        "predict": (1, lambda: chiasm.predict(tmp_path / "run", [toy_cohort], tmp_path / "made")),
        "evaluate": (1, lambda: chiasm.evaluate(tmp_path / "made", toy_cohort, tmp_path / "scores")),
    }
    for name, (most, do) in steps.items():
        unpacked.clear()
        do()
        assert len(unpacked) >= 6 and max(unpacked.values()) == most, (name, unpacked.most_common(3))


class Parsed:
    """How often pydicom parsed each file: without its pixels, and with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.headers, self.pixels = Counter[str](), Counter[str]()
        parse = pydicom.dcmread

        def counted(file: Any, *given: Any, **named: Any) -> Any:
            (self.headers if named.get("stop_before_pixels") else self.pixels)[str(file.name)] += 1
            return parse(file, *given, **named)

        monkeypatch.setattr(pydicom, "dcmread", counted)


def write_patients(folder: Path, count: int) -> Path:
    """Write a T1 and a T2 of some patients as DICOM."""
    for seed in range(count):
        for number, (kind, array) in enumerate(zip(("t1", "t2"), pair(seed, 5.0)), start=2):
            changes = {"PatientID": f"p{seed}", "SeriesDescription": f"ax {kind}", "SeriesNumber": number}
            changes["StudyInstanceUID"] = f"1.2.3.{seed}"
            place = folder / f"p{seed}" / f"s{number}"
            write_source(place, np.rint(array).astype(np.int16), spacing=(1.0, 1.0, 3.0), **changes)
    age(folder)
    return folder


def age(folder: Path) -> None:
    """Make all files a minute old."""
    for path in folder.rglob("*"):
        then = path.stat().st_mtime - 60
        os.utime(path, (then, then))


def test_each_dicom_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.preparation.inspection import inspect_folder

    data, run, made = write_patients(tmp_path / "data", 6), tmp_path / "run", tmp_path / "made"
    files, recipe = 2 * 6 * pair(0, 5.0)[0].shape[2], make_recipe("A7", "tiny", QUICK)
    parsed = Parsed(monkeypatch)
    steps = {
        "inspect": lambda: inspect_folder(data, ["t1"], "t2"),
        "train": lambda: chiasm.train(data, recipe, run, say=lambda _: None),
        "predict": lambda: chiasm.predict(run, [data], made),
        "evaluate": lambda: chiasm.evaluate(made, data, tmp_path / "scores"),
    }
    for name, do in steps.items():
        monkeypatch.setattr(dicom_scan, "KEPT", KeptHeaders())  # each command starts without any
        parsed.headers.clear()
        do()
        assert len(parsed.headers) == files and set(parsed.headers.values()) == {1}, (
            name,
            parsed.headers.most_common(2),
        )
        assert not parsed.pixels, f"{name}: native pixels are read from where the header says they begin"


def test_a_header_is_parsed_again_when_its_file_changed_and_the_oldest_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_source(tmp_path / "s")
    age(tmp_path / "s")
    kept, parsed = KeptHeaders(most=2 * len(files) - 2), Parsed(monkeypatch)

    def descriptions() -> list[str]:
        found = list(visit(map(DicomFile, files), kept.read))
        return [header.series.description for header in found if header is not None]

    before = descriptions()
    assert descriptions()[1:] == before[1:]
    assert parsed.headers[str(files[0])] == 2, "one header more than is kept, so the first was let go"
    kept.most *= 2
    descriptions()
    rewrite(files[1], lambda dataset: dataset.update({"SeriesDescription": "changed, and longer than it was"}))
    parsed.headers.clear()
    assert descriptions()[1] == "changed, and longer than it was" and parsed.headers[str(files[1])] == 1
    files[2].write_bytes(files[2].read_bytes()[:400])
    for _ in range(2):
        with pytest.raises(VolumeError):
            descriptions()


def test_the_header_of_a_file_that_was_just_written_is_parsed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_source(tmp_path / "s")
    kept, parsed = KeptHeaders(), Parsed(monkeypatch)
    for _ in range(2):
        list(visit(map(DicomFile, files), kept.read))
    assert set(parsed.headers.values()) == {2}
