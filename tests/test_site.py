"""The site of the documentation: it builds without a warning, needs no network, and is made of what the code says."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chiasm
from chiasm.cli import VERBS

DOCS = Path(__file__).parents[1] / "docs"


def build(pages: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make site` does, by the settings of the project's own."""
    words = ["-m", "sphinx", "--fail-on-warning", "--quiet", "-E", "-b", "html", "-c", DOCS, pages, out]
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out


def words_of(page: Path) -> str:
    """The text of a page, without tags."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))))


def test_every_document_is_a_page_of_the_site(site: Path) -> None:
    for source in DOCS.rglob("*.md"):
        assert (site / source.relative_to(DOCS)).with_suffix(".html").is_file(), source


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "told"),
    [
        ({"index.md": "# Start\n\n[a page](nowhere.md)\n"}, "nowhere.md"),
        ({"index.md": "# Start\n\n[a heading](#no-such-heading)\n"}, "no-such-heading"),
        ({"index.md": "# Start\n\n```{toctree}\nnowhere\n```\n"}, "nowhere"),
        ({"index.md": "# Start\n", "lonely.md": "# Lonely\n"}, "toctree"),
        ({"index.md": "# Start\n\n![a picture](nowhere.svg)\n"}, "nowhere.svg"),
    ],
)
def test_a_link_or_page_that_leads_nowhere_stops_the_build(pages: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0 and told in done.stderr, done.stderr


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]+)", page.read_text())
        assert loaded and not [place for place in loaded if re.match(r"(?:https?:)?//", place)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_verb_stands_in_the_command_reference_with_each_of_its_options(site: Path) -> None:
    from typer.main import get_command

    from chiasm.cli import make_app

    page = words_of(site / "reference" / "commands.html")
    commands = get_command(make_app()).commands
    for group, verbs in VERBS.items():
        assert group in page
        for verb in verbs:
            section = page.partition(f"chiasm {verb.__name__}¶")[2].partition("¶")[0]
            for parameter in commands[verb.__name__].params:
                if not parameter.hidden:
                    assert parameter.opts[0].upper() in section.upper(), (verb.__name__, parameter.opts)
                    assert " ".join((parameter.help or "").split()) in section, parameter.help
    assert "[bold]" not in page and "None" not in page


def test_every_public_name_stands_in_the_python_reference(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text()
    for name in chiasm.__all__:
        assert name == "__version__" or f'id="chiasm.{name}"' in page, name
        assert getattr(chiasm, name) is not None
    assert "Raises" in page and 'id="chiasm.prediction.folders.Predictor.predict"' in page


def test_pages_that_lie_beside_the_documents_are_shown(site: Path) -> None:
    assert "House rules" in words_of(site / "contributing.html")
    assert f"{chiasm.__version__} (" in words_of(site / "changelog.html")
    assert 'href="contributing.html"' in (site / "architecture.html").read_text()


def test_the_picture_of_the_method_is_what_its_script_draws() -> None:
    script = DOCS / "method_picture.py"
    code = f"import runpy; print(runpy.run_path({str(script)!r})['draw'](), end='')"
    drawn = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert drawn.stdout == (DOCS / "pictures" / "method.svg").read_text(encoding="utf-8")
    assert drawn.stdout.count("<rect") == 11
