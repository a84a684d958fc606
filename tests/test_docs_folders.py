"""The folders of `docs/how-to/your-folder.md`: each is built as written, read, and recognised as the page says."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from chiasm.preparation.inspection import inspect_folder
from chiasm.volumes import Geometry, write_volume
from dicom_patients import scan, write_source

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "your-folder.md"
TEXT = PAGE.read_text(encoding="utf-8")
SHAPE = (12, 11, 4)


class Example(NamedTuple):
    """A folder of the page, and what the line below it says."""

    layout: str
    cases: int
    subjects: int
    modalities: list[str]
    maps: str
    files: list[str]


def paths_of(tree: str) -> list[str]:
    """The paths below the root, from lines that are indented by two spaces for each folder above."""
    above: list[str] = []
    found = []
    for line in tree.splitlines()[1:]:
        name = line.strip()
        above = [*above[: (len(line) - len(name)) // 2 - 1], name]
        if not name.endswith("/"):
            found.append("".join(above))
    return found


EXAMPLES = [
    Example(layout, int(cases), int(subjects), modalities.split(", "), maps or "", paths_of(tree))
    for tree, layout, cases, subjects, modalities, maps in re.findall(
        r"```text\n(DATA/\n.*?)```\n\nLayout `([\w-]+)`, (\d+) cases of (\d+) subjects?: ([\w, ]+)(?:; ([^.]+))?\.",
        TEXT,
        re.DOTALL,
    )
]
#: Files of text of which the page gives the content.
TEXTS = dict(re.findall(r"with `([\w.]+)`:\n\n```\w+\n(.*?)```", TEXT, re.DOTALL)) | {
    "dataset_description.json": '{"Name": "example", "BIDSVersion": "1.10.0"}\n',
    "participants.tsv": "participant_id\tsite\nsub-01\tA\nsub-02\tB\n",
}


def write_image(path: Path, seed: int) -> None:
    """An image, or a map of ones and zeros, as the name says."""
    is_map = re.search(r"(?:mask|seg|labelsTr|tumours)", str(path)) is not None
    box = np.zeros(SHAPE, np.uint8)
    box[3:9, 3:8, 1:3] = 1
    image = 100.0 * box + np.random.default_rng(seed).normal(0, 5, SHAPE) * box
    if path.name.startswith("ct"):
        image = np.where(box > 0, image - 60, -1000.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag((1.0, 1.0, 3.0, 1.0))
    write_volume(path, box if is_map else image.astype(np.float32), Geometry(SHAPE, affine), labels=is_map)


def write_series(files: list[Path], seed: int) -> None:
    """A classic series in a patient's study, one slice in each file."""
    folder, patient = files[0].parent, files[0].parents[1].name
    array = scan((16, 14, len(files)), seed)
    written = write_source(
        folder,
        array,
        PatientID=patient,
        StudyInstanceUID=f"1.2.826.0.1.3680043.10.99.{int(patient[1:])}",
        FrameOfReferenceUID=f"1.2.826.0.1.3680043.10.99.{int(patient[1:])}.1",
        SeriesDescription="scan",
    )
    for path, name in zip(written, files, strict=True):
        path.rename(name)


def build(example: Example, root: Path) -> Path:
    slices = [root / name for name in example.files if name.endswith(".dcm")]
    for number, (_, files) in enumerate(groupby(sorted(slices), key=lambda path: path.parent)):
        write_series(list(files), number)
    for number, name in enumerate(example.files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name in TEXTS:
            path.write_text(TEXTS[path.name])
        elif path.suffix != ".dcm":
            write_image(path, number)
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == sorted(
        example.files
    )
    return root


def test_every_block_of_a_folder_has_a_line_that_says_what_it_is() -> None:
    assert len(EXAMPLES) == TEXT.count("```text\nDATA/\n") >= 9
    assert {"brats-2021", "synthrad-2023", "bids", "nnunet", "two-folders", "dicom", "manifest"} <= {
        example.layout for example in EXAMPLES
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.layout)
def test_a_folder_as_the_page_shows_it_is_recognised_as_the_page_says(example: Example, tmp_path: Path) -> None:
    seen = inspect_folder(build(example, tmp_path / "DATA"))
    cases = seen.cohort.cases
    assert (seen.cohort.layout, seen.problems, seen.unused) == (example.layout, (), ())
    assert (len(cases), len({case.subject for case in cases})) == (example.cases, example.subjects)
    assert all(sorted(case.images) == example.modalities for case in cases)
    counted = {
        "mask": sum(case.mask is not None for case in cases),
        "label map": sum(case.labels is not None for case in cases),
    }
    found = "; ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in counted.items() if count)
    assert found == example.maps


def test_a_file_of_another_name_is_noticed(tmp_path: Path) -> None:
    example = next(example for example in EXAMPLES if example.layout == "brats-2021")
    root = build(example, tmp_path / "DATA")
    first = root / example.files[0]
    first.rename(first.with_name("scan.nii.gz"))
    seen = inspect_folder(root)
    assert seen.unused == (first.with_name("scan.nii.gz"),)
    assert sorted(seen.cohort.cases[0].images) == ["flair", "t1ce", "t2"]
