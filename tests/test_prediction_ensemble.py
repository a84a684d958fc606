"""Several models as one: their mean, their spread, and what of them must agree."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pydicom
import pytest
import torch

import chiasm
from chiasm.checksums import sha256_of, with_checksum, without_checksum
from chiasm.cli import main
from chiasm.errors import ChiasmError, CohortError, RecipeError, RunError
from chiasm.evaluation.rows import read_evaluation
from chiasm.prediction.engines import Engine
from chiasm.prediction.ensemble import Moments, average_models, shared_warnings
from chiasm.prediction.export import export
from chiasm.prediction.folders import predict
from chiasm.prediction.inputs import part_runs
from chiasm.prediction.manifest import read_manifest
from chiasm.prediction.model import load_model, save_model
from chiasm.prediction.synthesis import synthesise
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.out_of_distribution import BEGINNING
from chiasm.serving.server import Page, serve
from chiasm.volumes import read_volume
from conftest import Sibling
from dicom_patients import faults, write_source
from synthetic_cohort import pair

ENGINE = Engine(torch.device("cpu"), "32-true")


def chiasm_command(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(map(str, words)))
    return int(cast(int, done.value.code) or 0)


def test_several_runs_give_their_mean_their_spread_and_the_mean_of_their_expected_errors(
    toy_cohort: Path, finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    runs = [finished_run, sibling("b"), sibling("c", -0.03)]
    file = toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz"
    alone = [chiasm.load(run).predict(file) for run in runs]
    mean = chiasm.load(runs).predict(file)
    images, errors = (np.stack([getattr(one, name).array for one in alone]) for name in ("image", "expected_error"))
    inside = mean.mask.array
    assert inside.any() and mean.spread is not None and mean.expected_error is not None
    np.testing.assert_allclose(mean.image.array[inside], images.mean(0)[inside], rtol=1e-5)
    np.testing.assert_allclose(mean.spread.array[inside], images.std(0, ddof=1)[inside], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(mean.expected_error.array[inside], errors.mean(0)[inside], rtol=1e-5)
    assert (mean.spread.array[~inside] == 0).all() and mean.spread.array[inside].max() > 0
    assert all(one.spread is None for one in alone)


def test_the_expected_error_of_a_mean_is_not_below_its_error_where_each_is_right() -> None:
    """Triangle inequality: on any data, |mean - truth| is at most the mean of |model - truth|."""
    images = np.random.default_rng(0).normal(size=(5, 1000))
    assert (np.abs(images.mean(0)) <= np.abs(images).mean(0) + 1e-12).all()
    moments = Moments()
    for image in images:
        moments.add(image)
    np.testing.assert_allclose(moments.mean, images.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.spread(), images.std(0, ddof=1), rtol=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        Moments().spread()


def test_models_of_other_scales_are_averaged_in_the_unit_of_the_first(toy_cohort: Path, finished_run: Path) -> None:
    """The same network whose training images were ten times as bright says the same in normalised units."""
    model = load_model(finished_run)
    plan = model.plan
    ten = IntensityMap(
        plan.target_kind, tuple(10 * x for x in plan.target_reference.values), plan.target_reference.normalised
    )
    low, high = plan.target_range
    bright = replace(model, plan=replace(plan, target_reference=ten, target_range=(10 * low, 10 * high)))
    volume = read_volume(toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz")
    single, mean = synthesise(model, [volume], engine=ENGINE), average_models([model, bright], [volume], engine=ENGINE)
    most = float(np.ptp(single.image.array))
    np.testing.assert_allclose(mean.image.array, single.image.array, atol=1e-5 * most)
    assert single.expected_error is not None and mean.expected_error is not None and mean.spread is not None
    np.testing.assert_allclose(mean.expected_error.array, single.expected_error.array, rtol=1e-4)
    assert mean.spread.array.max() < 1e-4 * most
    without = average_models([model, replace(model, local_discriminator=None)], [volume], engine=ENGINE)
    assert without.expected_error is None and any("1 of 2 models" in sentence for sentence in without.warnings)


def test_models_warn_once_of_an_input_out_of_distribution_as_the_one_that_found_most() -> None:
    body, times = "a brain or body of 9 x 9 x 9 mm", [f"a histogram of t1 that is {n} times as far" for n in (9.5, 12)]
    found = ([times[0]], [body, times[0]], [times[1]])
    odd = [f"{BEGINNING}: it has {', and '.join(findings)}" for findings in found]
    assert shared_warnings([[one, "b"] for one in odd]) == [odd[1], "b"]
    assert shared_warnings([["b"], [odd[0]], [odd[1]]]) == ["model 1: b", f"model 2, 3: {odd[1]}"]


def test_a_folder_of_means_names_its_models_goes_on_and_is_evaluated(
    toy_cohort: Path, finished_run: Path, sibling: Sibling, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = [finished_run, sibling("b")], tmp_path / "out"
    words = ["predict", *runs, toy_cohort / "Toy_0001", toy_cohort / "Toy_0002", "-o", out]
    assert chiasm_command(*words) == 0
    manifest = read_manifest(out)
    cards = [sha256_of(run / "model" / "model.toml") for run in runs]
    assert [member.sha256 for member in manifest.models] == cards
    assert [(out / member.model).resolve() for member in manifest.models] == [(run / "model").resolve() for run in runs]
    assert manifest.sha256 == hashlib.sha256("\n".join(cards).encode()).hexdigest()
    assert manifest.method == "mean-of-2-A7" and "mean" in str(manifest.options["expected-error"])
    assert all((out / str(entry.spread)).is_file() and entry.spread in entry.sha256 for entry in manifest.cases)
    (out / str(manifest.cases[0].spread)).unlink()  # as after a kill
    capsys.readouterr()
    assert chiasm_command(*words) == 0
    told = "".join(capsys.readouterr())
    assert "1 case predicted, 1 were there already" in told and "Toy_0001: its files had changed" in told
    assert chiasm_command("inspect", out) in (0, 3)
    assert chiasm_command("evaluate", out, toy_cohort, "-o", tmp_path / "evaluation") == 0
    report = (tmp_path / "evaluation" / "report.html").read_text()
    assert "mean-of-2-A7" in report and "spread of the models" in report and "it has a range of its own" in report
    ranked = [row for row in read_evaluation(tmp_path / "evaluation") if row.metric == "spread_spearman"]
    assert sorted(row.case for row in ranked) == sorted(entry.case for entry in manifest.cases)
    mean = np.mean([row.value for row in ranked])
    assert f"The spread of the models orders voxels by error with a rank correlation of {mean:.2f}." in report
    assert "mean-of-2-A7, the first of them dual-attention (A7) of size tiny" in report
    assert 'id="pane-spread"' in (tmp_path / "evaluation" / "cases" / f"{ranked[0].case}.html").read_text()
    with pytest.raises(RunError, match="made with other settings"):
        predict([runs[1], runs[0]], [toy_cohort / "Toy_0001"], out)
    with pytest.raises(RunError, match="made with other settings"):
        predict(finished_run, [toy_cohort / "Toy_0001"], out)


def test_as_dicom_the_spread_is_a_parametric_map_that_names_all_models(
    finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    write_source(tmp_path / "in" / "p1", np.rint(pair(1, 5.0)[0]).astype(np.int16), spacing=(1.0, 1.0, 3.0))
    runs = [finished_run, sibling("b")]
    made = predict(runs, [tmp_path / "in"], tmp_path / "out", container="dicom")
    (entry,) = made.manifest.cases
    assert entry.spread == "p1/spread.dcm" and faults(tmp_path / "out" / entry.spread) == []
    written = pydicom.dcmread(tmp_path / "out" / entry.spread)
    assert written.ContentLabel == "SPREAD" and made.manifest.sha256 in written.DerivationDescription
    assert predict(runs, [tmp_path / "in"], tmp_path / "out", container="dicom").kept == ("p1",)


def test_what_one_of_the_models_learnt_from_is_no_test_case(
    toy_cohort: Path, finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    split = without_checksum(json.loads((finished_run / "splits.json").read_text()))
    moved = split["test"].pop()
    split["train"].append(moved)
    (tmp_path / "splits.json").write_text(json.dumps(with_checksum(split)))
    other = sibling("b", splits=tmp_path / "splits.json")
    tested = predict([finished_run, other], [toy_cohort], tmp_path / "out", only="test").manifest.cases
    assert split["test"] == [entry.case for entry in tested] != []
    entry = predict([other, finished_run], [toy_cohort / moved], tmp_path / "one").manifest.cases[0]
    assert (entry.case, entry.role) == (moved, "train")


def test_models_that_do_not_agree_are_refused_before_anything_is_written(
    toy_cohort: Path, finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for changes, word in (
        ({"target": "flair"}, "target"),
        ({"target_kind": "zscore"}, "intensity convention of the target"),
        ({"mask_rule": "body"}, "rule for the mask"),
    ):
        other = sibling("other", **changes)
        with pytest.raises(RunError, match=word) as caught:
            predict([finished_run, other], [toy_cohort], out)
        assert str(other) in str(caught.value) and not out.exists()
    with pytest.raises(RunError, match="same model"):
        chiasm.load([finished_run, finished_run / "model"])


def test_models_of_other_averages_are_refused_alike_until_somebody_says_which(
    toy_cohort: Path, finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    model = load_model(sibling("flipped"))
    generator = model.recipe.generator.model_copy(update={"average": "flip"})
    recipe = model.recipe.model_copy(update={"generator": generator})
    save_model(tmp_path / "flipped", replace(model, recipe=recipe), {})
    runs, out = [finished_run, tmp_path / "flipped"], tmp_path / "out"
    asked: dict[str, Callable[[], object]] = {
        "predict": lambda: predict(runs, [toy_cohort], out),
        "load": lambda: chiasm.load(runs),
        "serve": lambda: serve(runs, page=Page(port=0)),
        "export": lambda: export(runs, out, "torch"),
    }
    for ask in asked.values():
        with pytest.raises(RunError, match=r"different averages of mirror images \(found none, flip\)"):
            ask()
    assert not [path for path in out.rglob("*") if path.name != ".lock"]
    with pytest.raises(RecipeError, match=r"average.*twice"):
        serve(runs, page=Page(port=0), loading=partial(chiasm.load, average="twice"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ChiasmError, match="cannot listen on"):
        serve(runs, page=Page(port=taken.getsockname()[1]), loading=partial(chiasm.load, average="none"))
    source = next(toy_cohort.rglob("*_t1.nii.gz"))
    plain, flipped = chiasm.load(runs, average="none"), chiasm.load(runs, average="flip")
    once, twice = plain.predict(source).image.array, flipped.predict(source).image.array
    assert np.abs(once - twice).max() > 0
    np.testing.assert_array_equal(plain.predict(source, average="flip").image.array, twice)


def test_runs_stand_before_scans_on_the_command_line(toy_cohort: Path, finished_run: Path) -> None:
    model = finished_run / "model"
    assert part_runs([finished_run, model, toy_cohort]) == ([finished_run, model], [toy_cohort])
    assert part_runs([finished_run, toy_cohort, toy_cohort]) == ([finished_run], [toy_cohort, toy_cohort])
    assert part_runs([toy_cohort, toy_cohort]) == ([toy_cohort], [toy_cohort])
    with pytest.raises(CohortError, match="no scans are named"):
        part_runs([finished_run, model])
