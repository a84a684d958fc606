"""What all pages have in common: templates that are filled, sections with links to them, sentences with a tone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from chiasm.evaluation.claims import Claim
from chiasm.reports.drawing import HARD_SPACE

Tone = Literal["good", "mixed", "bad"]
TONE_OF: Mapping[Claim, Tone] = {"better": "good", "worse": "bad"}  # of a claim; of all others mixed


class Remark(NamedTuple):
    """A sentence of a page, whether it is good, mixed or bad news, and what stands out before it."""

    tone: Tone
    text: str
    word: str = ""
    region: str = ""


class PageSection(NamedTuple):
    """A part of a page.

    Attributes:
        id: Of its heading's address; the template has a macro of this name, which shows the content.
        link: What the page's list of contents calls it.
        heading: Above it.
        content: What it shows.
        absent: What is said where there is no content; "" where the macro shows its absence itself.
    """

    id: str
    link: str
    heading: str
    content: Any
    absent: str = ""


def script_data(content: object) -> Markup:
    """Write what a page's script is given, so that nothing in it can end the script."""
    return Markup(json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))


def render_page(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template of `reports/templates`; an unknown name in it is an error, and all text is escaped."""
    return _templates().get_template(template).render(content)


@cache
def _templates() -> Environment:
    """Return the place of all templates, each of which is compiled once for a process."""
    return Environment(
        loader=PackageLoader("chiasm", "reports/templates"),
        autoescape=True,
        finalize=_with_percent,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _with_percent(value: object) -> object:
    """Keep the percent signs of a text on the line of their numbers; leave other values.

    >>> _with_percent("80 % of 5")
    '80\xa0% of 5'
    """
    if not isinstance(value, str) or " %" not in value:
        return value
    return type(value)(re.sub(r"(?<=\d) %", f"{HARD_SPACE}%", value))
