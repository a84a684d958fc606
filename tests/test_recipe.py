from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.errors import RecipeError, RunError
from chiasm.recipe import ALIASES, ARMS, IN_WORDS, SIZES, Recipe, arm_in_words, make_recipe, read_recipe, write_recipe


def differences(a: Recipe, b: Recipe) -> set[str]:
    left, right = a.model_dump(), b.model_dump()
    return {
        f"{section}.{name}"
        for section, fields in left.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if right[section][name] != value
    }


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_exactly_the_fields_of_its_row(arm: str) -> None:
    default = make_recipe()
    rows = {name for name, value in ARMS[arm].items() if value != reach(default, name)}
    assert differences(make_recipe(arm), default) == rows


def reach(recipe: Recipe, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(recipe, section), field)


def test_the_default_arm_is_dual_attention_on_l2() -> None:
    recipe = make_recipe()
    assert (recipe.method, recipe.loss.norm, recipe.attention.target) == ("A7", "l2", "structured")
    assert recipe == make_recipe("dual-attention")


def test_the_literal_arm_is_the_papers_weight_unnormalised() -> None:
    literal = make_recipe("literal").attention
    assert (literal.target, literal.beta, literal.norm) == ("realness", 2.0, "none")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", ["A0", "A4", "A7"])
def test_a_recipe_written_and_read_is_the_same(tmp_path: Path, arm: str, size: str) -> None:
    recipe = make_recipe(arm, size, {"data.sources": ("t1", "flair")}, ["training.seed=7"])
    write_recipe(tmp_path / "recipe.toml", recipe)
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_a_single_setting_wins_over_arm_and_size() -> None:
    assert make_recipe("A0", "tiny", settings=["loss.norm=l2", "schedule.steps=7"]).loss.norm == "l2"


def test_aliases_name_arms() -> None:
    assert set(ALIASES.values()) <= set(ARMS)


def test_an_arm_is_told_in_words_or_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(IN_WORDS) <= set(ARMS)
    assert arm_in_words("dual-attention") == IN_WORDS["A7"]
    monkeypatch.setitem(ARMS, "Mine", {})
    assert arm_in_words("mine") == "Mine"
    with pytest.raises(RecipeError, match="no method 'other'"):
        arm_in_words("other")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("loss.norm=l3", "l1"),
        ("loss.nrom=l1", "global_weight"),
        ("los.norm=l1", "attention"),
        ("loss.norm", "section.field=value"),
        ("split.fold=9", "folds"),
        ("data.slices=4", "odd"),
        ('data.target="t1"', "also a source"),
        ("schedule.generator_alone=0.9", "exceed 1"),
        ("training.batch=1000000000000", "4096"),
        ("generator.widths=[1000000000000]", "4096"),
        ("method.x=1", "none"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_would_be_right(setting: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_recipe(settings=[setting])


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"A6b.*dual-attention"):
        make_recipe("A99")
    with pytest.raises(RecipeError, match="tiny, small, paper, large"):
        make_recipe(size="huge")


def test_a_damaged_recipe_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[loss\nnorm = 1")
    with pytest.raises(RunError, match=r"recipe\.toml"):
        read_recipe(tmp_path / "recipe.toml")
