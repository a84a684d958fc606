"""What callers in Python may write for the arguments of a verb: a string for a path, one thing for a list of one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any


def accept_names(verb: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Let callers of a function give strings for paths, and one path, case or name for a sequence of them.

    What a parameter takes is read from its annotation: "Path" is in that of a path, and "Sequence" begins that of a
    sequence.

    Args:
        verb: Its annotations are not evaluated.
        name: As which `chiasm` offers it, so that it can be pickled.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def call(*given: object, **named: object) -> object:
        bound = signature.bind(*given, **named)
        for parameter, value in bound.arguments.items():
            bound.arguments[parameter] = fit(value, str(signature.parameters[parameter].annotation))
        return verb(*bound.args, **bound.kwargs)

    call.__module__, call.__qualname__ = "chiasm", name
    return call


def fit(value: object, annotation: str) -> object:
    """Return an argument as its annotation wants it.

    >>> fit("t1", "Sequence[str]"), fit("t1", "str | None")
    (['t1'], 't1')
    >>> [path.name for path in fit(["a", Path("b")], "Sequence[Path]")]
    ['a', 'b']
    """
    if annotation.startswith("Sequence[") and (isinstance(value, str) or not isinstance(value, Iterable)):
        value = [value]
    if "Path" not in annotation:
        return value
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return _as_path(value)
    return tuple(map(_as_path, value))


def _as_path(value: object) -> object:
    return Path(value) if isinstance(value, str | os.PathLike) else value
