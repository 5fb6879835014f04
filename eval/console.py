"""What a user sees of a long run: numbered steps and the time that is left. Everything else goes to a file."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Report:
    """Is told how a run goes, and keeps it to itself."""

    def start(self, steps: int) -> None:
        """A run of so many steps begins."""

    def step(self, name: str) -> None:
        """The next step begins."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """So much of the step is done."""

    def end(self, result: str) -> None:
        """The step has ended."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Console(Report):
    """Writes to the standard output as it was when this was made, also while [`output_to`] leads it elsewhere.

    On a terminal a step is one line that is written over; elsewhere, a line for each tenth of it.
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
        self._name = f"{self._number} of {self._steps}  {name}"
        self._began: tuple[float, int] | None = None
        self._tenth = 0
        self._write(f"{self._name} ...", over=True)

    def progress(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        # Nothing is known of how long one takes until one was seen to end; the first is slower than the others.
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
        """Leaves the cursor at the beginning of a line."""
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
    """Appends to a file what anything in this process writes to its standard output and error streams.

    The streams of the process, not `sys.stdout`: libraries keep those they found when they were imported.
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
