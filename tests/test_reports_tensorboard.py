"""TensorBoard beside the log: the same numbers, also where a training goes on, and nothing that is read."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import chiasm.reports.tensorboard as module
from chiasm.errors import ChiasmError, RecipeError
from chiasm.prediction.passes import Maps
from chiasm.reports.tensorboard import TensorBoard, Watchers, watch_run
from full_disk import no_file_above
from learning import textured_case

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def log_lines(path: Path, steps: range) -> None:
    with path.open("a") as log:
        for step in steps:
            log.write(json.dumps({"kind": "step", "step": step, "generator": 1 / (1 + step)}) + "\n")
        log.write(json.dumps({"kind": "validation", "step": steps[-1], "mae": 0.5 - 0.01 * steps[-1]}) + "\n")
        log.write(json.dumps({"kind": "warning", "step": steps[-1], "message": "look"}) + "\n")


def events(run: Path) -> object:
    found = accumulator.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def scalars(run: Path, tag: str) -> dict[int, float]:
    return {event.step: round(event.value, 5) for event in events(run).Scalars(tag)}  # type: ignore[attr-defined]


def test_tensorboard_shows_the_log_and_what_a_resumed_training_does_again_only_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    first = TensorBoard(tmp_path)
    log_lines(log, range(1, 5))
    first.update(log, 4, 10)
    log_lines(log, range(5, 8))
    first.update(log, 7, 10)
    assert scalars(tmp_path, "step/generator") == {step: round(1 / (1 + step), 5) for step in range(1, 8)}
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= 5]
    log.write_text("\n".join(kept) + "\n")  # the last checkpoint was at step 5
    second = TensorBoard(tmp_path)
    second.update(log, 5, 10)
    log_lines(log, range(6, 11))
    second.update(log, 10, 10)
    assert sorted(scalars(tmp_path, "step/generator")) == list(range(1, 11))
    assert scalars(tmp_path, "validation/mae")[10] == pytest.approx(0.4)
    assert events(tmp_path).Tags()["scalars"] == ["step/generator", "validation/mae"]  # type: ignore[attr-defined]


def test_a_slice_of_each_validation_is_shown(tmp_path: Path) -> None:
    case = textured_case(1)
    maps = Maps(np.asarray(case.target) * 0.5, None, None, None, None)
    board = TensorBoard(tmp_path)
    for step in (3, 3, 6):
        board.picture(step, case, maps)
    board.update(tmp_path / "log.jsonl", 6, 6)
    images = events(tmp_path).Images("validation/source, real, synthetic, error")  # type: ignore[attr-defined]
    assert [image.step for image in images] == [3, 6] and images[0].width == 4 * 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_full_disk_is_named_with_the_folder(tmp_path: Path) -> None:
    log_lines(tmp_path / "log.jsonl", range(1, 500))
    place, before = re.escape(str(tmp_path / "tensorboard")), {*threading.enumerate()}
    with no_file_above(1000), pytest.raises(ChiasmError, match=rf"{place}: cannot be written.*MiB free"):
        TensorBoard(tmp_path).update(tmp_path / "log.jsonl", 1, 2)
    for thread in {*threading.enumerate()} - before:
        thread.join()


def test_without_tensorboard_the_page_alone_watches_and_asking_for_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(watch_run(tmp_path, tensorboard=True), Watchers)
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert not isinstance(watch_run(tmp_path, tensorboard=False), Watchers)
    with pytest.raises(RecipeError, match=r"pip install 'chiasm\[tensorboard\]'"):
        watch_run(tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())
