"""A causal language model with post-block steering: in each steered block, the output `h` becomes
`h + scaling * act(h @ down.T) @ up.T`, or `h + scaling * vector`.

Loads with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, transformers 5.19 or newer. Written
by `trl-steer export`, which replaces the base classes and `BLOCKS` by those of the model.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.llama.configuration_llama import LlamaConfig as BaseConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer as BaseBlock
from transformers.models.llama.modeling_llama import LlamaForCausalLM as BaseForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel as BaseModel

# Name of the list of blocks in `BaseModel`.
BLOCKS = "layers"


class SteeredConfig(BaseConfig):
    """
    The base model's configuration, and that of steering.

    Args:
        steering_ranks (`list[int]`): Rank of the update in each block, 0 for a block that is not steered. For vectors,
            1 stands for a block that is steered.
        steering_type (`str`): `"low_rank"` or `"vector"`.
        steering_activation (`str`, *optional*): Name of a transformers activation. `None` is the identity.
        steering_scaling (`float`): Factor on all updates.
    """

    model_type = f"steered_{BaseConfig.model_type}"

    steering_ranks: list[int] | None = None
    steering_type: str = "low_rank"
    steering_activation: str | None = None
    steering_scaling: float = 1.0


class PostBlockSteering(nn.Module):
    """The update of the output of one block."""

    def __init__(self, config: SteeredConfig, rank: int):
        super().__init__()
        self.scaling = config.steering_scaling
        self.is_vector = config.steering_type == "vector"
        if self.is_vector:
            self.vector = nn.Parameter(torch.zeros(config.hidden_size))
        else:
            self.down = nn.Linear(config.hidden_size, rank, bias=False)
            self.up = nn.Linear(rank, config.hidden_size, bias=False)
        self.act = nn.Identity() if config.steering_activation is None else ACT2FN[config.steering_activation]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.is_vector:
            return torch.add(h, self.vector, alpha=self.scaling).to(h.dtype)
        # The weights may be in float32, and `h` in bfloat16.
        update = self.up(self.act(self.down(h.to(torch.promote_types(h.dtype, self.down.weight.dtype)))))
        return h + (self.scaling * update).to(h.dtype)


class SteeredBlock(BaseBlock):
    """A block with an update of its output."""

    def __init__(self, config: SteeredConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.post_block_steering = PostBlockSteering(config, (config.steering_ranks or [])[layer_idx])

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.post_block_steering(output[0]), *output[1:])
        return self.post_block_steering(output)


# Whatever the dtype of the model, since rounded adapters are worse.
IN_FLOAT32 = ["post_block_steering"]
NOT_SPLIT = [*(BaseModel._no_split_modules or []), SteeredBlock.__name__]


def start_as_base_model(module: nn.Module) -> None:
    """Initializes new weights so that the update is zero."""
    if isinstance(module, PostBlockSteering):
        init.zeros_(module.vector if module.is_vector else module.up.weight)


class SteeredModel(BaseModel):
    """The model without its head."""

    config_class = SteeredConfig
    _no_split_modules = NOT_SPLIT
    _keep_in_fp32_modules_strict = IN_FLOAT32

    def __init__(self, config: SteeredConfig):
        super().__init__(config)
        blocks: Any = self.get_submodule(BLOCKS)
        for index, rank in enumerate(config.steering_ranks or []):
            if rank:
                blocks[index] = SteeredBlock(config, index)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        start_as_base_model(module)


class SteeredForCausalLM(BaseForCausalLM):
    """The model with its head."""

    config_class = SteeredConfig
    _no_split_modules = NOT_SPLIT
    _keep_in_fp32_modules_strict = IN_FLOAT32

    def __init__(self, config: SteeredConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, SteeredModel(config))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        start_as_base_model(module)
