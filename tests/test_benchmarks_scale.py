"""The cohorts on which growth is measured: as many people as cases, and the same ones each time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from chiasm.bench.subjects import draw_pictures
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.duplicates import find_near_duplicates, thumbnail
from chiasm.volumes import Volume, read_volume

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale

SHAPE = (48, 56, 40)


def test_copies_of_few_drawn_pairs_count_as_no_scan_twice() -> None:
    bases = [draw_pictures(SHAPE, seed) for seed in range(scale.BASES)]
    pairs = [scale.copy_pair(bases[number % scale.BASES], SHAPE, number) for number in range(40)]
    for side in (0, 1):
        views = {f"{n:02d}": thumbnail(Volume(pair[side], bases[0].geometry)) for n, pair in enumerate(pairs)}
        assert find_near_duplicates(views) == []
        again = {**views, "copy": thumbnail(Volume(pairs[7][side].astype(np.float32) * 1.1, bases[0].geometry))}
        assert [found[:2] for found in find_near_duplicates(again)] == [("07", "copy")]


def test_a_cohort_is_read_as_so_many_people_and_is_the_same_when_it_is_written_again(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "other"):
        scale.write_cohort(folder, (24, 28, 8), 6)
    cohort = find_cohort(tmp_path / "one")
    assert len({case.subject for case in cohort.cases}) == len(cohort.cases) == 6
    for case in cohort.cases:
        for path in case.images.values():
            twin = tmp_path / "other" / path.relative_to(tmp_path / "one")
            np.testing.assert_array_equal(read_volume(path).array, read_volume(twin).array)
    assert {*cohort.cases[0].images} == {"t1", "t2"}
