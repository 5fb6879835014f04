"""The checkpoints of a training run."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def newest_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The last complete checkpoint of a run, or `None`. Warns about incomplete ones, which a killed process leaves.

    A checkpoint is complete if it has the trainer's state, which is written last.
    """
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match is None or not path.is_dir():
            continue
        if state_of(path) is None:
            logger.warning(f"Skipping {path}, which is incomplete.")
        else:
            found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None


def state_of(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint, or `None` if it is missing or cannot be read."""
    try:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def is_finished(checkpoint: str | os.PathLike, args: Any) -> bool:
    """Whether a checkpoint is that of the last step of the training arguments. If it is, resuming from it with the
    trainer would train for one more step."""
    state = state_of(checkpoint)
    if state is None:
        return False
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    same = state.get("num_train_epochs") == math.ceil(args.num_train_epochs)
    return same and state["global_step"] >= state.get("max_steps", math.inf)
