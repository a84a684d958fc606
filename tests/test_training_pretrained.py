"""Weights that ship with chiasm: chosen where they fit, read as they were written, and left out where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from chiasm.checksums import sha256_of
from chiasm.errors import RunError
from chiasm.methods import make_recipe
from chiasm.prediction.model import make_generator
from chiasm.preparation.plan import Plan, read_plan
from chiasm.training import pretrained
from chiasm.training.cost import check_memory
from chiasm.training.finetuning import recipe_of_child
from chiasm.training.players import make_players
from chiasm.training.pretrained import find_pretrained, read_cards, read_pretrained

NAME = "brain-t1-t2"


@pytest.fixture
def fitting(finished_run: Path) -> Plan:
    """A plan for brains of 1 mm that were cut out, T1 to T2, whatever else it holds."""
    card = read_cards()[NAME]
    plan = read_plan(finished_run / "plan.toml")
    return replace(
        plan,
        sources=("T1",),
        target="t2",
        spacing_mm=(1.0, 1.0, 1.2),
        dims=2,
        slices=card.slices,
        mask_rule="nonzero",
        histogram=False,
        context=False,
    )


def test_each_card_names_its_file_and_all_data_that_it_was_made_of() -> None:
    for name, card in read_cards().items():
        path = pretrained.FOLDER / f"{name}.safetensors"
        assert sha256_of(path) == card.sha256 and path.stat().st_size < 5e6
        assert any("Apache-2.0" in source for source in card.sources) and len(card.commands) > 2
        assert name == f"brain-{'-'.join(card.contrasts)}" and name in card.commands[-1]
        assert f"--source {card.contrasts[0]} --target {card.contrasts[-1]} " in card.commands[1]


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [("brain-t1-t2", "T1", "t2"), ("brain-t2-flair", "t2", "FLAIR"), ("brain-flair-t2", "flair", "T2")],
)
def test_a_training_of_size_small_starts_from_the_weights_that_ship_for_its_task(
    fitting: Plan, name: str, source: str, target: str
) -> None:
    recipe, fitting = make_recipe("l2", "small"), replace(fitting, sources=(source,), target=target)
    found = find_pretrained(recipe, fitting)
    assert found.name == name and "simulated patients" in found.reason
    stored = load_file(pretrained.FOLDER / f"{name}.safetensors")
    for seed in (0, 1):
        own = make_players(recipe, fitting, seed).generator.state_dict()
        assert set(own) - set(stored) == {"lookup_edges", "lookup_values"} and set(stored) < set(own)
        for key, value in stored.items():
            assert np.array_equal(own[key].numpy(), value.astype(own[key].numpy().dtype)), key
    table = make_generator(recipe, fitting).state_dict()["lookup_values"]
    assert torch.equal(own["lookup_values"], table) and table.abs().max() > 0
    random = make_recipe("l2", "small", {"training.pretrained": "none"})
    assert find_pretrained(random, fitting) == (None, "")
    drawn = make_players(random, fitting, 0).generator.state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(drawn[key], value) for key, value in make_generator(random, fitting).state_dict().items())


@pytest.mark.filterwarnings("error")
def test_a_forecast_of_memory_loads_no_weights_into_networks_without_memory(fitting: Plan) -> None:
    recipe = make_recipe("dual-attention", "small")
    assert find_pretrained(recipe, fitting).name == NAME
    check_memory(recipe, fitting)


def test_adversarial_methods_start_from_them_too_and_discriminators_from_nothing(fitting: Plan) -> None:
    started, drawn = (
        make_players(make_recipe("dual-attention", "small", {"training.pretrained": how}), fitting, 0)
        for how in ("auto", "none")
    )
    first = "stem.body.first.weight"
    assert not torch.equal(started.generator.state_dict()[first], drawn.generator.state_dict()[first])
    pairs = zip(started.local_discriminator.state_dict().values(), drawn.local_discriminator.state_dict().values())
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"target": "flair"}, "none ship for T1 to flair"),
        ({"sources": ("pd",)}, "none ship for pd to t2"),
        ({"slices": 1}, "for another network"),
        ({"dims": 3, "slices": 1, "patch": (32, 32, 32)}, "for another network"),
        ({"mask_rule": "body"}, "for brains that were cut out"),
        ({"spacing_mm": (1.0, 1.0, 5.0)}, "for voxels of 0.7 to 1.5 mm"),
        ({"spacing_mm": (0.5, 0.5, 1.0)}, "for voxels of 0.7 to 1.5 mm"),
        ({"histogram": True}, "for another network"),
    ],
)
def test_it_starts_from_random_weights_where_none_fit_and_says_why(
    fitting: Plan, changes: dict[str, object], why: str
) -> None:
    found = find_pretrained(make_recipe("l2", "small"), replace(fitting, **changes))
    assert found.name is None and found.reason.startswith("random weights") and why in found.reason


@pytest.mark.parametrize(
    "changes", [{"generator.widths": (16, 32, 64, 128)}, {"generator.fold": 1}, {"generator.skip": "none"}]
)
def test_another_generator_starts_from_random_weights(fitting: Plan, changes: dict[str, object]) -> None:
    found = find_pretrained(make_recipe("l2", "small", changes), fitting)
    assert found.name is None and "another network" in found.reason
    tiny = make_recipe("l2", "tiny", {"generator.widths": (24, 48, 96, 192), "generator.fold": 2})
    assert find_pretrained(tiny, fitting) == (None, "")


def test_damaged_weights_are_refused(fitting: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (pretrained.FOLDER / f"{NAME}.safetensors").read_bytes()
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        (tmp_path / f"{NAME}.safetensors").write_bytes(wrong)
        with pytest.raises(RunError, match=r"training\.pretrained=none"):
            read_pretrained(NAME)


def test_weights_are_read_once_in_a_process_and_each_reader_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{NAME}.safetensors"
    file.write_bytes((pretrained.FOLDER / file.name).read_bytes())
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    first = read_pretrained(NAME)
    file.unlink()
    name, weights = next(iter(first.items()))
    before = weights.clone()
    weights += 1
    second = read_pretrained(NAME)
    assert second.keys() == first.keys() and torch.equal(second[name], before)
    assert {value.dtype for value in second.values()} == {torch.float32, torch.int64}


def test_a_model_that_goes_on_learning_starts_from_its_own_weights(finished_run: Path) -> None:
    from chiasm.prediction.model import load_model

    parent = load_model(finished_run)
    training = parent.recipe.training.model_copy(update={"pretrained": "auto"})
    parent = replace(parent, recipe=parent.recipe.model_copy(update={"training": training}))
    assert recipe_of_child(parent, finished_run, {}, ()).training.pretrained == "none"
