"""The notebook runs from top to bottom, and stands in the site."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = json.loads((DOCS / "notebooks" / "first_steps.ipynb").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert {path.name for path in tmp_path.iterdir()} == {"patients", "result", "view.html"}
    assert (tmp_path / "result" / "report.html").is_file()
    made = names["made"]
    assert made.image.array.shape == made.expected_error.array.shape and np.ptp(made.image.array) > 0  # type: ignore[attr-defined]
    assert "4 cases of 4 subjects" in capsys.readouterr().out


def test_the_notebook_is_shown_as_text_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    from site_pages import notebook_page

    page = notebook_page(NOTEBOOK)
    assert page.startswith("# First steps in a notebook") and "```python\nfrom pathlib import Path" in page
    assert page.count("```") == 2 * sum(cell["cell_type"] == "code" for cell in NOTEBOOK["cells"])
    printed = {"cells": [{"cell_type": "code", "source": ["print(1)"], "outputs": [{"text": ["1\n"]}]}]}
    assert notebook_page(printed) == "```python\nprint(1)\n```\n\n```text\n1\n```\n"
    sys.modules.pop("site_pages")
