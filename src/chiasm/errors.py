"""Errors a user can act on.

Each says what is wrong, where, what was found, what was expected and what to
do, in one sentence or two.  A mistake of the programmer is a `ValueError` or
a `TypeError`; these are for mistakes in files, folders, options and recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

SHORTEST_PART = 3  # letters of a name that is guessed from a part of it


class ChiasmError(Exception):
    """Something a user can mend; the command prints it without a traceback and exits 2.

    Args:
        what: What is wrong, as the start of a sentence, with or without a full stop.
        path: The file or folder concerned.
        reason: A short code for programs, such as "truncated" or "no-pair".
        found: What was found, if it is known.
        expected: What was expected instead.
        hint: What to do, as a full sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        path: Path | str | None = None,
        reason: str = "invalid",
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.path = None if path is None else Path(path)
        self.reason = reason
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(self._sentence())

    def __reduce__(self) -> tuple[Callable[..., ChiasmError], tuple[type[ChiasmError], dict[str, object]]]:
        """Let pickle build the error from its parts, so that it keeps its words in another process."""
        parts: dict[str, object] = {"what": self.what, "path": self.path, "reason": self.reason, "hint": self.hint}
        for name in ("found", "expected"):  # these may be anything, such as an error that cannot be pickled
            part = getattr(self, name)
            parts[name] = None if part is None else str(part)
        return _rebuilt, (type(self), parts)

    def _sentence(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        details = [f"found {self.found}"] if self.found is not None else []
        details += [f"expected {self.expected}"] if self.expected is not None else []
        aside = f" ({', '.join(details)})" if details else ""
        return f"{where}{self.what.removesuffix('.')}{aside}." + (f" {self.hint}" if self.hint else "")


def _rebuilt(kind: type[ChiasmError], parts: dict[str, Any]) -> ChiasmError:
    return kind(**parts)


class VolumeError(ChiasmError):
    """A file that cannot be read as a volume, or a pair that does not fit."""


class CohortError(ChiasmError):
    """A folder, layout, manifest or split that cannot be used."""


class RecipeError(ChiasmError):
    """A setting that is unknown, out of range, or at odds with another."""


class RunError(ChiasmError):
    """A run folder, checkpoint or model that is damaged, busy or of another kind."""


def shortened(value: object, most: int = 80) -> str:
    """Show a value from outside in a message: on one line, cut to the length of a line.

    >>> shortened("a" * 200, 9), shortened(10**5000), shortened(1.5)
    ("'aaaaaaa...", 'a number of too many digits', '1.5')
    """
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out more than 4,300 digits
        return "a number of too many digits"
    return text if len(text) <= most else f"{text[: most - 1]}..."


def unknown(
    kind: str, name: object, known: object, error: type[ChiasmError] = RecipeError, *, aliases: Iterable[str] = ()
) -> ChiasmError:
    """Say that `name` is no `kind`, list the names that are, and guess which one was meant.

    Args:
        kind: What it is a name of, such as "method".
        name: What was given.
        known: The names that are listed, or a sentence on them.
        error: Which error to make.
        aliases: Other spellings that are accepted; a guess may name one of them.

    >>> unknown("size", "smal", ["tiny", "small"]).args[0]
    "there is no size 'smal' (expected one of tiny, small). Did you mean small?"
    """
    names = list(map(str, known)) if isinstance(known, (list, tuple, set, frozenset, dict)) else []
    near = nearest(str(name), [*names, *aliases])
    return error(
        f"there is no {kind} {shortened(name)}",
        reason=f"unknown-{kind.replace(' ', '-')}",
        expected=f"one of {', '.join(names) if names else known}",
        hint=None if near is None else f"Did you mean {near}?",
    )


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most like a misspelt one, or the only one that contains it, in upper or lower case.

    None if none is similar.

    >>> nearest("Dual-atention", ["dual", "dual-attention"]), nearest("xyz", ["dual"])
    ('dual-attention', None)
    >>> nearest("monai", ["torch", "monai-bundle"])
    'monai-bundle'
    """
    by_lower = {one.lower(): one for one in known}
    lower = name[:80].lower()
    if found := get_close_matches(lower, by_lower, n=1, cutoff=0.7):
        return by_lower[found[0]]
    longer = [known_name for one, known_name in by_lower.items() if len(lower) >= SHORTEST_PART and lower in one]
    return longer[0] if len(longer) == 1 else None
