"""Programs that get a signal at the moment at which they have written a file, however busy the machine is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = """
import os
from pathlib import Path
from sys import argv

replace, (sign, number) = os.replace, argv[1:3]
del argv[1:3]

def struck(source, target, *more, **named):
    replace(source, target, *more, **named)
    if Path(target).match(sign):
        os.replace = replace  # once
        os.kill(os.getpid(), int(number))

os.replace = struck
"""


def run_struck(
    program: str, words: Sequence[str | Path], sign: Path, number: int, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program of Python that gets a signal when the first file whose path is like `sign` is in its place."""
    command = [sys.executable, "-c", PROGRAM + program, sign, str(int(number)), *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
