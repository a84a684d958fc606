"""Verbs in Python: strings for paths, one thing for a list of one."""

from __future__ import annotations

import inspect
import pickle
from importlib import import_module
from pathlib import Path

import pytest

import chiasm
from chiasm.errors import ChiasmError
from chiasm.verbs import accept_names, fit

VERBS = [name for name in chiasm.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_can_be_pickled_and_keeps_its_signature(name: str) -> None:
    verb = getattr(chiasm, name)
    assert name in dir(chiasm)
    assert pickle.loads(pickle.dumps(verb)) is verb
    behind = getattr(import_module(inspect.unwrap(verb).__module__), inspect.unwrap(verb).__name__)
    assert inspect.signature(verb) == inspect.signature(behind) and verb.__doc__ == behind.__doc__


def test_strings_stand_for_paths_and_one_thing_for_a_list_of_it() -> None:
    def noted(places: Sequence[Path], words: Sequence[str], pair: tuple[Path, Path] | None = None) -> object:  # noqa: F821
        return places, words, pair

    call = accept_names(noted, "noted")
    assert call("a", "b", pair=("c", Path("d"))) == ((Path("a"),), ["b"], (Path("c"), Path("d")))
    assert call([Path("a"), "b"], words=("c", "d")) == ((Path("a"), Path("b")), ("c", "d"), None)
    assert fit({"a"}, "Sequence[Path]") == (Path("a"),) and fit(iter("ab"), "Sequence[Path]") == (Path("a"), Path("b"))
    assert fit(None, "Path | None") is None and fit("auto", "str") == "auto"
    with pytest.raises(TypeError, match="words"):
        call("a")


def test_what_is_missing_is_refused_in_words_where_names_are_strings(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    for call in (
        lambda: chiasm.evaluate(missing, missing, missing),  # type: ignore[arg-type]
        lambda: chiasm.predict(missing, missing, missing),  # type: ignore[arg-type]
        lambda: chiasm.inspect(missing, "t1", "t2"),  # type: ignore[arg-type]
        lambda: chiasm.models(missing),  # type: ignore[arg-type]
        lambda: chiasm.view(missing),
    ):
        with pytest.raises(ChiasmError, match="nothing"):
            call()
