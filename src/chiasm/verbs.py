"""What callers in Python may write for the arguments of a verb: a string for a path, one thing for a list of one."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_KIND = re.compile(r"\w+(?:\[[^]]*\])?")  # a word of an annotation, with what stands in its brackets
_CLASSES = {"Path", "Case", "Cohort", "Recipe", "Selection", "Reading"}
_PLAIN = {"str", "int", "float", "bool", "None"}
_HINTS = {
    "Recipe": "chiasm.methods.make_recipe(METHOD, SIZE, SETTINGS) makes one",
    "Selection": "chiasm.cohorts.dicom_patients.Selection makes one",
    "Reading": "chiasm.volumes.screening.Reading makes one",
    "Cohort": "chiasm.inspect(FOLDER).cohort is one, and dataclasses.replace(cohort, cases=CASES) keeps some of it",
    "Case": "chiasm.load(RUN).predict takes arrays, as a Volume",
}


def accept_names(verb: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Let callers of a function give strings for paths, and one path, case or name for a sequence of them.

    What a parameter takes is read from its annotation: "Path" is in that of a path, and "Sequence" begins that of a
    sequence.  An argument that is none of these is refused by name, before the work.

    Args:
        verb: Its annotations are not evaluated.
        name: As which `chiasm` offers it, so that it can be pickled.

    Raises:
        TypeError: When the result is called, if an argument is of another kind, unknown or missing.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def call(*given: object, **named: object) -> object:
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            raise TypeError(f"chiasm.{name}: {error}; it takes {', '.join(signature.parameters)}") from None
        for parameter, value in bound.arguments.items():
            annotation = str(signature.parameters[parameter].annotation)
            bound.arguments[parameter] = fitted = fit(value, annotation)
            if not takes(annotation, fitted):
                raise TypeError(_refusal(f"chiasm.{name}: {parameter}", annotation, value))
        return verb(*bound.args, **bound.kwargs)

    call.__module__, call.__qualname__ = "chiasm", name
    return call


def fit(value: object, annotation: str) -> object:
    """Return an argument as its annotation wants it.

    >>> fit("t1", "Sequence[str]"), fit("t1", "str | None"), fit(120.0, "int"), fit(1.5, "int")
    (['t1'], 't1', 120, 1.5)
    >>> [path.name for path in fit(["a", Path("b")], "Sequence[Path]")]
    ['a', 'b']
    """
    if annotation.startswith("int") and isinstance(value, float) and value.is_integer():
        return int(value)  # such as KVP of pydicom
    if annotation.startswith("Sequence["):
        value = _as_list(value)
    if "Path" not in annotation or isinstance(value, Mapping):
        return value
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return _as_path(value)
    return tuple(map(_as_path, value))


def _as_list(value: object) -> object:
    """Return one thing in a list, and several, such as those of a generator, as a tuple; a mapping stays as it is."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    return value if isinstance(value, list | tuple | Mapping) else tuple(value)


def takes(annotation: str, value: object) -> bool:
    """Return whether a value is of a kind that an annotation names; of kinds that are not checked, all are.

    >>> takes("Sequence[str]", ["a"]), takes("Sequence[str]", {"a": "b"}), takes("Path | None", [Path("a")])
    (True, False, False)
    >>> takes("int | None", "2"), takes("Progress | None", print)
    (False, True)
    """
    if annotation == "str" and not isinstance(value, Iterable | None):
        return True  # what is no name of a format or device is refused further on, with the names that are
    kinds = _KIND.findall(annotation)
    is_checked = all(kind in _CLASSES | _PLAIN or kind.startswith(("Sequence[", "tuple[Path")) for kind in kinds)
    return not is_checked or any(_is_of(kind, value) for kind in kinds)


def _is_of(kind: str, value: object) -> bool:
    """Return whether a value is of one kind; each of a sequence must be of what stands in the brackets."""
    if kind in _PLAIN:
        return _is_plain(kind, value)
    outer, _, inner = kind.rstrip("]").partition("[")
    if outer == "Sequence":
        within = _KIND.findall(inner)
        return isinstance(value, list | tuple) and all(any(_is_of(one, thing) for one in within) for thing in value)
    if outer == "tuple":
        within = inner.split(", ")
        return isinstance(value, tuple) and len(value) == len(within) and all(map(_is_of, within, value))
    return any(part.__name__ == outer for part in type(value).__mro__)


def _is_plain(kind: str, value: object) -> bool:
    """Return whether a value is a text, a number, also of numpy, or None; anything is true or false."""
    if kind == "int":
        return isinstance(value, Integral)
    if kind == "float":
        return isinstance(value, Real)
    if kind == "str":
        return isinstance(value, str)
    return kind == "bool" or value is None


def _refusal(parameter: str, annotation: str, value: object) -> str:
    """Say what a parameter takes, what was given, and what makes the right thing."""
    inside = [type(one).__name__ for one in value] if isinstance(value, list | tuple) else []
    found = type(value).__name__ + (f" of {', '.join(dict.fromkeys(inside))}" if inside else "")
    hints = [hint for kind, hint in _HINTS.items() if re.search(rf"\b{kind}\b", annotation)]
    return "; ".join([f"{parameter} is {annotation.replace(' | ', ' or ')}, not {found}", *hints])


def _as_path(value: object) -> object:
    return Path(value) if isinstance(value, str | os.PathLike) else value
