"""Every odd file of the corpus is read right or refused with its reason, soon and cheaply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import ChiasmError
from chiasm.prediction.manifest import read_manifest
from chiasm.volumes import check_pair, read_volume
from odd_files import CORPUS, Odd
from odd_series import SERIES

SECONDS = 2.0
MEGABYTES = 300.0
EVERY = (*CORPUS, *SERIES)
HOSTILE = [odd for odd in EVERY if odd.hostile]


def meet(odd: Odd, path: Path) -> None:
    """Read it as a command would, and compare what is found with what is there."""
    if odd.kind == "cohort":
        find_cohort(path)
    elif odd.kind == "predictions":
        read_manifest(path)
    elif odd.kind == "pair":
        a, b = (read_volume(path / name) for name in ("a.nii", "b.nii"))
        np.testing.assert_array_equal(check_pair(a, b).array, odd.array)
    else:
        volume = read_volume(path, odd.labels, **odd.options)
        assert odd.array is not None or odd.reasons
        if odd.array is not None:
            np.testing.assert_allclose(volume.array, odd.array.astype(np.float32), rtol=2e-7)
            np.testing.assert_allclose(volume.geometry.affine, odd.affine, atol=2e-5)


@pytest.mark.parametrize("odd", [odd for odd in EVERY if not odd.hostile], ids=lambda odd: odd.name)
def test_an_odd_file_is_read_right_or_refused_with_its_reason(odd: Odd, tmp_path: Path) -> None:
    path = odd.write(tmp_path)
    start = time.process_time()
    if odd.reasons:
        with pytest.raises(ChiasmError) as caught:
            meet(odd, path)
        assert caught.value.reason in odd.reasons, caught.value
        assert str(caught.value).endswith((".", "?")) and (caught.value.path is not None or odd.kind == "pair")
    else:
        meet(odd, path)
    assert time.process_time() - start < SECONDS


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("odd", HOSTILE, ids=lambda odd: odd.name)
def test_a_hostile_file_is_refused_in_two_seconds_and_300_megabytes(odd: Odd, tmp_path: Path) -> None:
    path = odd.write(tmp_path)
    program = (
        "import json, re, sys, time\nfrom chiasm.errors import VolumeError\nfrom chiasm.volumes import read_volume\n"
        "start, reason = time.process_time(), None\n"
        "try:\n    read_volume(sys.argv[1])\nexcept VolumeError as error:\n    reason = error.reason\n"
        "seconds = time.process_time() - start\n"
        "most = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "print(json.dumps([reason, seconds, int(most[1]) / 1024]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason, seconds, megabytes = json.loads(done.stdout)
    assert reason in odd.reasons
    assert seconds < SECONDS and megabytes < MEGABYTES


def test_the_corpus_is_large_and_its_names_are_its_own() -> None:
    assert len({odd.name for odd in EVERY}) == len(EVERY) >= 150
    assert {odd.rule for odd in EVERY} == set(range(1, 11))


def test_the_corpus_is_the_same_each_time(tmp_path: Path) -> None:
    for odd in CORPUS[::40]:
        contents = []
        for turn in ("a", "b"):
            folder = tmp_path / f"{turn}-{odd.name.replace('/', '_')[:40]}"
            folder.mkdir()
            path = odd.write(folder)
            contents.append(path.read_bytes() if path.is_file() else b"")
        assert contents[0] == contents[1], odd.name


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.nii"
    path.touch(0o000)
    with pytest.raises(ChiasmError) as caught:
        read_volume(path)
    assert caught.value.reason == "unreadable"
