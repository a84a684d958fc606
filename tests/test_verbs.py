"""Verbs in Python: strings for paths, one thing for a list of one."""

from __future__ import annotations

import inspect
import pickle
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from pydicom.valuerep import DS

import chiasm
from chiasm.errors import ChiasmError
from chiasm.methods import make_recipe
from chiasm.verbs import accept_names, fit, takes
from chiasm.volumes import Geometry, Volume

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


SCAN = Volume(np.ones((4, 4, 4), np.float32), Geometry((4, 4, 4), np.eye(4)))
RECIPE = make_recipe("unet", "tiny")


@pytest.mark.parametrize(
    ("verb", "given", "options", "named"),
    [
        ("predict", ("run", [SCAN], "out"), {}, "inputs is .*Case.*, not list of Volume.*chiasm.load"),
        ("predict", ("run", SCAN.array, "out"), {}, "inputs is .*, not ndarray"),
        ("predict", ("run", "data", "out"), {"series": {"t1": "MPRAGE"}}, "series is Sequence.str., not dict"),
        ("predict", ("run", "data", "out"), {"series": 1}, "series is Sequence.str., not int"),
        ("predict", ("run", "data", "out"), {"only": ["test"]}, "only is str, not list of str"),
        ("load", (None,), {}, "path is .*, not NoneType"),
        ("train", ((one for one in "ab"), RECIPE, "out"), {}, "data is Path or Cohort, not generator.*cases=CASES"),
        ("train", (["data"], RECIPE, "out"), {}, "data is Path or Cohort, not list of str"),
        ("train", ("data", "out", RECIPE), {}, "recipe is Recipe, not str.*make_recipe"),
        ("train", ("data", RECIPE, "out"), {"threads": "2"}, "threads is int or None, not str"),
        ("train", ("data", RECIPE, "out"), {"minutes": "3"}, "minutes is float or None, not str"),
        ("plan", ("data", RECIPE, "out"), {"selection": "t1=MPRAGE"}, "selection is Selection or None, not str"),
        ("evaluate", ("made", "data", "out"), {"doses": "doses"}, "doses is tuple.*, not str"),
        ("evaluate", ("made", "data", "out"), {"doses": ("doses", 3)}, "doses is tuple.*, not tuple of str, int"),
        ("inspect", ("data", "t1", 2), {}, "target is str or None, not int"),
        ("mumap", ("ct",), {"kvp": 120.5}, "kvp is int, not float"),
        ("evaluate", ("made", "data", "out"), {"angles": [0, 72]}, "angles is str or None, not list of int"),
        ("evaluate", ("made", "data", "out"), {"gamma": (2, 2)}, "gamma is str, not tuple of int"),
        ("study", ({"arms": []}, "out"), {}, "path is Path, not dict"),
        ("mumap", (SCAN,), {}, "ct is Path or str, not Volume"),
        ("view", ([SCAN],), {}, "places is .*, not list of Volume"),
        ("train", ("data", RECIPE, "out"), {"steps": 5}, "chiasm.train: .*'steps'; it takes data, recipe, folder"),
        ("plan", ("data", RECIPE), {}, "chiasm.plan: missing .*'folder'; it takes data"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name_before_the_work(
    verb: str,
    given: tuple[object, ...],
    options: dict[str, object],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=named):
        getattr(chiasm, verb)(*given, **options)
    assert not [*tmp_path.iterdir()]


def test_numbers_of_numpy_and_every_sequence_stay_arguments() -> None:
    assert takes("int | None", np.int64(2)) and takes("float | None", np.float32(2)) and takes("float", 2)
    assert takes("int", fit(DS("120"), "int")) and fit(np.float64(2), "int | None") == 2  # as DICOM has KVP
    assert takes("str | int | None", 3) and takes("bool", np.bool_(True)) and takes("Progress | None", print)
    assert takes("Watcher | Callable[[Path], Watcher] | None", print)
    assert takes("Sequence[str]", fit({"a": 1}.keys(), "Sequence[str]"))
    assert takes("str", 0)  # refused further on, with the names that are known


def test_nothing_to_work_on_is_refused(tmp_path: Path) -> None:
    for call in (
        lambda: chiasm.evaluate([], tmp_path, tmp_path / "out"),
        lambda: chiasm.load([]),
        lambda: chiasm.predict([], [tmp_path], tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="is given"):
            call()
