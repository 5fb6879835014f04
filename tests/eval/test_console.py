"""What a user sees of a long run, and what goes to its log."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from trl_steer.eval import console
from trl_steer.eval.console import Console


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_steps_are_numbered_and_say_how_much_time_is_left(seconds, capfd):
    shown = Console()
    shown.start(2)
    shown.step("Training")
    for done in range(1, 101):
        seconds[0] = done * 6.0
        shown.progress(done, 100, "loss 0.5")
    shown.end("done")
    shown.step("Scoring")
    shown.end("0.5")
    shown.close()
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "1 of 2  Training ..."
    assert lines[1] == "1 of 2  Training: 10 of 100, loss 0.5, about 9 min left"
    assert lines[9] == "1 of 2  Training: 90 of 100, loss 0.5, about 60 s left"
    assert lines[-3:] == ["1 of 2  Training: done", "2 of 2  Scoring ...", "2 of 2  Scoring: 0.5"]
    assert len(lines) == 14


def read_all(terminal) -> bytes:
    """What was written to the other side, which is closed; Linux calls that an error."""
    read = b""
    with suppress(OSError):
        while chunk := os.read(terminal, 1000):
            read += chunk
    return read


def test_on_a_terminal_a_step_is_one_line(monkeypatch):
    reader, terminal = os.openpty()
    monkeypatch.setattr(console.os, "dup", lambda _: terminal)
    shown = Console()
    shown.start(1)
    shown.step("Training")
    shown.progress(1, 2)
    shown.end("done")
    shown.close()
    assert read_all(reader).decode().replace("\r\n", "\n") == (
        "Training ...\r\x1b[KTraining: 1 of 2\r\x1b[KTraining: done\n"
    )


@pytest.mark.parametrize("error", ["", "; raise KeyboardInterrupt"])
def test_everything_else_goes_to_the_log_and_the_streams_are_given_back(error, tmp_path):
    code = f"""
import contextlib, logging, os, pathlib, sys
from trl_steer.eval.console import Console, output_to
library = logging.StreamHandler(sys.stderr)  # of one that was imported before
shown = Console()
with contextlib.suppress(KeyboardInterrupt), output_to(pathlib.Path("log")):
    print("printed")
    os.write(2, b"from C\\n")
    library.emit(logging.makeLogRecord({{"msg": "warned"}}))
    shown.note("for the user"){error}
print("after")
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["from C", "printed", "warned"]
    assert (shown.stdout, shown.stderr) == ("        for the user\nafter\n", "")
