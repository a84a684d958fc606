"""Names of cases and of files that are safe in a folder, in a table and on a page; amounts and sizes in words."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

MOST_NAME = 190  # bytes of a case's name: what is added for a file's stays below the 255 of file systems

SAFE_NAME = f"one printable line of at most {MOST_NAME} bytes without / \\ < >, which begins with none of . = + - @"


def is_plain(text: str) -> bool:
    """Return whether `text` is safe in a table and on a page: one line, no markup, no formula of a spreadsheet.

    >>> [is_plain(text) for text in ("GE 1.5T / site 2", "-", "=cmd", "<b>", "a\\nb")]
    [True, True, False, False, False]
    """
    if not (text.isprintable() and 0 < len(text.encode("utf-8", "replace")) <= MOST_NAME) or set(text) & {"<", ">"}:
        return False
    first = unicodedata.normalize("NFKC", text[0])  # a spreadsheet takes a wide = for =
    return len(text) == 1 or not first.startswith(("=", "+", "-", "@"))


def is_safe_id(text: str) -> bool:
    """Return whether `text` can name a file in any folder, and is safe in a table and on a page: see `SAFE_NAME`.

    >>> [is_safe_id(text) for text in ("patient 07", "a/b", "..", "", "=cmd", "-x", "<script>")]
    [True, False, False, False, False, False, False]
    """
    return is_plain(text) and not set(text) & {"/", "\\"} and text[0] not in ".=+-@" and text == text.strip()


def amount(count: int, noun: str) -> str:
    """Say how many there are.

    >>> amount(1, "test case"), amount(0, "subject")
    ('1 test case', '0 subjects')
    """
    return f"{count} {noun}{'s' * (count != 1)}"


def name_first(names: Collection[str], most: int) -> str:
    """Name the first ones, and say how many more there are.

    >>> name_first(["a", "b", "c"], 2), name_first(["a"], 2)
    ('a, b and 1 more', 'a')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def sizes_in_mm(smallest: Sequence[float], largest: Sequence[float]) -> str:
    """Show the sizes that something had, mm; those that look alike once.

    >>> sizes_in_mm((1, 1, 3), (1, 1, 3.0001)), sizes_in_mm((1, 1, 3), (1, 1, 6))
    ('1 x 1 x 3 mm', '1 x 1 x 3 to 1 x 1 x 6 mm')
    """
    shown = [" x ".join(f"{length:.3g}" for length in size) for size in (smallest, largest)]
    return f"{' to '.join(dict.fromkeys(shown))} mm"


def three_digits(value: float) -> str:
    """Show a number with three digits, and a larger one as a whole number.

    >>> three_digits(0.55912), three_digits(999.6), three_digits(1471.6)
    ('0.559', '1000', '1472')
    """
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}"
