"""One name for each thing: none of the words that `docs/words.md` rejects is in code, documents, help or messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
#: Words and phrases, whatever their ending, and what to write in their place.
REJECTED = {
    r"judg(e|es|ed|ing|ement|ements)": "discriminator, or assess",
    r"tell|tells|telling|told": "say, report, show or describe; separate or recognise",
    r"sick": "lesion",
    r"deal|deals|dealt|dealing": "assign",
    r"rivals?": "baseline",
    r"guards?": "non-inferiority",
    r"climb(s|ed|ing)?": "maximise",
    r"upright": "canonical, or in RAS order",
    r"doubt(s|ed|ful)?": "difficulty, or unclear",
    r"bring|brings|bringing|brought": "align, resample or convert",
    r"lain": "aligned",
    r"carried": "resampled, or copied",
    r"seal|seals|sealed": "locked test set, or checksum",
    r"unlike": "out of distribution, or different",
    r"turned": "swapped, rotated or reordered",
    r"figures?": "score, plot or number",
    r"conclude(s|d)?": "write the report",
    r"reliability maps?": "expected-error map",
    r"(input|output) images?": "source, prediction",
    r"patient ids?": "case, or subject",
    r"fakes?": "prediction, synthetic",
    r"same everywhere": "constant",
    r"cut short": "truncated",
    r"impossible spacing": "zero spacing, or out of range",
}
#: Where a rejected word may stand, as (files, what is passed over there, why).
EXCEPTIONS = (
    ("**/*.html", r"</?figure\b|\bfigure\b[^<>\n]*\{", "the element of HTML"),
    ("src/**/*.py", r"matplotlib\.figure import Figure|FigureCanvasAgg|\bFigure\(", "matplotlib's classes"),
    ("src/chiasm/networks/*.py", r"figure \d|figure of\b|network figure|(the|its) figure\b", "a figure of a paper"),
    ("docs/methods.md", r"figure \d|paper's own figure", "a figure of a paper"),
    ("docs/interoperability.md", r"nibabel_mgh_without_orientation_is_turned", "the name of a file"),
    ("docs/how-to/add-a-method.md", r"its figure or table", "a figure of a paper"),
    ("src/chiasm/volumes/dicom_files.py", r"self\.tell\(\)", "Python's method of files"),
    ("src/chiasm/training/*.py", r"\b(on_)?fake(_logits|_scores)?\b", "the discriminators' equations"),
    ("**/*", r"Patient ?IDs?", "DICOM's attribute"),
    ("src/chiasm/checksums.py", r'"seal"', "a key of files of version 0.1"),
    ("src/chiasm/**/*.py", r'"sealed"', "a name in files of version 0.1"),
    ("src/chiasm/*/*.py", r"\bopen[_-]sealed\b", "an option of version 0.1, which help does not list"),
    ("src/chiasm/registration/cohort.py", r'called them brought|"brought"', "a key of files of version 0.1"),
    ("src/chiasm/reports/curves.py", r"discriminators judges|_judge_", "names in logs of version 0.1"),
    ("src/chiasm/reports/evidence.py", r"input is unlike the training cases", "a warning of version 0.1"),
    ("src/chiasm/studies/notes.py", r'"figures"', "a folder of studies of version 0.1"),
    ("src/chiasm/training/checkpoints.py", r"discriminators judges|_judge\b", "names in checkpoints of version 0.1"),
    ("src/chiasm/training/state.py", r'"lesion_doubt"', "a key of checkpoints of version 0.1"),
)
#: Files that are not read, and why.
SKIPPED = {
    "docs/words.md": "the table of the words itself",
    "docs/log.md": "a diary, in the words of its days",
    "docs/results.md": "results, in the words of the version that made them; the headings are read",
}


def files() -> list[str]:
    """All files that somebody reads: sources and templates, documents, studies."""
    found = [
        *(ROOT / "src").rglob("*.py"),
        *(path for path in (ROOT / "src" / "chiasm" / "reports" / "templates").iterdir() if path.is_file()),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "studies").glob("*.toml"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml")),
    ]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def rejected_words(text: str, path: str = "") -> Iterator[str]:
    """Give each rejected word of a text with its line and what to write; parts of names count as words."""
    for pattern, passed, _ in EXCEPTIONS:
        if _fits(path, pattern):
            text = re.sub(passed, lambda match: "\n" * match[0].count("\n"), text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ")
    for word, instead in REJECTED.items():
        phrase = word.replace(" ", r"\s+")
        for match in re.finditer(rf"(?<![A-Za-z])({phrase})(?![A-Za-z])", text, re.IGNORECASE):
            yield f"line {text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())}: write {instead}"


def _fits(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern in which ** is any folders or none."""
    parts = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.fullmatch(parts, path) is not None


@pytest.mark.parametrize("path", files())
def test_a_file_uses_the_words_of_the_table(path: str) -> None:
    text = (ROOT / path).read_text()
    if path in SKIPPED:
        text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    if path == "docs/words.md":
        text = ""
    assert list(rejected_words(text, path)) == []


def test_a_rejected_word_would_be_found() -> None:
    for text in (
        "the judge's loss",
        "upright = canonical(volume)",
        "def draw_rivals(",
        "class BroughtImage",
        "Tell whether",
        "best_figure",
        "is the same\n  everywhere",
        "SEALED = 1",
        "the most doubtful voxels",
    ):
        assert list(rejected_words(text)), text
    for text in ("a storyteller", "the ideal", "configure", "Thrivals", "deallocate", "a seahorse", "intellect"):
        assert not list(rejected_words(text)), text


def test_each_exception_is_needed() -> None:
    for pattern, passed, reason in EXCEPTIONS:
        fitting = [path for path in files() if _fits(path, pattern)]
        used = [path for path in fitting if re.search(passed, (ROOT / path).read_text())]
        assert used, f"{pattern}: {reason}"


def test_the_table_names_each_word_that_is_rejected() -> None:
    table = (ROOT / "docs" / "words.md").read_text().lower()
    rejected = " ".join(line.split("|")[3] for line in table.splitlines() if line.count("|") == 4)
    for word in REJECTED:
        assert re.search(rf"(?<![a-z])({word})(?![a-z])", rejected), word


@pytest.mark.parametrize("path", [path for path in files() if path.endswith(".html")])
def test_a_page_calls_what_was_trained_a_method(path: str) -> None:
    shown = re.sub(r"\{[{%].*?[}%]\}", "", (ROOT / path).read_text(), flags=re.DOTALL)
    assert re.findall(r"\barms?\b", shown) == []


def test_no_two_classes_have_one_name() -> None:
    classes = [
        (match[1], path.name) for path in (ROOT / "src").rglob("*.py") for match in CLASS.finditer(path.read_text())
    ]
    twice = {name for name, count in Counter(name for name, _ in classes).items() if count > 1}
    assert [one for one in classes if one[0] in twice] == []


def test_a_message_ends_in_one_full_stop() -> None:
    from chiasm.errors import ChiasmError

    said = (ChiasmError(what, hint=hint) for what in ("is broken", "is broken.") for hint in (None, "Mend it."))
    assert [str(error) for error in said] == ["is broken.", "is broken. Mend it."] * 2
