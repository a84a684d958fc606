"""Files read into records: a file that does not fit its type is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from chiasm.errors import RunError, shortened
from chiasm.storage import read_json

R = TypeVar("R")


def read_record(path: Path, kind: type[R], what: str, hint: str | None = None) -> R:
    """Read a JSON file as a record.

    Args:
        path: Of the file.
        kind: A pydantic model, a dataclass or a typed dictionary.
        what: What the file should hold, as in "no notes of a study".
        hint: What to do if it does not.

    Raises:
        RunError: If the file is missing, no JSON, or holds something else; names the first entry that is wrong.
    """
    return parse_record(read_json(path), path, kind, what, hint)


def parse_record(content: Any, path: Path, kind: type[R], what: str, hint: str | None = None) -> R:
    """Turn the content of a file into a record.

    Raises:
        RunError: As `read_record`.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise RunError(f"is {what}: {first_fault(error)}", path=path, reason="damaged", hint=hint) from error


def first_fault(error: ValidationError) -> str:
    """Describe the first entry that is wrong, and why it is wrong.

    >>> try:
    ...     TypeAdapter(dict[str, int]).validate_python({"a": "b"})
    ... except ValidationError as error:
    ...     first_fault(error)
    'a: Input should be a valid integer, unable to parse string as an integer'
    """
    first = error.errors(include_url=False)[0]
    where = ".".join(shortened(place).strip("'") for place in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"]).removeprefix("Value error, ")
