"""No test reaches the network, and every test starts from the same random numbers."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

# Tiny matrices: a second thread costs more than it brings, and results depend on their number.
torch.set_num_threads(1)


def pytest_collection_finish():
    # Libraries and thousands of tests stay until the end. To look for garbage among them took a quarter of the time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # so that libraries that look for leaks at the end find none


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
