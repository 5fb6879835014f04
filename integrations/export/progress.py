"""The progress of an export, on the standard error stream."""

from __future__ import annotations

import sys

import rich.progress
from rich.console import Console


class Progress:
    """A context manager that shows a line for each step, with a bar where its length is known. Not on a terminal, it
    prints the name of each step."""

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        self._is_live = console.is_terminal
        self._bars = rich.progress.Progress(console=console, transient=True, disable=not self._is_live)
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bars.stop()

    def step(self, name: str) -> None:
        """Called at the start of a step."""
        if not self._is_live:
            print(f"{name} ...", file=sys.stderr, flush=True)
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(name, total=None)

    def update(self, done: int, total: int) -> None:
        """Called during a step, with the number of parts that are done, and that of all."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
