"""Functions run in processes of their own, forked from one that has already imported what training needs."""

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

_TRAINERS = [f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "grpo", "kto", "reward", "rloo")]


def run_in_process(function: Callable, *args: Any) -> int:
    """Calls a function of an importable module in another process. Returns its exit status, or minus the signal."""
    process = _start(function, args)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_in_world(function: Callable, size: int, *args: Any) -> None:
    """Calls `function(rank, *args)` in `size` processes that talk to each other over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [_start(_with_group, (function, rank, size, folder, args)) for rank in range(size)]
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * size


def _start(function: Callable, args: tuple):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_TRAINERS, "trl_steer.trainers"])
    process = context.Process(target=_on_one_thread, args=(function, args))
    process.start()
    return process


def _on_one_thread(function: Callable, args: tuple) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    function(*args)


def _with_group(function: Callable, rank: int, size: int, folder: str, args: tuple) -> None:
    # A process that fails leaves the others waiting for it, so not for long.
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), world_size=size, rank=rank
    )
    try:
        function(rank, *args)
    finally:
        gc.collect()  # DDP's reducer must not be the last to refer to the group
        torch.distributed.destroy_process_group()
