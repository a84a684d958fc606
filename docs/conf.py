"""Sphinx's settings for the site of the documentation: `make site` builds it into build/site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # site_pages.py lies beside this file

from site_pages import fill_page

import chiasm

project = "chiasm"
author = "the developers of chiasm"
version = release = chiasm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
html_theme = "furo"
html_title = f"chiasm {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
smartquotes = False  # options begin with two hyphens
myst_heading_anchors = 4  # as GitHub names them
default_role = "code"  # docstrings put names between single backticks
autodoc_typehints = "none"  # the docstrings say shapes, units and ranges


def setup(app: Any) -> None:
    """Let the pages that are made at build time be filled."""

    def read(_app: Any, page: str, content: list[str]) -> None:
        content[0] = fill_page(page, content[0])

    app.connect("source-read", read)
