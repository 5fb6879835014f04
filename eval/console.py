"""The terminal output of a long run: numbered steps and the remaining time. All other output goes to a file."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Report:
    """Receives the progress of a run. This base class ignores it."""

    def start(self, steps: int) -> None:
        """Called at the start of a run, with its number of steps."""

    def step(self, name: str) -> None:
        """Called at the start of a step."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Called during a step."""

    def loss(self, step: int, loss: float) -> None:
        """Called with the training loss of a step when it is logged."""

    def end(self, result: str) -> None:
        """Called at the end of a step."""

    def note(self, text: str) -> None:
        """Called with a message to the user."""


class Console(Report):
    """Writes to the standard output at the time of its creation, even when [`output_to`] redirects it later.

    On a terminal, a step is a single line, which is updated. Otherwise, there is a line for each tenth of a step.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        self._live = self._out.isatty()
        self._open = False

    def start(self, steps: int) -> None:
        self._steps, self._number = steps, 0

    def step(self, name: str) -> None:
        self._number += 1
        self._name = name if self._steps == 1 else f"{self._number} of {self._steps}  {name}"
        self._began: tuple[float, int] | None = None
        self._tenth = 0
        self._write(f"{self._name} ...", over=True)

    def progress(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        # The estimate does not include the first item, which is slower than the others.
        first, self._began = self._began, self._began or (now, done)
        parts = [f"{done} of {total}", *([note] if note else [])]
        if first is not None and first[1] < done < total:
            parts.append(f"about {_duration((total - done) * (now - first[0]) / (done - first[1]))} left")
        text = ", ".join(parts)
        if self._live or done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            self._write(f"{self._name}: {text}", over=True)

    def end(self, result: str) -> None:
        self._write(f"{self._name}: {result}")

    def note(self, text: str) -> None:
        self._write(f"        {text}")

    def close(self) -> None:
        """Ends the current line."""
        if self._open:
            self._out.write("\n")
        self._out.close()

    def _write(self, text: str, over: bool = False) -> None:
        before = "\r\x1b[K" if self._live and self._open else ""
        self._open = self._live and over
        self._out.write(before + text + ("" if self._open else "\n"))
        self._out.flush()


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Context manager that redirects the standard output and error streams of the process, and appends them to a file.

    Redirects the file descriptors rather than `sys.stdout`, to which libraries may keep a reference.
    """
    with path.open("ab") as file:
        _flush()
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        try:
            for stream, _ in kept:
                os.dup2(file.fileno(), stream)
            yield
        finally:
            _flush()
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the disk may be full
            stream.flush()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
