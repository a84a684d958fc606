"""Which players an arm has, and that their first weights depend on the seed alone; the loop's own small parts."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chiasm.errors import RecipeError
from chiasm.methods import GROUPS, METHODS, STARTS, Method, find_method, make_recipe
from chiasm.networks.catalogue import GENERATORS, CataloguedNetwork
from chiasm.networks.srcnn import srcnn
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.patches import PatchNeeds
from chiasm.preparation.plan import Plan, read_plan
from chiasm.recipe import Recipe
from chiasm.studies.study_file import Study
from chiasm.training.log import TrainingLog
from chiasm.training.loop import collected_signals, make_fabric, validation_steps
from chiasm.training.players import (
    MethodRow,
    check_players,
    describe_methods,
    make_players,
    needs_local_discriminator,
    patch_needs,
)
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run
from chiasm.training.session import Session
from conftest import QUICK
from synthetic_cohort import plan_of


@pytest.fixture(scope="module")
def plan(finished_run: Path) -> Plan:
    return read_plan(finished_run / "plan.toml")


def recipe(method: str, **changes: object) -> Recipe:
    return make_recipe(method, "tiny", {**QUICK, **{name.replace("__", "."): v for name, v in changes.items()}})


#: Players beside the generator: global, second global, local.  An arm that is not here has those that its weights ask.
DISCRIMINATORS = {
    **dict.fromkeys(("A0", "A1", "A2", "C1", "C2", "C3", "C6", "C7"), ""),
    **dict.fromkeys(("A3", "A3b", "A4"), "global"),
    **dict.fromkeys(("A5", "A5b", "A10"), "local"),
    **dict.fromkeys(
        ("A6", "A6b", "A7", "A8", "A8n", "A9", "A11", "A12", "A13", "A14", "A15", "A16", "C4"), "global local"
    ),
    "C5": "global second",
    **dict.fromkeys(
        ("context-gan", "context-gan-2", "strainet", "gan", "lsgan", "hinge", "wgan", "wgan-gp", "dcgan", "pix2pix"),
        "global",
    ),
    "A17": "local",
    **dict.fromkeys(("srcnn", "srcnn-955", "fcn8", "unet", "fcn3d", "han", "li-cnn", "jcsc"), ""),
}


@pytest.mark.parametrize(
    ("method", "setting", "told"),
    [
        ("unet", "generator.dropout=0.3", r"own network, not of unet.*generator.options=\{dropout=0.3\}"),
        ("pix2pix", "discriminators.global_spectral_norm=true", r"own network, not of patch"),
    ],
)
def test_a_setting_without_effect_is_refused(method: str, setting: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check_players(make_recipe(method, "tiny", {}, [setting]))
    check_players(make_recipe("hinge", "tiny", {}, ["generator.dropout=0.3"]))


def discriminators_of(asked: Recipe) -> str:
    local = asked.loss.local_weight > 0 or asked.attention.head != "none"
    told = " ".join(name for name, there in (("global", asked.loss.global_weight > 0), ("local", local)) if there)
    return DISCRIMINATORS.get(asked.method, told)


PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
NOT_EXPORTED = re.findall(r"`([\w-]+)` \(", PAGE.partition("takes every method except")[2].partition("\n\n")[0])


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_has_the_players_it_asks_and_is_exported_if_the_page_says_so(method: str, plan: Plan) -> None:
    asked = recipe(method, generator__scale=1 / 16)
    players = make_players(asked, replace(plan, patch=(256, 256)), 0)
    there = {
        "global": players.global_discriminator is not None,
        "second": players.second_discriminator is not None,
        "local": players.local_discriminator is not None,
    }
    assert " ".join(name for name, present in there.items() if present) == discriminators_of(asked)
    assert needs_local_discriminator(asked) == there["local"]
    assert (players.refiner is not None) == ("generator.refiner" in METHODS[method].changes)
    assert (asked.generator.stages > 1 or asked.generator.network == "pix2pix") == (method in NOT_EXPORTED)


def same(a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    assert a is not None and b is not None
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_first_weights_depend_on_the_seed_and_not_on_which_players_there_are(plan: Plan) -> None:
    unskipped = {"generator__skip": "none"}
    full, alone = make_players(recipe("A7", **unskipped), plan, 5), make_players(recipe("A1", **unskipped), plan, 5)
    assert same(full.generator, alone.generator)
    assert same(full.global_discriminator, make_players(recipe("A3"), plan, 5).global_discriminator)
    assert same(
        full.local_discriminator, make_players(recipe("A10", generator__widths=(4, 4, 4)), plan, 5).local_discriminator
    )
    other = make_players(recipe("A7", **unskipped), plan, 6)
    assert not same(full.generator, other.generator) and not same(full.global_discriminator, other.global_discriminator)
    twins = make_players(recipe("C5"), plan, 5)
    assert not same(twins.global_discriminator, twins.second_discriminator)


def test_making_players_leaves_everybody_elses_random_numbers_alone(plan: Plan) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_players(recipe("A7"), plan, 9)
    assert torch.equal(torch.rand(4), expected)


def test_an_unconditional_local_discriminator_sees_the_image_alone(plan: Plan) -> None:
    conditional, alone = (make_players(recipe(m), plan, 0).local_discriminator for m in ("A7", "A11"))
    assert conditional is not None and alone is not None
    assert alone(torch.zeros(1, 1, 16, 16)).realness.shape == (1, 1, 16, 16)
    channels = len(plan.sources) * plan.slices + 1
    assert conditional(torch.zeros(1, channels, 16, 16)).realness.shape == (1, 1, 16, 16)


def test_validations_are_spread_evenly_and_one_comes_before_the_attention() -> None:
    settings = {"schedule__steps": 100, "training__validations": 4, "schedule__ramp": 0.05}
    settings |= {"schedule__generator_alone": 0.4, "schedule__discriminators_alone": 0.15}
    assert validation_steps(recipe("A1", **settings)) == [25, 50, 75, 100]
    assert validation_steps(recipe("A7", **settings)) == [25, 50, 60, 75, 100]
    assert validation_steps(recipe("A7", schedule__steps=2, training__validations=50))[-1] == 2


def test_a_resumed_log_holds_no_line_twice_and_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"kind": "step", "step": step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"kind": "st')
    log(path).cut(2)
    assert path.read_text() == "".join(f"{line}\n" for line in lines[:2])


def log(path: Path) -> TrainingLog:
    return TrainingLog(path, Session(make_fabric(recipe("A1")), print), 4, lambda done: done / 4)


def test_errors_of_a_ct_are_reported_in_hounsfield_units(tmp_path: Path) -> None:
    window = IntensityMap("hu", (-1024.0, 3071.0), (-1.0, 1.0))
    assert plan_of(target_unit="HU", target_reference=window).target_hu == 2047.5
    assert plan_of().target_hu is None
    said: list[str] = []
    session = Session(make_fabric(recipe("A1")), said.append)
    scores = {"mae": 0.02, "lookup_mae": 0.03, "lesion_mae": 0.1}
    TrainingLog(tmp_path / "log.jsonl", session, 4, lambda done: done / 4, 2047.5).validation(1, scores, None)
    assert said == ["step 2: validation error 41.0 HU (look-up 61.4 HU), in lesions 204.8 HU"]


def test_a_kill_while_the_log_is_cut_leaves_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        log(path).cut(1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_signals_are_collected_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with collected_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_another_thread_leaves_signals_to_their_owner() -> None:
    found: list[object] = []

    def run() -> None:
        with collected_signals() as caught:
            found.append(list(caught))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]


def test_a_refiner_changes_nobody_elses_first_weights_and_corrects_nothing_at_first(plan: Plan) -> None:
    one, two = make_players(recipe("A7"), plan, 5), make_players(recipe("A15"), plan, 5)
    assert all(
        same(getattr(one, name), getattr(two, name))
        for name in ("generator", "global_discriminator", "local_discriminator")
    )
    assert two.refiner is not None
    assert not two.refiner(torch.randn(2, len(plan.sources) * plan.slices + 2, 16, 16)).any()
    assert not same(two.refiner.stem, make_players(recipe("A15"), plan, 6).refiner.stem)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["A1", "A3", "C5"])
@pytest.mark.parametrize(
    ("setting", "told"),
    [("generator__refiner", "generator.refiner"), ("training__transplant", "training.transplant = difficulty")],
)
def test_what_goes_by_confidence_is_refused_where_nobody_has_any(
    method: str, setting: str, told: str, plan: Plan
) -> None:
    asked = recipe(method, **{setting: (4, 8) if "refiner" in setting else "difficulty"})
    with pytest.raises(RecipeError, match=f"{told} needs the confidence.*method {method}") as caught:
        make_players(asked, plan, 0)
    assert caught.value.reason == "no-local-discriminator"


def test_the_table_of_methods_tells_weights_papers_and_needs() -> None:
    rows = {row.name: row for row in describe_methods("small")}
    assert list(rows) == list(METHODS)
    assert rows["srcnn"].published == 64 * 81 + 64 + 64 * 32 + 32 + 32 * 25 + 1  # 9-1-5 on one channel
    assert 31_000_000 < rows["unet"].published < 31_100_000 and rows["unet"].weights < rows["unet"].published / 10
    assert "256" in rows["pix2pix"].needs and "global discriminator" in rows["pix2pix"].needs
    assert "lesion labels" in rows["C3"].needs and "3D" in rows["fcn3d"].needs
    assert rows["A7"].needs == "global and local discriminators"
    halvings = ((2, 16), (16, 32), (32, 64), (64, 64))  # 4 x 4 of the global one, then a unit with a bias
    by_hand = sum(16 * before * after + after for before, after in halvings) + 64 + 1
    assert rows["A3"].discriminators == by_hand == rows["A7"].discriminators - rows["A5"].discriminators
    assert rows["A1"].discriminators == 0
    assert rows["han"].needs.startswith("2D; ") and rows["fcn8"].needs.startswith("2D; ")


def test_each_method_is_credited_to_whom_it_belongs() -> None:
    rows = {row.name: row for row in describe_methods("tiny")}
    nie = {name for name, row in rows.items() if "1907.03297" in row.paper}
    assert {METHODS[name].group for name in nie} == {"method"}
    assert nie == {"A5", "A5b", "A6", "A6b", *(f"A{number}" for number in range(7, 16)), "A8n"}
    for name, credit in {
        "A2": "Mathieu",
        "A3": "Isola",
        "A3b": "Isola",
        "A4": "Gulrajani",
        "C1": "Lin",
        "C7": "Ghiasi",
    }.items():
        assert credit in rows[name].paper
    assert "nobody" in rows["A0"].paper and "nobody" in rows["A1"].paper
    assert {method.group for method in METHODS.values()} == set(GROUPS)


@pytest.mark.parametrize(("one", "kept", "weight"), [("A3b", "global", "local"), ("A5b", "local", "global")])
def test_one_discriminator_on_l2_differs_from_dual_by_the_other_ones_weight_alone(
    one: str, kept: str, weight: str
) -> None:
    alone, dual = (make_recipe(method).loss for method in (one, "dual"))
    assert alone == dual.model_copy(update={f"{weight}_weight": 0.0})
    assert getattr(alone, f"{kept}_weight") > 0 and alone.norm == "l2"
    assert make_recipe(one).attention == make_recipe("dual").attention


def test_the_command_lists_every_method_once_under_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    from chiasm.cli import main

    with pytest.raises(SystemExit):
        main(["methods", "--size", "tiny"])
    told = capsys.readouterr().out
    places = [told.index(heading) for heading in (*GROUPS.values(), "Start with:")]
    assert places == sorted(places)
    for method in METHODS.values():
        assert told.count(f"\n  {method.title} ") == 1, method.title
    assert "10,585 of discriminators" in " ".join(told.split())  # of A3: (2, 8), (8, 16), (16, 32), counted as above
    for name in STARTS:
        assert find_method(name) and f"--method {name}: " in told


def test_a_method_of_ones_own_is_listed_and_studied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATORS, "mine", CataloguedNetwork(srcnn, "Us, 2026"))  # type: ignore[arg-type]
    mine = Method("Mine", "my own", {**METHODS["srcnn"].changes, "generator.network": "mine"})
    monkeypatch.setitem(METHODS, "Mine", mine)
    lab = Method("lab", "of the lab", {**METHODS["A1"].changes, "generator.network": "toy_networks:Plain"})
    monkeypatch.setitem(METHODS, "lab", lab)
    rows = {row.name: row for row in describe_methods("tiny")}
    assert rows["Mine"][1:] == ("my own", "Us, 2026", *rows["srcnn"][3:])
    assert rows["lab"][2:] == ("toy_networks:Plain", 9 * 4 + 4 + 4 + 1, 0, "patches of 16 or more", 0)
    study = Study(data=Path("data"), source=("t1",), target="t2", arms=("A1", "mine"))
    assert study.in_words == {"A1": "L2", "Mine": "my own"}


@pytest.fixture(scope="module")
def described() -> dict[str, MethodRow]:
    return {row.name: row for row in describe_methods("tiny")}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_the_weights_told_are_those_of_the_networks(method: str, plan: Plan, described: dict[str, MethodRow]) -> None:
    asked = make_recipe(method, "tiny")
    flat = replace(
        plan,
        dims=3 if asked.data.dims == "3d" else 2,
        slices=1,
        patch=(32,) * 3 if asked.data.dims == "3d" else (256, 256),
        histogram=asked.data.histogram,
    )
    contexts = [stage > 0 for stage in range(asked.generator.stages)]
    stages = [make_players(asked, replace(flat, context=context), 0) for context in contexts]
    shipped = [*(players.generator for players in stages), *(one for one in [stages[-1].refiner] if one)]
    row = described[method]
    assert row.weights == sum(weight.numel() for network in shipped for weight in network.parameters())
    beside = [
        one
        for players in stages
        for one in (players.global_discriminator, players.second_discriminator, players.local_discriminator)
        if one is not None
    ]
    assert row.discriminators == sum(weight.numel() for network in beside for weight in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["srcnn", "unet", "fcn3d", "li-cnn", "context-gan", "context-gan-2", "strainet", "jcsc"]
)
def test_the_least_patch_that_is_told_is_taken_and_a_smaller_one_refused(
    method: str, toy_cohort: Path, tmp_path: Path, described: dict[str, MethodRow]
) -> None:
    needs = described[method].needs
    least = int(re.findall(r"patches of (\d+) or more", needs)[0])
    assert plan_run(toy_cohort, recipe(method, data__patch=least), tmp_path / "least", say=str).plan.patch[0] == least
    with pytest.raises(RecipeError, match=r"patch"):
        plan_run(toy_cohort, recipe(method, data__patch=least - 1), tmp_path / "less", say=str)


@pytest.mark.parametrize(
    ("method", "changes", "wanted"),
    [
        ("A7", {"generator__network": "srcnn"}, PatchNeeds(4, 16, 0)),  # loses 12, which is a multiple of 4 too
        ("A7", {"generator__network": "srcnn", "discriminators__local_widths": (4,) * 4}, PatchNeeds(8, 20, 4)),
        ("A1", {"generator__network": "srcnn"}, PatchNeeds(1, 13, 0)),  # nobody discriminators: the paper's 33 will do
        ("context-gan", {}, PatchNeeds(1, 16 + 8, 0)),  # the critic pools three times
        ("A3", {"discriminators__global_network": "patch"}, PatchNeeds(1, 24, own=True)),
        ("A7", {}, None),
    ],
)
def test_a_patch_leaves_enough_for_the_discriminators_of_its_middle(
    method: str, changes: dict[str, object], wanted: PatchNeeds | None
) -> None:
    assert patch_needs(recipe(method, **changes)) == wanted


@pytest.mark.parametrize(
    ("method", "patch", "told"),
    [
        ("pix2pix", 96, r"found 96, expected a multiple of 256, such as 256 or 512"),
        ("unet", 40, r"found 40, expected a multiple of 16, such as 32 or 48"),
        ("context-gan", 20, r"found 20, expected at least 24"),
        ("srcnn", 64, None),
        ("context-gan", 25, None),
    ],
)
def test_a_patch_is_taken_or_refused_with_those_that_fit(
    method: str, patch: int, told: str | None, toy_cohort: Path, tmp_path: Path
) -> None:
    asked, said = recipe(method, data__patch=patch, generator__scale=1 / 16, discriminators__scale=1 / 16), list[str]()
    if told is None:
        assert plan_run(toy_cohort, asked, tmp_path, say=said.append).plan.patch == (patch, patch)
        assert any(line.startswith("warning: patches of") for line in said) == (patch > 40)
        return
    with pytest.raises(RecipeError, match=told):
        plan_run(toy_cohort, asked, tmp_path, say=str)


def test_valid_convolutions_train_under_discriminators_that_halve_what_is_left(
    toy_cohort: Path, tmp_path: Path
) -> None:
    changes = {"generator__network": "srcnn", "generator__scale": 1 / 16, "data__patch": "auto"}
    asked = recipe("A7", discriminators__local_widths=(4,) * 4, schedule__steps=8, training__validations=1, **changes)
    done = train(toy_cohort, asked, tmp_path, say=str)
    assert all((side - 12) % 8 == 0 for side in done.plan.patch)
    assert "4 voxels and multiples of 8" in done.plan.reasons["patch"]
