"""Names of version 0.1 in files and commands are still read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chiasm.checksums import with_checksum
from chiasm.cli import make_app
from chiasm.cohorts.splits import Split, read_splits
from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.prediction.inputs import Inputs, choose_role
from chiasm.prediction.manifest import Entry, Manifest, read_manifest, write_manifest
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.registration.cohort import aligned_images, farthest_mm
from chiasm.storage import write_json, write_text, write_toml
from chiasm.studies.study_file import read_study
from synthetic_cohort import write_cohort

STUDY = 'data = "nowhere"\nsource = ["t1"]\ntarget = "t2"\narms = ["A1"]\n'
OLD: dict[str, Callable[[Recipe], bool]] = {
    "split.sealed=0.2": lambda recipe: recipe.split.locked == 0.2,
    "attention.target=realness": lambda recipe: recipe.attention.head == "realness",
    "loss.critic_steps=5": lambda recipe: recipe.loss.discriminator_steps == 5,
    "schedule.critics_alone=0.3": lambda recipe: recipe.schedule.discriminators_alone == 0.3,
}


@pytest.mark.parametrize("setting", OLD)
def test_a_setting_is_read_by_its_old_name(setting: str) -> None:
    assert OLD[setting](make_recipe("A7", "tiny", None, [setting]))


def test_a_recipe_of_version_0_1_is_read_with_its_checksum(tmp_path: Path) -> None:
    recipe = make_recipe("A7", "tiny", {"split.locked": 0.25, "schedule.discriminators_alone": 0.2})
    content = recipe.model_dump(mode="json")
    content["split"]["sealed"] = content["split"].pop("locked")
    content["attention"]["target"] = content["attention"].pop("head")
    content["schedule"]["critics_alone"] = content["schedule"].pop("discriminators_alone")
    content["loss"]["critic_steps"] = content["loss"].pop("discriminator_steps")
    write_toml(tmp_path / "old.toml", with_checksum(content))
    assert read_recipe(tmp_path / "old.toml") == recipe
    write_recipe(tmp_path / "new.toml", recipe)
    assert not {"sealed", "critics_alone", "critic_steps"} & set((tmp_path / "new.toml").read_text().split())


def test_a_setting_by_its_old_name_is_still_checked() -> None:
    with pytest.raises(RecipeError, match=r"split\.locked"):
        make_recipe("A7", "tiny", None, ["split.sealed=1"])
    with pytest.raises(RecipeError, match="is no switch"):
        make_recipe("A7", "tiny", None, ["loss.critic_steps=true"])


def test_a_study_of_version_0_1_is_read(tmp_path: Path) -> None:
    write_text(tmp_path / "old.toml", f'{STUDY}reliability = "A1"\nsealed = 0.2\n')
    study = read_study(tmp_path / "old.toml")
    assert (study.expected_error, study.locked) == ("A1", 0.2)
    assert study.model_dump(by_alias=True).keys().isdisjoint({"reliability", "sealed"})


def test_a_split_of_version_0_1_is_read_with_its_locked_test_set(tmp_path: Path) -> None:
    facts = {name: {"subject": name, "site": None, "voxels": None} for name in "abcd"}
    old = {"train": ["a"], "validation": ["b"], "test": ["c"], "sealed": ["d"], "cases": facts}
    write_json(tmp_path / "splits.json", with_checksum(old))
    assert read_splits(tmp_path / "splits.json").split == Split(("a",), ("b",), ("c",), ("d",))


def test_predictions_of_version_0_1_are_read(tmp_path: Path) -> None:
    entry = Entry("a", "locked", ("../a_t1.nii.gz",), "a_t2.nii.gz", "a_mask.nii.gz", "a_expected-error.nii.gz", ())
    manifest = Manifest("../model", "0" * 64, "A7", 0, 0, ("t1",), "t2", "a.u.", (entry,), ())
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    content = asdict(manifest)
    content["cases"][0]["reliability"] = content["cases"][0].pop("expected_error")
    content["cases"][0]["role"] = "sealed"
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    assert read_manifest(tmp_path) == manifest


def test_a_role_is_chosen_by_its_old_name(tmp_path: Path) -> None:
    case = write_cohort(tmp_path, 1).cases[0]
    found = Inputs([case], [], [])
    assert choose_role(found, "sealed", {case.id: "locked"}, tmp_path, []).cases == [case]


def test_the_locked_test_set_is_opened_by_the_old_option_which_help_does_not_list(tmp_path: Path) -> None:
    write_text(tmp_path / "study.toml", STUDY)
    for option in ("--open-sealed", "--open-locked"):
        shown = CliRunner().invoke(
            make_app(), ["study", str(tmp_path / "study.toml"), "-o", str(tmp_path / "out"), option]
        )
        assert "has no locked test set" in str(shown.exception)
    assert "--open-sealed" not in CliRunner().invoke(make_app(), ["study", "--help"]).output


def test_a_registration_of_version_0_1_is_read() -> None:
    facts = {"t2": {"mean_displacement_mm": 2.0}, "flair": {"mean_displacement_mm": 3.5}}
    for record in ({"aligned": facts}, {"brought": facts}):
        assert aligned_images(record) == facts and farthest_mm(record) == 3.5
