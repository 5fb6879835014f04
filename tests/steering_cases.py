"""What the tests of the tuners share: adapters to try, and how to look at a model."""

from __future__ import annotations

import pytest
import torch
from model_zoo import FAMILIES, tiny_inputs
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from torch import nn
from tuner_cases import ROWS

from trl_steer import PostBlockSteeringConfig
from trl_steer.tuners.post_block_steering import LowRankAdapter, VectorAdapter
from trl_steer.tuners.steering import SteeringAdapter, SteeringLayer

# The rows of post-block steering, for tests of the core where the site makes no difference.
KINDS = {name: row.fields for name, row in ROWS.items() if row.config_cls is PostBlockSteeringConfig}

over_kinds = pytest.mark.parametrize("kind", KINDS)
over_families = pytest.mark.parametrize("family", FAMILIES)


def steering_config(row: str = "low_rank", **fields) -> PeftConfig:
    """The configuration of a row. Its adapter changes the model, `fresh=True` being left out."""
    return ROWS[row].config(**fields)


def steer(model: nn.Module, row: str = "low_rank", adapter_name: str = "default", seed: int = 0, **fields):
    """`model` with an adapter, in evaluation mode. The same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, steering_config(row, **fields))
            return model.eval()
        return get_peft_model(model, steering_config(row, **fields), adapter_name=adapter_name).eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict | None = None, **kwargs) -> torch.Tensor:
    return model(**(tiny_inputs() if inputs is None else inputs), **kwargs).logits


def layers_of(model: nn.Module) -> list[SteeringLayer]:
    return [module for module in model.modules() if isinstance(module, SteeringLayer)]


def adapters_of(model: nn.Module, adapter_name: str = "default") -> list[SteeringAdapter]:
    """The steering adapters of this name, block by block."""
    return [layer.adapters[adapter_name] for layer in layers_of(model) if adapter_name in layer.adapters]


def parameters_of(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """All that an adapter trains, by name: also its LoRA half, where it has one."""
    return {name: p for name, p in model.named_parameters() if f".{adapter_name}." in name}


def update_of(adapter: LowRankAdapter | VectorAdapter, h: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to `h`, by the formula of the paper."""
    if isinstance(adapter, VectorAdapter):
        return adapter.scaling * adapter.vector.expand_as(h)
    z = h @ adapter.down.T
    return adapter.scaling * (z if adapter.activation is None else adapter.activation(z)) @ adapter.up.T


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Everything in `before` is in `model`, bit for bit. There may be more, such as an adapter."""
    after = model.state_dict()
    assert before.keys() <= after.keys()
    changed = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
    assert not changed
