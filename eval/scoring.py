"""Evaluates a model, with or without an adapter, with lm-eval's Python interface."""

import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from . import models
from .console import Report
from .runs import Settings

# The filter of the reported accuracy.
STRICT = "strict"


def score(
    settings: Settings, task: str, model: str, adapter: Path | None, tasks: Path, report: Report
) -> dict[str, Any]:
    """Evaluates a model, and returns the accuracy and all examples in the order of the task.

    Args:
        settings (`Settings`): Settings of the run.
        task (`str`): The lm-eval task.
        model (`str`): Checkpoint folder or Hub id.
        adapter (`Path`, *optional*): Folder of a PEFT adapter.
        tasks (`Path`): Folder of the lm-eval tasks.
        report (`Report`): Receives the progress.
    """
    start = time.perf_counter()
    dtype = getattr(torch, settings.dtype)
    loaded, tokenizer = models.load(model, str(adapter) if adapter else None, dtype=dtype)
    metadata: dict[str, Any] = {settings.benchmark: dict(settings.source)} if settings.source else {}
    batch_size = settings.scoring["batch_size"]
    results = lm_eval.simple_evaluate(
        model=_Counted(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, report=report),
        tasks=[task],
        limit=settings.scoring.get("limit"),
        gen_kwargs=settings.scoring.get("gen_kwargs"),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False, metadata=metadata),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = [sample for sample in results["samples"][task] if sample["filter"] == STRICT]
    return {
        "task": task,
        "filter": STRICT,
        "seconds": time.perf_counter() - start,
        "accuracy": float(results["results"][task][f"exact_match,{STRICT}"]),
        "examples": [
            {
                "id": sample["prompt_hash"][:16],
                "text": sample["resps"][0][0],
                "answer": sample["filtered_resps"][0],
                "target": sample["target"],
                "correct": bool(sample["exact_match"] == 1.0),
            }
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ],
    }


class _Counted(HFLM):
    """Reports the progress of generation."""

    def __init__(self, *args, report: Report, **kwargs):
        super().__init__(*args, **kwargs)
        self.report = report

    def generate_until(self, requests, disable_tqdm: bool = False):
        self.done, self.count = 0, len(requests)
        # After Ctrl-C, the progress bar would write to the terminal when it is garbage collected.
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context, *args, **kwargs):
        generated = super()._model_generate(context, *args, **kwargs)
        self.done += len(context)
        self.report.progress(self.done, self.count)
        return generated
