"""Set chiasm beside nibabel, SimpleITK and MONAI on the corpora of odd files, each reader in a process of its own.

    python benchmarks/formats.py docs/formats.md [--part files|sets]

Reading is right where voxels (float32 precision) and affine (2e-4 mm) are those that the file was made with, in
whatever order a DICOM series is stacked, or where what must be refused raises any error within ten seconds and 4 GB of
address space. A folder of DICOM is read by SimpleITK's ImageSeriesReader and MONAI's LoadImage. nibabel reads no DICOM
series, and neither it nor the others know pairs or manifests: there they are not counted. What needs an option of ours
is left out. The tables between the marks of the document are written anew. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from odd_files import CORPUS, Odd
from odd_series import SERIES

EVERY = (*CORPUS, *SERIES)
READERS = ("chiasm", "nibabel", "SimpleITK", "monai")
SECONDS = 10
BYTES = 4 * 2**30  # of address space, so that a bomb ends a reader and not the machine
RULES = {
    1: "header", 2: "bytes to the end", 3: "affine", 4: "meaning of the numbers", 5: "voxels", 7: "labels",
    8: "MetaImage", 9: "DICOM", 6: "pairs", 10: "manifests",
}  # fmt: skip
#: What is asked of no other reader, by rule.
ALONE = {"nibabel": (6, 9, 10), "SimpleITK": (6, 10), "monai": (6, 10)}
#: Tables that are written apart from one another, to the rules in them.
PARTS = {"files": (1, 2, 3, 4, 5, 7, 8), "sets": (9, 6, 10)}
BEGIN, END = "<!-- begin: benchmarks/formats.py {} -->", "<!-- end: benchmarks/formats.py {} -->"


def read_with(reader: str, path: Path, labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine (RAS mm) as a user of the library would get them."""
    if reader == "chiasm":
        from chiasm.volumes import read_volume

        volume = read_volume(path, labels)
        return volume.array, volume.geometry.affine
    if reader == "nibabel":
        import nibabel

        image = nibabel.load(path)
        return image.get_fdata(), image.affine
    if reader == "SimpleITK":
        import SimpleITK

        if path.is_dir():
            itk = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)))
        else:
            itk = SimpleITK.ReadImage(str(path))
        affine = np.eye(4)
        turn = np.reshape(itk.GetDirection(), (itk.GetDimension(),) * 2)[:3, :3]
        affine[: len(turn), : len(turn)] = turn * itk.GetSpacing()[:3]
        affine[: len(turn), 3] = itk.GetOrigin()[:3]
        return SimpleITK.GetArrayFromImage(itk).T, np.diag([-1.0, -1, 1, 1]) @ affine
    from monai.transforms import LoadImage

    tensor = LoadImage(image_only=True)(path)
    return tensor.numpy(), np.asarray(tensor.affine)


def one_by_one(reader: str) -> None:
    """Read paths from stdin, one a line, and answer each; runs in a process that may be ended."""
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, path = json.loads(line)
        odd = next(one for one in EVERY if one.name == name)
        try:
            if odd.kind != "volume":
                _meet(odd, Path(path))
                print(json.dumps(["read", not odd.reasons]), flush=True)
                continue
            array, affine = read_with(reader, Path(path), odd.labels)
        except Exception as error:  # noqa: BLE001  whatever a library raises is its way to refuse
            print(json.dumps(["refused", type(error).__name__]), flush=True)
            continue
        print(json.dumps(["read", _is_true(odd, array, affine)]), flush=True)


def _meet(odd: Odd, path: Path) -> None:
    """Ask chiasm for what is more than one volume, as its commands do."""
    from chiasm.cohorts.discovery import find_cohort
    from chiasm.prediction.manifest import read_manifest
    from chiasm.volumes import check_pair, read_volume

    if odd.kind == "pair":
        check_pair(*(read_volume(path / name) for name in ("a.nii", "b.nii")))
    else:
        (find_cohort if odd.kind == "cohort" else read_manifest)(path)


def _is_true(odd: Odd, array: np.ndarray, affine: np.ndarray) -> bool:
    if odd.array is None or odd.reasons:
        return False
    array = np.squeeze(array)
    truth = np.squeeze(odd.array).astype(np.float32)
    if odd.rule == 9:  # a series may be stacked in either order, its rows before its columns
        from chiasm.volumes import Geometry, Volume
        from chiasm.volumes.geometry import reordered_like

        fitting = reordered_like(Volume(array, Geometry(array.shape, affine)), Geometry(truth.shape, odd.affine))
        array, affine = fitting.array, fitting.geometry.affine
    if array.shape != truth.shape or not np.allclose(array.astype(np.float32), truth, rtol=1e-6, atol=0):
        return False
    return affine.shape == (4, 4) and bool(np.allclose(affine, odd.affine, atol=2e-4))


