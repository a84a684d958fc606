"""How often a command unpacks each image: once to examine it, once more to prepare it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

import chiasm
from chiasm.methods import make_recipe
from chiasm.volumes import streams
from conftest import QUICK


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Files whose content was unpacked, and how often, wherever that function was imported."""
    counts: Counter[Path] = Counter()
    unpack = streams.blocks

    def counted(stream: streams.Stream):  # type: ignore[no-untyped-def]
        counts[stream.path.resolve()] += 1
        return unpack(stream)

    for module in [module for name, module in sys.modules.items() if name.startswith("chiasm.")]:
        if getattr(module, "blocks", None) is unpack:
            monkeypatch.setattr(module, "blocks", counted)
    return counts


def test_each_image_is_unpacked_once_and_twice_by_training(
    toy_cohort: Path, tmp_path: Path, unpacked: Counter[Path]
) -> None:
    from chiasm.preparation.inspection import inspect_folder

    recipe = make_recipe("A7", "tiny", QUICK)
    steps = {
        "inspect": (1, lambda: inspect_folder(toy_cohort, ["t1"], "t2")),
        "plan": (1, lambda: chiasm.plan(toy_cohort, recipe, tmp_path / "plan", say=lambda _: None)),
        "train": (2, lambda: chiasm.train(toy_cohort, recipe, tmp_path / "run", say=lambda _: None)),
        "predict": (1, lambda: chiasm.predict(tmp_path / "run", [toy_cohort], tmp_path / "made")),
        "evaluate": (1, lambda: chiasm.evaluate(tmp_path / "made", toy_cohort, tmp_path / "scores")),
    }
    for name, (most, do) in steps.items():
        unpacked.clear()
        do()
        assert len(unpacked) >= 6 and max(unpacked.values()) == most, (name, unpacked.most_common(3))
