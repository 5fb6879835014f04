"""The engine `ray`: a Ray cluster, on this machine or a running one."""

import os
from pathlib import Path
from typing import Any

from trl_steer.extras import require

from .study import Cell, StudyError
from .worker import Outcome, make_cell

# What the workers of a running cluster need of the environment of the driver.
_VARIABLES = ("TRL_STEER_DATASETS", "TRL_STEER_HUB_MIRROR", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")


class RayEngine:
    """Makes each cell as a task of Ray.

    Connects to the running cluster of `RAY_ADDRESS` or of this machine, otherwise starts one on this machine. All
    nodes of a cluster need trl_steer, and the folder of the study under the same path.

    Args:
        folder (`Path`): Folder of the study.
        workers (`int`, *optional*): Number of cells at a time. Default: as many as the cluster has room for.
        gpus (`float`, *optional*): Share of a GPU for each cell. Default: 1 if the cluster has GPUs, else 0.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: There is no cluster at `RAY_ADDRESS`.
        StudyError: Cells are to have a share of a GPU, and the cluster has none.
    """

    def __init__(self, folder: Path, workers: int | None = None, gpus: float | None = None):
        require("cluster", "ray")
        import ray

        self.folder = folder
        self._ray: Any = ray
        self._running: dict[Any, Cell] = {}
        self._given = (workers, gpus)

    def __enter__(self) -> "RayEngine":
        ray = self._ray
        workers, gpus = self._given
        variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "runtime_env": {"env_vars": variables},
        }
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address, **options, **(_own_cluster(workers) if address == "local" else {}))
        except ConnectionError:
            if address != "auto":
                raise
            ray.init("local", **options, **_own_cluster(workers))
        found = ray.cluster_resources()
        share = (1.0 if found.get("GPU") else 0.0) if gpus is None else gpus
        if share and not found.get("GPU"):
            ray.shutdown()
            raise StudyError(f"The Ray cluster has no GPU, of which each run would get {share:g}. Leave --gpus out.")
        room = int(found["GPU"] / share) if share else int(found.get("CPU", 1))
        self.workers = max(1, workers or room)
        # The driver submits a cell again whose worker has died, as it does in the other engine.
        self._make = ray.remote(num_cpus=1, num_gpus=share, max_retries=0)(_make_cell)
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def is_free(self) -> bool:
        """Whether another cell can be submitted."""
        return len(self._running) < self.workers

    def is_idle(self) -> bool:
        """Whether no cell is being made."""
        return not self._running

    def submit(self, cell: Cell) -> None:
        """Starts to make a cell."""
        reference = self._make.remote(str(Path.cwd()), cell.settings.to_dict(), cell.key, str(self.folder))
        self._running[reference] = cell

    def wait(self) -> list[tuple[Cell, Outcome]]:
        """Waits until a cell or several have ended, and returns them."""
        ended, _ = self._ray.wait(list(self._running))
        return [(self._running.pop(reference), self._outcome(reference)) for reference in ended]

    def _outcome(self, reference: Any) -> Outcome:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Outcome(f"The worker process died: {' '.join(str(error).split())[:500]}")


def _own_cluster(workers: int | None) -> dict[str, Any]:
    return {"num_cpus": workers, "include_dashboard": False}


def _make_cell(directory: str, settings: dict[str, Any], key: str, folder: str) -> Outcome:
    """[`make_cell`] in the working directory of the driver, which names of models may be relative to."""
    if Path(directory).is_dir():
        os.chdir(directory)
    return make_cell(settings, key, folder)