def ask(reader: str, odds: Iterable[Odd], folder: Path) -> dict[str, str]:
    """Return for each odd file "right", "wrong", "too slow" or "died"."""
    verdicts: dict[str, str] = {}
    process = None
    for number, odd in enumerate(odds):
        if odd.rule in ALONE.get(reader, ()):
            continue
        place = folder / str(number)
        place.mkdir()
        path = odd.write(place)
        if process is None:
            process = subprocess.Popen(
                [sys.executable, __file__, "--reader", reader], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            _line(process, 60)
        assert process.stdin is not None
        process.stdin.write(json.dumps([odd.name, str(place), str(path)]) + "\n")
        process.stdin.flush()
        answer = _line(process, SECONDS)
        if answer is None:
            process.kill()
            verdicts[odd.name] = "died" if process.wait() != -9 else "too slow"
            process = None
            continue
        what, told = json.loads(answer)
        right = bool(odd.reasons) if what == "refused" else bool(told)
        verdicts[odd.name] = "right" if right else "refused" if what == "refused" else "wrong"
    if process is not None:
        process.kill()
        process.wait()
    return verdicts


def _line(process: subprocess.Popen[str], seconds: float) -> str | None:
    """Wait for one line of answer; None if none comes."""
    import select

    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    while ready and (line := process.stdout.readline()):
        if line.startswith(("[", "ready")):  # libraries print too
            return line
    return None


def tables(verdicts: dict[str, dict[str, str]], odds: list[Odd]) -> list[str]:
    """Write all tables: files treated right for each rule, and what each reader gets wrong."""
    names = [f"{reader} {version(reader)}" if reader != "chiasm" else "chiasm" for reader in READERS]
    lines = ["| rule | files | " + " | ".join(names) + " |", "|---" * (2 + len(READERS)) + "|"]

    def row(title: str, some: list[Odd]) -> str:
        asked = [[odd.name for odd in some if odd.name in verdicts[reader]] for reader in READERS]
        rights = [sum(verdicts[reader][name] == "right" for name in names) for reader, names in zip(READERS, asked)]
        told = [str(count) if names else "" for count, names in zip(rights, asked)]
        return f"| {title} | {len(some)} | " + " | ".join(told) + " |"

    present = dict.fromkeys(odd.rule for odd in odds)
    for rule, title in RULES.items():
        of_rule = [odd for odd in odds if odd.rule == rule]
        for word, some in (
            ("read", [odd for odd in of_rule if not odd.reasons]), ("refused", [odd for odd in of_rule if odd.reasons])
        ):  # fmt: skip
            if some:
                lines.append(row(f"{rule}, {title}: to be {word}", some))
    if not any(rule in ALONE["monai"] for rule in present):
        lines.append(row("all", odds))
    others = [[verdicts[reader].get(odd.name) for reader in READERS[1:]] for odd in odds]
    heeded = [told for told in others if any(told)]
    alone = sum("right" not in told for told in heeded)
    lines += ["", f"None of the other readers treats {alone} of these {len(heeded)} files right.", ""]
    lines += ["| how a file was treated | " + " | ".join(names) + " |", "|---" * (1 + len(READERS)) + "|"]
    kinds: list[tuple[str, Callable[[Odd, str], bool]]] = [
        ("read, with wrong voxels or in a wrong place", lambda odd, v: v == "wrong" and not odd.reasons),
        ("read, where it must be refused", lambda odd, v: v == "wrong" and bool(odd.reasons)),
        ("refused, where it can be read", lambda _, v: v == "refused"),
        (f"no answer within {SECONDS} s", lambda _, v: v == "too slow"),
        ("the process died", lambda _, v: v == "died"),
    ]
    for title, is_so in kinds:
        counts = [sum(is_so(odd, verdicts[reader].get(odd.name, "")) for odd in odds) for reader in READERS]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| file | to be | " + " | ".join(names) + " |", "|---" * (2 + len(READERS)) + "|"]
    for odd in odds:
        told = [verdicts[reader].get(odd.name, "right") for reader in READERS]
        if set(told) != {"right"}:
            wanted = "refused" if odd.reasons else "read"
            lines.append(
                f"| {odd.rule}: {odd.name} | {wanted} | " + " | ".join("" if t == "right" else t for t in told) + " |"
            )
    return lines


def main() -> None:
    """Ask every reader about every file and write the tables into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, nargs="?")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, action="append", help="which tables; all without it")
    asked: Any = parser.parse_args()
    if asked.reader:
        one_by_one(asked.reader)
        return
    for part in asked.part or PARTS:
        odds = [odd for odd in EVERY if not odd.options and odd.rule in PARTS[part]]
        verdicts = {}
        for reader in READERS:
            with tempfile.TemporaryDirectory() as folder:
                verdicts[reader] = ask(reader, odds, Path(folder))
            print(part, reader, Counter(verdicts[reader].values()), flush=True)
        text = asked.document.read_text()
        before, begin, rest = text.partition(BEGIN.format(part))
        end, after = rest.partition(END.format(part))[1:]
        asked.document.write_text("\n".join([before + begin, *tables(verdicts, odds), end + after]))


if __name__ == "__main__":
    main()
