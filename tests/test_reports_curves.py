"""The curves of a report are those that a training logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.methods import make_recipe
from chiasm.reports.curves import PANELS, Curve, collect_points, draw_curves, read_history
from chiasm.training.run import train
from conftest import QUICK


@pytest.fixture(scope="module")
def refined_run(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both of what `finished_run` lacks: a refiner, and a second discriminator of whole images."""
    folder = tmp_path_factory.mktemp("runs") / "refined"
    more = {"generator.refiner": (4, 8), "discriminators.second_global": True}
    train(toy_cohort, make_recipe("A15", "tiny", {**QUICK, **more}), folder, say=lambda _: None)
    return folder


def test_every_curve_of_a_report_is_one_that_a_training_logs(finished_run: Path, refined_run: Path) -> None:
    curves = {curve for panel in PANELS for curve in panel.curves.values()}
    logs = [read_history(run / "log.jsonl") for run in (finished_run, refined_run)]
    logged = {Curve(line["kind"], name) for log in logs for line in log for name in line}
    assert curves <= logged
    assert len(draw_curves(logs[1])) == len(PANELS)


def test_a_curve_goes_through_the_logged_figures_and_a_long_one_through_means_of_blocks() -> None:
    line = [{"kind": "step", "step": n, "loss": float(n % 2)} for n in range(400)]
    assert collect_points(line[:3], Curve("step", "loss")).tolist() == [[0, 0], [1, 1], [2, 0]]
    assert collect_points(line, Curve("validation", "loss")).shape == (0, 2)
    assert collect_points(line, Curve("step", "loss"))[:2].tolist() == [[0.5, 0.5], [2.5, 0.5]]  # 200 blocks of two
