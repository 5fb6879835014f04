"""Runs on a tiny model, which take a second or two, and how they end when they are killed."""

import os
import random
import signal
import sys
from pathlib import Path

from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer.eval import runs
from trl_steer.eval.demo import preset
from trl_steer.eval.settings import Method
from trl_steer.files import read_json


def save_checkpoint(folder: Path) -> str:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(model: str, method: Method = "low_rank", seed: int = 0, train: int = 18) -> runs.Settings:
    """A step for each example, so that there are more of them than lie between two checkpoints."""
    made = preset.settings(method, seed, model, train=train, held_out=4).to_dict()
    made["training"] = {**made["training"], "per_device_train_batch_size": 1, "max_grad_norm": 0.5}
    made.pop("format")
    return runs.Settings(**made)


def outcome(run: runs.Run) -> dict:
    """All that a run leaves, except what depends on the machine and the hour."""
    varying = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    return {
        "files": sorted(str(file.relative_to(run.folder)) for file in run.folder.rglob("*")),
        "adapter": (run.adapter / "adapter_model.safetensors").read_bytes(),
        "training": {name: value for name, value in run.training.items() if name not in varying},
        "scores": {
            file.name: {name: value for name, value in read_json(file).items() if name not in varying}
            for file in run.folder.glob("scores/*.json")
        },
    }


def make_and_count(made: runs.Settings, folder: Path, counted: Path) -> None:
    """Makes a run, and writes down how often it touched its folder."""
    touched = _on_each_touch(folder, lambda count: None)
    runs.make(made, folder, score_base=True)
    counted.write_text(str(touched[0]))


def make_until_killed(made: runs.Settings, folder: Path, moment: int) -> None:
    """Makes a run whose process is killed, with no chance to clean up, before it touches its folder once more."""

    def kill(count: int) -> None:
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    _on_each_touch(folder, kill)
    runs.make(made, folder, score_base=True)


def moments(count: int, total: int) -> list[int]:
    return random.Random(0).sample(range(1, total + 1), count)


def _on_each_touch(folder: Path, call) -> list[int]:
    """Python tells when it opens, makes, renames or removes something. There is no way to stop that again."""
    touched = [0]

    def hook(event, args):
        if args and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(folder)):
            touched[0] += 1
            call(touched[0])

    sys.addaudithook(hook)
    return touched
