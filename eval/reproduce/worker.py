"""Makes one cell of a study. Engines call it in processes of their own, on this machine or on others."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trl_steer.files import FolderInUseError, remove

from .. import runs
from ..console import Report
from ..settings import Settings
from .results import CELLS, RUNNING

# Seconds between two attempts to lock a cell.
WAIT = 1.0


class Outcome(NamedTuple):
    """
    How the attempt to make a cell ended.

    Attributes:
        reason (`str`, *optional*): Why it failed, in one line. `None` if the cell is finished.
        diverged (`bool`): Whether training diverged.
    """

    reason: str | None = None
    diverged: bool = False


def make_cell(settings: Mapping[str, Any], key: str, folder: str) -> Outcome:
    """Makes the run of a cell in `running/<key>`, and renames it to `cells/<key>`. Continues an unfinished one.

    Args:
        settings (`dict`): The contents of its `settings.json`.
        key (`str`): Name of its folder.
        folder (`str`): Folder of the study.
    """
    partial, finished = Path(folder, RUNNING, key), Path(folder, CELLS, key)
    try:
        while not finished.is_dir():
            try:
                runs.make(Settings.from_dict(settings), partial, report=_Log())
            except runs.RunError as error:
                if not isinstance(error.__cause__, FolderInUseError):
                    raise
                time.sleep(WAIT)  # a worker whose driver was killed is about to end
            else:
                _rename(partial, finished)
    except Exception as error:
        from trl_steer.trainers.callbacks import TrainingDivergedError

        reason = " ".join(str(error).split()) or type(error).__name__
        return Outcome(reason, isinstance(error.__cause__, TrainingDivergedError))
    return Outcome()


def _rename(partial: Path, finished: Path) -> None:
    finished.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(partial, finished)
    except OSError:
        if not finished.is_dir():
            raise
        remove(partial)  # another worker was faster


class _Log(Report):
    """Writes the steps of a run to its log, to which its output goes."""

    def step(self, name: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)
