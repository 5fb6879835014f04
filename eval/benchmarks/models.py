"""Models with random weights, and copies that share their weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trl_steer import PostBlockSteeringConfig
from trl_steer.tuners.joint_steering import OrthogonalityConstraint
from trl_steer.tuners.post_block_steering.layer import LowRankAdapter
from trl_steer.tuners.steering.ops.low_rank import operator_for

ADAPTERS: dict[str, dict] = {
    "low_rank": {"config": PostBlockSteeringConfig, "r": 8},
    "vector": {"config": PostBlockSteeringConfig, "steering_type": "vector"},
    "lora": {"config": LoraConfig, "r": 8, "target_modules": "all-linear"},
}


def tiny() -> LlamaConfig:
    """For smoke tests."""
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )


def eight_blocks() -> LlamaConfig:
    """Eight blocks with d=512. The vocabulary is small, so that logits do not dominate the memory."""
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2000,
    )


def smollm2_135m() -> LlamaConfig:
    """The shape of SmolLM2-135M."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def build(config: LlamaConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model: torch.nn.Module = LlamaForCausalLM(copy.deepcopy(config))
    return model.to(device, dtype)  # type: ignore[return-value]


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules with the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def adapter_config(adapter: str) -> PeftConfig:
    fields = dict(ADAPTERS[adapter])
    return fields.pop("config")(task_type="CAUSAL_LM", **fields)


def adapted(base: PreTrainedModel, adapter: str | PeftConfig) -> PeftModel:
    """A copy of `base` with the same weights and an adapter, one of [`ADAPTERS`] or with a configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(share(base), adapter_config(adapter) if isinstance(adapter, str) else adapter)


def operator_of(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """The operator of the low-rank updates in this model."""
    adapter = next(module for module in model.modules() if isinstance(module, LowRankAdapter))
    h = torch.empty(1, 1, adapter.down.shape[1], device=adapter.down.device, dtype=dtype)
    return operator_for(h, adapter.down, adapter.up, adapter.activation)


def training_step(
    model: torch.nn.Module, tokens: torch.Tensor, constraint: OrthogonalityConstraint | None = None
) -> Callable[[], None]:
    """Forward, backward and AdamW, optionally with the constraint."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        if constraint is not None:
            constraint.project_gradients()
        optimizer.step()
        if constraint is not None:
            constraint.project()
        # Zeros instead of `None`, so that gradients can be written between steps.
        optimizer.zero_grad(set_to_none=False)

    return step


def random_tokens(config: LlamaConfig, batch: int, length: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)
