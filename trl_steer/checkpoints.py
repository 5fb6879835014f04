"""The checkpoints of a training run."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def newest_complete_checkpoint(
    output_dir: str | os.PathLike, mark: str | None = None, skip: Callable[[Path], object] | None = None
) -> Path | None:
    """The last complete checkpoint of a run, or `None`.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the checkpoints.
        mark (`str`, *optional*): Name of a file that is written last. A complete checkpoint has it and the trainer's
            state, which otherwise is the last one.
        skip (`Callable`, *optional*): Called with each incomplete checkpoint, which a killed process leaves. Default:
            logs a warning.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    newest = None
    for path in sorted(found, key=step_of):  # type: ignore[arg-type]
        if state_of(path) is not None and (mark is None or (path / mark).is_file()):
            newest = path
        else:
            (skip or _warn)(path)
    return newest


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint, or `None` if it is not the name of one."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def state_of(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint, or `None` if it is missing or cannot be read."""
    try:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def is_finished(checkpoint: str | os.PathLike, args: Any = None) -> bool:
    """Whether a checkpoint is that of the last step of the training arguments, by default those that it was saved
    with. If it is, resuming from it with the trainer would train for one more step."""
    state = state_of(checkpoint)
    if state is None:
        return False
    if args is not None and args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    same = args is None or state.get("num_train_epochs") == math.ceil(args.num_train_epochs)
    return same and state["global_step"] >= state.get("max_steps", math.inf)


def _warn(checkpoint: Path) -> None:
    logger.warning(f"Skipping {checkpoint}, which is incomplete.")
