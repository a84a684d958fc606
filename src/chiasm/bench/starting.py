"""Rows about starting: what a command takes before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys

from chiasm.bench.rows import BenchRow, BenchSetting, TimedPair


def help_beside_monai(setting: BenchSetting) -> TimedPair:
    """Show the help of a command, beside the import that every script of MONAI begins with."""
    del setting

    def run(*words: str) -> int:
        return subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode

    def clock() -> float:
        used = os.times()
        return used.children_user + used.children_system

    return TimedPair(
        lambda: run("-m", "chiasm", "train", "--help"),
        lambda: run("-c", "import monai"),
        lambda a, b: float(a != 0 or b != 0),
        0.0,
        clock=clock,
    )


ROWS = (
    BenchRow(
        "start-help",
        "show the help of `chiasm train`, a process from its start to its end",
        "a process that imports monai",
        10.0,
        10.0,
        help_beside_monai,
        needs=("monai",),
        equal="both end well",
    ),
)
