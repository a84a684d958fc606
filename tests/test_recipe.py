from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import RecipeError, RunError
from chiasm.methods import METHODS, find_method, is_method, make_recipe
from chiasm.prediction.baselines import NAMES
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.sizes import OWN_SIZES, SIZES


def differences(a: Recipe, b: Recipe) -> set[str]:
    left, right = a.model_dump(), b.model_dump()
    return {
        f"{section}.{name}"
        for section, fields in left.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if right[section][name] != value
    }


@pytest.mark.parametrize("arm", METHODS)
def test_an_arm_changes_exactly_the_fields_of_its_row(arm: str) -> None:
    default = make_recipe(size="tiny")
    rows = {name for name, value in METHODS[arm].changes.items() if value != reach(default, name)}
    assert differences(make_recipe(arm, "tiny"), default) == rows


@pytest.mark.parametrize(
    ("arm", "settings"), [("unet", ()), ("l2", ("generator.network=unet",)), ("l2", ("generator.network='a.b:C'",))]
)
def test_what_size_small_sets_for_our_own_generator_is_not_set_for_others(arm: str, settings: Sequence[str]) -> None:
    own, other = make_recipe("l2"), make_recipe(arm, settings=settings)
    assert (own.generator.fold, own.generator.widths[0], own.optimiser.generator_rate) == (2, 24, 1e-3)
    training = own.training
    assert (training.class_share, training.painted_share, training.simulated_share) == ("auto",) * 3
    assert training.shaded_share == "auto"
    assert training.pretrained == "auto"
    for name in OWN_SIZES["small"]:
        assert reach(other, name) == reach(Recipe(), name)
    assert make_recipe("l2", settings=["generator.fold=1"]).generator.fold == 1


def reach(recipe: Recipe, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(recipe, section), field)


def test_the_default_arm_is_dual_attention_on_l2() -> None:
    recipe = make_recipe()
    assert (recipe.method, recipe.loss.norm, recipe.attention.head) == ("A7", "l2", "structured")
    assert recipe == make_recipe("dual-attention")


def test_the_literal_arm_is_the_papers_weight_unnormalised() -> None:
    literal = make_recipe("literal").attention
    assert (literal.head, literal.beta, literal.norm) == ("realness", 2.0, "none")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", ["A0", "A4", "A7"])
def test_a_recipe_written_and_read_is_the_same(tmp_path: Path, arm: str, size: str) -> None:
    recipe = make_recipe(arm, size, {"data.sources": ("t1", "flair")}, ["training.seed=7"])
    write_recipe(tmp_path / "recipe.toml", recipe)
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_a_single_setting_wins_over_arm_and_size() -> None:
    assert make_recipe("A0", "tiny", settings=["loss.norm=l2", "schedule.steps=7"]).loss.norm == "l2"


@pytest.mark.parametrize(
    "setting",
    [
        *("training.batch=true", "optimiser.discriminator_rate=true", "split.seed=false", "data.ct_offset=true"),
        *("split.locked=1", f"split.fold={'9' * 4000}"),
    ],
)
def test_a_switch_or_an_impossible_number_is_refused_in_a_short_sentence(setting: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(settings=[setting])
    assert len(str(caught.value)) < 400


def test_no_two_methods_are_called_alike() -> None:
    called = [word for method in METHODS.values() for word in method.called]
    assert len(called) == len(set(called)) and not set(called) & set(NAMES)


@pytest.mark.parametrize("word", ["dual-attention", "Dual-Attention", "A7", "a7"])
def test_a_method_is_found_by_name_and_code_whatever_the_case(word: str) -> None:
    assert find_method(word) is METHODS["A7"] and is_method(word)


def test_an_unknown_method_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(RecipeError, match="no method 'other'") as caught:
        find_method("other")
    assert not is_method("other") and all(method.name in str(caught.value) for method in METHODS.values())


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
        ("data.sources=t1,t2", r'such as \[1, 2\] or \["t1", "t2"\]'),
        ("generator.options={'size': 24}", r"expected \{size=24\}"),
        ("generator.options=24", r"such as \{size=24\}"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_would_be_right(setting: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_recipe(settings=[setting])


def test_a_table_may_be_toml_or_json() -> None:
    asked = [make_recipe(settings=[f"generator.options={text}"]) for text in ("{size = 24}", '{"size": 24}')]
    assert [dict(recipe.generator.options) for recipe in asked] == [{"size": 24}] * 2


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"dual-l1.*dual-attention"):
        make_recipe("A99")
    with pytest.raises(RecipeError, match="tiny, small, paper, large"):
        make_recipe(size="huge")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"method": "Dual-Atention"}, "dual-attention"),
        ({"method": "pix2pixx"}, "pix2pix"),
        ({"method": "l2-exp"}, "l2-expected-error"),
        ({"size": "smal"}, "small"),
        ({"settings": ["loss.nrm=l1"]}, "norm"),
        ({"settings": ["los.norm=l1"]}, "loss"),
    ],
)
def test_a_misspelt_name_is_guessed(asked: dict[str, Any], meant: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(**asked)
    assert str(caught.value).endswith(f"Did you mean {meant}?")
    with pytest.raises(RecipeError) as unlike:
        make_recipe("perceptron")
    assert "Did you mean" not in str(unlike.value)


def test_a_damaged_recipe_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[loss\nnorm = 1")
    with pytest.raises(RunError, match=r"recipe\.toml"):
        read_recipe(tmp_path / "recipe.toml")
