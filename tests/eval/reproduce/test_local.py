"""How the engine `local` starts its workers."""

import pytest
import torch

from trl_steer.eval.reproduce.local import LocalEngine


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The variables that the engine sets are restored afterwards."""
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")
def test_a_worker_can_use_a_gpu_whether_it_is_forked_or_not(tmp_path):
    with LocalEngine(tmp_path) as engine:
        worker = engine._context.Process(target=torch.cuda.init)
        worker.start()
        worker.join()
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("gpus", "installed", "expected"), [(0, True, True), (1, False, True), (1, True, False)], ids=str
)
def test_workers_are_forked_unless_bitsandbytes_initializes_cuda(gpus, installed, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    assert LocalEngine(tmp_path).forks == expected
