"""How the engine `local` starts its workers."""

import multiprocessing

import pytest
import torch

from trl_steer.eval.reproduce.local import _PRELOADED, LocalEngine


def use_gpu():
    assert torch.ones(2, device="cuda").sum().item() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")
def test_a_worker_that_is_forked_after_our_imports_can_use_a_gpu(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    worker = context.Process(target=use_gpu)
    worker.start()
    worker.join()
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("gpus", "installed", "expected"), [(0, True, True), (1, False, True), (1, True, False)], ids=str
)
def test_workers_are_forked_unless_bitsandbytes_initializes_cuda(gpus, installed, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "1")
    assert LocalEngine(tmp_path).forks == expected
