"""The engine `local`: a pool of processes on this machine."""

import importlib.util
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from ..console import output_to
from .study import Cell
from .worker import Outcome, make_cell

# What a run imports. The process that the others are forked from imports it once.
_PRELOADED = ["trl_steer.eval.training", "trl_steer.eval.scoring"]
LOG = "log"


class _Worker(NamedTuple):
    cell: Cell
    slot: int
    process: Any
    outcome: Connection


class LocalEngine:
    """Makes each cell in a process of its own, so that one that is killed takes no other cell with it.

    Several GPUs are shared among the processes, each of which sees one. Cores are shared by the number of threads,
    unless `OMP_NUM_THREADS` is set.

    Args:
        folder (`Path`): Folder of the study.
        workers (`int`, *optional*): Number of cells at a time. Default: one for each GPU, else one.
    """

    def __init__(self, folder: Path, workers: int | None = None):
        import torch

        self.folder = folder
        self.gpus = torch.cuda.device_count()
        self.workers = workers or self.gpus or 1
        # For the workers, which import PyTorch later.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        # CUDA cannot be used in a process that is forked from one that has initialized it. With this variable, imports
        # that look for GPUs do not, but that of bitsandbytes does.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self.forks = not (self.gpus and importlib.util.find_spec("bitsandbytes"))
        self._context: Any = multiprocessing.get_context("forkserver" if self.forks else "spawn")
        self._running: dict[int, _Worker] = {}

    def __enter__(self) -> "LocalEngine":
        if self.forks:
            self._context.set_forkserver_preload(_PRELOADED)
            with output_to(self.folder / LOG):
                forkserver.ensure_running()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running.values():
            worker.process.kill()
            worker.process.join()

    def is_free(self) -> bool:
        """Whether another cell can be submitted."""
        return len(self._running) < self.workers

    def is_idle(self) -> bool:
        """Whether no cell is being made."""
        return not self._running

    def submit(self, cell: Cell) -> None:
        """Starts to make a cell."""
        slot = min(set(range(self.workers)) - {worker.slot for worker in self._running.values()})
        outcome, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work,
            args=(sender, self._environment(slot), cell.settings.to_dict(), cell.key, str(self.folder)),
        )
        process.start()
        sender.close()
        self._running[process.sentinel] = _Worker(cell, slot, process, outcome)

    def wait(self) -> list[tuple[Cell, Outcome]]:
        """Waits until a cell or several have ended, and returns them."""
        sentinels: list[Any] = wait(list(self._running))
        ended = [self._running.pop(sentinel) for sentinel in sentinels]
        return [(worker.cell, _outcome(worker)) for worker in ended]

    def _environment(self, slot: int) -> dict[str, str]:
        if self.gpus < 2:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[slot % self.gpus]}


def _outcome(worker: _Worker) -> Outcome:
    worker.process.join()
    try:
        return worker.outcome.recv()
    except EOFError:
        code = worker.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return Outcome(f"The worker process {how}.")
    finally:
        worker.outcome.close()


def _work(sender: Connection, environment: dict[str, str], settings: dict[str, Any], key: str, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver too, which ends the workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    os.environ.update(environment)
    with output_to(Path(folder, LOG)):
        sender.send(make_cell(settings, key, folder))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)
