"""`accelerate launch` with two CPU processes trains as one process does with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched_training import KINDS, train
from safetensors.torch import load_file

import trl_steer.integrations

SCRIPT = Path(__file__).parent.parent / "launched_training.py"
CONFIG = Path(trl_steer.integrations.__path__[0], "accelerate", "ddp_cpu.yaml")
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    run = subprocess.run(
        [*launcher, "--main_process_port", "0", str(SCRIPT), str(folder)],  # 0: any free port
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated")
def test_losses_and_weights_are_those_of_one_process(kind, launched, tmp_path):
    single = train(kind, tmp_path, processes=1)
    first, second = (torch.load(launched / f"{kind}-{rank}.pt") for rank in (0, 1))
    shares = zip(first["losses"], second["losses"], strict=True)
    assert [sum(pair) for pair in shares] == pytest.approx(single["losses"], rel=0, abs=1e-10)
    assert first["logged"] == pytest.approx(single["logged"], rel=1e-6)  # in float32
    assert all(weight.norm() > 1e-2 for name, weight in single["weights"].items() if name.endswith(".up"))
    torch.testing.assert_close(first["weights"], single["weights"], **EXACT)
    torch.testing.assert_close(second["weights"], first["weights"], rtol=0, atol=0)

    saved = [load_file(folder / kind / "adapter_model.safetensors") for folder in (launched, tmp_path)]
    torch.testing.assert_close(*saved, **EXACT)
