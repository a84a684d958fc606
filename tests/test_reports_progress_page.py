"""`RUN/progress.html`: curves and pictures of a training that goes on, and what it costs others: nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import chiasm
from chiasm.errors import RunError
from chiasm.methods import make_recipe
from chiasm.reports.progress_page import ProgressPage
from conftest import QUICK


class Halt(Exception):
    """Ends a training in its middle."""


@pytest.fixture(scope="module")
def watched(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with its page, and the page as it was after each update."""
    folder, seen = tmp_path_factory.mktemp("watched") / "run", []

    class Kept(ProgressPage):
        def update(self, log: Path, step: int, steps: int) -> None:
            super().update(log, step, steps)
            seen.append((folder / "progress.html").read_text())

    said: list[str] = []
    chiasm.train(toy_cohort, make_recipe("A7", "tiny", QUICK), folder, say=said.append, watcher=Kept(folder))
    (folder / "said.txt").write_text("\n".join(said))
    return folder, seen


def validations(run: Path) -> list[int]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "validation"]


def test_the_page_is_there_from_the_start_and_grows_with_each_validation(watched: tuple[Path, list[str]]) -> None:
    run, seen = watched
    steps = validations(run)
    assert len(seen) == 1 + len(steps) and "step 0 of 24" in seen[0] and "Nothing was logged yet" in seen[0]
    for number, page in enumerate(seen):
        assert [int(step) for step in re.findall(r"<strong>step (\d+)</strong>", page)] == steps[:number][::-1]
    assert "Validation error" in seen[-1] and "min left" in seen[2]


def test_each_validation_is_said_beside_the_look_up_from_which_the_network_starts(
    watched: tuple[Path, list[str]],
) -> None:
    run, seen = watched
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    found = [line for line in lines if line["kind"] == "validation"]
    assert found[0]["mae"] == pytest.approx(found[0]["lookup_mae"], rel=0.02)  # nothing is learnt yet
    assert len({line["lookup_mae"] for line in found}) == 1 and "mask, look-up" in seen[-1]
    said = [line for line in (run / "said.txt").read_text().splitlines() if "validation error" in line]
    first = (
        f"before training: validation error {found[0]['mae']:.3f} (look-up {found[0]['lookup_mae']:.3f}), in lesions"
    )
    assert said[0].startswith(first) and len(said) == len(found)
    assert said[-1].startswith(f"step 24: validation error {found[-1]['mae']:.3f} (look-up ")


def test_it_refreshes_itself_until_the_training_is_done_and_asks_for_nothing_else(
    watched: tuple[Path, list[str]],
) -> None:
    _, seen = watched
    assert all('http-equiv="refresh"' in page for page in seen[:-1]) and 'http-equiv="refresh"' not in seen[-1]
    assert "The training is done" in seen[-1]
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', seen[-1])


def test_the_pictures_show_source_real_synthetic_and_error_side_by_side(watched: tuple[Path, list[str]]) -> None:
    from matplotlib.image import imread

    run, _ = watched
    pictures = sorted((run / "progress").glob("*.png"))
    assert [path.name for path in pictures] == [f"step-{step:08d}.png" for step in validations(run)]
    first, last = (imread(path)[..., 0] for path in (pictures[0], pictures[-1]))
    panes = np.split(last, 4, axis=1)
    assert all(pane.std() > 0 for pane in panes)
    assert np.array_equal(np.split(first, 4, axis=1)[1], panes[1])  # the real image stays
    assert not np.array_equal(np.split(first, 4, axis=1)[2], panes[2])


def test_a_training_that_is_watched_learns_the_same(watched: tuple[Path, list[str]], finished_run: Path) -> None:
    run, _ = watched
    for name in ("log.jsonl", "model/weights.safetensors"):
        assert (run / name).read_bytes() == (finished_run / name).read_bytes()


def test_a_resumed_run_keeps_the_pictures_of_before(toy_cohort: Path, tmp_path: Path) -> None:
    recipe = make_recipe("A1", "tiny", QUICK)

    def stop(step: int, steps: int, values: object) -> None:
        if step == 20:
            raise Halt

    with pytest.raises(Halt):
        chiasm.train(toy_cohort, recipe, tmp_path, say=lambda _: None, progress=stop, watcher=ProgressPage(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "progress").glob("*.png")}
    chiasm.train(toy_cohort, recipe, tmp_path, say=lambda _: None, watcher=ProgressPage(tmp_path))
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "progress").glob("*.png")}
    assert before and before.items() < after.items()
    page = (tmp_path / "progress.html").read_text()
    assert all(f"<strong>step {step}</strong>" in page for step in validations(tmp_path))


def test_somebody_elses_page_is_not_replaced(toy_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "progress.html").write_text("mine")
    with pytest.raises(RunError, match=r"progress.html, which was not written by chiasm"):
        chiasm.train(toy_cohort, make_recipe("A1", "tiny", QUICK), tmp_path, say=lambda _: None)
