"""Bases to merge into, and merged models loaded in a process that does not have us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from model_zoo import tiny_model

LOAD_AND_COMPARE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
errors = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("eager")
    recorded = load_file(folder / "recorded.safetensors")
    with torch.no_grad():
        logits = model(input_ids=recorded["input_ids"]).logits
    errors[folder.name] = (logits - recorded["logits"]).abs().max().item()
assert "trl_steer" not in sys.modules
print(json.dumps(errors))
"""


def double_model(family: str, fields: dict[str, Any]):
    """A tiny model in float64."""
    model = tiny_model(family, dtype=torch.float64, **fields)
    if family == "mixtral":  # whose faster ways to compute have no float64
        model.set_experts_implementation("eager")
    return model


def loaded_model(family: str, fields: dict[str, Any], folder: Path):
    """The same as it is loaded in float64, where some constants are not those of a model that is converted."""
    model = double_model(family, fields)
    if not folder.exists():
        model.save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    if family == "mixtral":
        model.set_experts_implementation("eager")
    return model


def errors_without_us(folder: Path) -> dict[str, float]:
    """For each model in a folder, how far its logits are from those in its `recorded.safetensors`."""
    environment = {**os.environ, "TRL_STEER_NO_AUTOLOAD": "1"}
    command = [sys.executable, "-c", LOAD_AND_COMPARE, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
