"""What asks a command to stop, and what is let go then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chiasm.locks import locked
from chiasm.stopping import Stopped, stoppable, stopping_signals
from chiasm.storage import whole_file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_command_that_is_asked_to_stop_leaves_no_lock_and_no_temporary(number: int, tmp_path: Path) -> None:
    outside = signal.signal(number, signal.SIG_DFL)  # also where the tests run under nohup
    with pytest.raises(Stopped) as caught, stoppable(), locked(tmp_path), whole_file(tmp_path / "plan.toml") as file:
        file.write_text("half")
        os.kill(os.getpid(), number)
        pytest.fail("went on")
    assert caught.value.code == 128 + number and not list(tmp_path.iterdir())
    assert signal.signal(number, outside) == signal.SIG_DFL


def test_a_command_that_ignores_a_closed_terminal_goes_on_ignoring_it() -> None:
    program = (
        "import os, signal\nfrom chiasm.stopping import stoppable, stopping_signals\n"
        "assert signal.SIGHUP not in stopping_signals()\n"
        "with stoppable():\n    os.kill(os.getpid(), signal.SIGHUP)\nprint('went on')\n"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "went on" in done.stdout
    assert signal.SIGHUP in stopping_signals() or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
