"""Scores a model on the demo's held-out examples with lm-eval."""

import json
import shlex
from pathlib import Path

from trl_steer.demo.task import NAME
from trl_steer.files import write_json

BATCH_SIZE = 50


def model_args(model: str, adapter: Path | None) -> dict[str, str]:
    return {"pretrained": model, **({"peft": str(adapter)} if adapter else {}), "dtype": "float32"}


def command(model: str, adapter: Path | None, task_folder: Path) -> str:
    """The stock command that does what [`score`] does, for the shell."""
    arguments = model_args(model, adapter)
    joined = ",".join(f"{key}={value}" for key, value in arguments.items())
    options = {
        "--model": "hf",
        "--model_args": joined if joined.count(",") < len(arguments) else json.dumps(arguments),  # a path has a comma
        "--include_path": str(task_folder),
        "--tasks": NAME,
        "--batch_size": str(BATCH_SIZE),
        "--device": _device(),
    }
    return "lm_eval run " + " ".join(f"{name} {shlex.quote(value)}" for name, value in options.items())


def score(model: str, adapter: Path | None, task_folder: Path, result: Path) -> None:
    """Evaluates through lm-eval's Python interface and writes `result`: accuracy, and every answer by example.

    Args:
        model (`str`): Checkpoint folder or Hub id.
        adapter (`Path`, *optional*): PEFT adapter folder to load on top.
        task_folder (`Path`): Holds the lm-eval task and its data.
        result (`Path`): JSON file, written when the evaluation has ended.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=model_args(model, adapter),
        tasks=[NAME],
        batch_size=BATCH_SIZE,
        device=_device(),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    samples = sorted(results["samples"][NAME], key=lambda sample: sample["doc_id"])
    write_json(
        result,
        {
            "accuracy": float(results["results"][NAME]["exact_match,answer"]),
            "correct": [bool(sample["exact_match"] == 1.0) for sample in samples],
            "generated": [sample["resps"][0][0] for sample in samples],
            "lm_eval": results["config"]["model_args"],
        },
    )


def _device() -> str:
    # lm-eval's default is "cuda", also where there is none.
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"
