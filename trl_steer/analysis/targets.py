"""The adapters that a regression can write: post-block steering, and LoRA on the last linear layer of the MLPs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..choices import ALL
from ..tuners.post_block_steering import PostBlockSteeringConfig
from ..tuners.steering.sites import get_hidden, replace_hidden
from .regression import Factors
from .states import Block, base_of, blocks_of, evaluation, fewest_outputs, input_device, right_padded

ADAPTER_NAME = "default"
# Rounding is some 1e-6 of a hidden state in float32, and less than this in bfloat16.
_PROBE_TOLERANCE = 0.02


class SteeringTarget:
    """
    Low-rank steering or vectors at the outputs of blocks.

    Args:
        config ([`PostBlockSteeringConfig`]): The adapter.

    Raises:
        ValueError: Its update is not linear, or does not apply to all tokens.
    """

    def __init__(self, config: PostBlockSteeringConfig):
        if config.activation is not None or config.positions != ALL or not config.scaling:
            raise ValueError(
                "A closed form exists for linear steering of all tokens: activation=None, positions='all' and a "
                f"scaling other than 0. Got {config.activation!r}, {config.positions!r} and {config.scaling}."
            )
        self.config: Any = copy.deepcopy(config)
        self.config.init_weights, self.config.init_from = True, None
        self.is_vector = config.steering_type == "vector"

    def add_to(self, base: Any) -> Any:
        """The model with a new adapter, which does not change it yet."""
        return get_peft_model(base, copy.deepcopy(self.config))

    def adapter(self, block: Block) -> Any:
        """The adapter of a block, `None` if it has none."""
        layer = getattr(block.module, "post_block_steering", None)
        return None if layer is None else layer.adapters[ADAPTER_NAME]

    def rank(self, block: Block) -> int:
        """The rank of the adapter of a block."""
        return len(self.adapter(block).down)

    def regressor(self, block: Block) -> nn.Module | None:
        """The module whose input the update multiplies, `None` for the output of the block."""
        return None

    @torch.no_grad()
    def write(self, block: Block, update: Factors | torch.Tensor) -> None:
        """Sets the update of a block: factors, or a vector (d,)."""
        adapter = self.adapter(block)
        if isinstance(update, torch.Tensor):
            adapter.vector.copy_(update / adapter.scaling)
            return
        rank = len(update.down)
        for parameter in (adapter.down, adapter.up):
            parameter.zero_()
        adapter.down[:rank] = update.down
        adapter.up[:, :rank] = update.up / adapter.scaling

    def with_ranks(self, model: Any, updates: Mapping[int, Factors]) -> Any:
        """The model with an adapter that has, in each block, the rank of its update."""
        base = model.unload()
        ranks = {name: len(updates[block.index].down) for name, block in _named(base) if block.index in updates}
        self.config.r = max(ranks.values())
        self.config.rank_pattern = {name: rank for name, rank in ranks.items() if rank < self.config.r} or None
        model = self.add_to(base)
        for block in blocks_of(model):
            if block.index in updates:
                self.write(block, updates[block.index])
        return model


class LastLinearTarget:
    """
    LoRA on the last linear layer of each block's MLP.

    Args:
        config ([`~peft.LoraConfig`]): `r`, `layers_to_transform`, and the fields that all configurations have.
        base ([`~transformers.PreTrainedModel`]): The model without an adapter.
        batch (`Mapping[str, torch.Tensor]`): To check that the layers' outputs are added to the residual stream.

    Raises:
        ValueError: A block has no such layer, or something happens to its output before it is added.
    """

    is_vector = False

    def __init__(self, config: LoraConfig, base: Any, batch: Mapping[str, torch.Tensor]):
        wanted = config.layers_to_transform
        indices = [wanted] if isinstance(wanted, int) else wanted
        blocks = blocks_of(base, indices)
        named = {block.index: name for name, block in _named(base)}
        self.linears: dict[int, str] = {}
        for block in blocks:
            linear = block.anatomy.mlp_output()
            if linear is None:
                raise ValueError(
                    f"{named[block.index]} has no last linear layer of an MLP to put LoRA on, as in "
                    "a mixture of experts. Use a steering adapter."
                )
            self.linears[block.index] = linear
        _check_added(base, blocks, self.linears, batch)
        self.config: Any = LoraConfig(
            r=config.r,
            lora_alpha=config.r,
            target_modules=[f"{named[index]}.{linear}" for index, linear in self.linears.items()],
            task_type=config.task_type,
        )

    def add_to(self, base: Any) -> Any:
        """The model with a new adapter, which does not change it yet."""
        return get_peft_model(base, copy.deepcopy(self.config))

    def adapter(self, block: Block) -> Any:
        """The LoRA layer of a block, `None` if it has none."""
        linear = self.linears.get(block.index)
        return None if linear is None else block.module.get_submodule(linear)

    def rank(self, block: Block) -> int:
        """The rank of the adapter of a block."""
        return self.config.r

    def regressor(self, block: Block) -> nn.Module | None:
        """The module whose input the update multiplies."""
        return self.adapter(block)

    @torch.no_grad()
    def write(self, block: Block, update: Factors) -> None:
        """Sets the update of a block."""
        adapter = self.adapter(block)
        A, B = adapter.lora_A[ADAPTER_NAME].weight, adapter.lora_B[ADAPTER_NAME].weight
        rank = len(update.down)
        A.zero_()[:rank] = update.down.to(A)
        B.zero_()[:, :rank] = (update.up / adapter.scaling[ADAPTER_NAME]).to(B)


def _named(base: Any) -> list[tuple[str, Block]]:
    names = {module: name for name, module in base_of(base).named_modules()}
    return [(names[block.module], block) for block in blocks_of(base)]


@torch.no_grad()
def _check_added(
    base: Any, blocks: Sequence[Block], linears: Mapping[int, str], batch: Mapping[str, torch.Tensor]
) -> None:
    """Checks that what is added to the output of each layer is added to the output of its block, by adding a vector
    there and subtracting it here."""
    batch = right_padded(batch, input_device(base))
    outputs = [_outputs(base, blocks, linears, batch, sign) for sign in (0.0, 1.0)]
    for block in blocks:
        before, after = outputs[0][block.index].double(), outputs[1][block.index].double()
        if (after - before).norm() > _PROBE_TOLERANCE * _probe(before).expand_as(before).norm():
            raise ValueError(
                f"The output of {linears[block.index]} in block {block.index} is not added to the residual stream as "
                "it is (there is a norm, a gate or several streams), so no LoRA there can move the output of the "
                "block by a linear map. Use a steering adapter."
            )


def _outputs(
    base: Any, blocks: Sequence[Block], linears: Mapping[int, str], batch: Mapping[str, torch.Tensor], sign: float
) -> dict[int, torch.Tensor]:
    """The output of each block less `sign` times the vector that was added to the output of its linear layer."""
    kept: dict[int, torch.Tensor] = {}

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + sign * _probe(output)

    def subtract(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = get_hidden(output, module)
            kept[index] = hidden - sign * _probe(hidden)
            return replace_hidden(output, kept[index])

        return hook

    with evaluation(base), ExitStack() as stack:
        for block in blocks:
            linear = block.module.get_submodule(linears[block.index])
            stack.callback(linear.register_forward_hook(add).remove)
            stack.callback(block.module.register_forward_hook(subtract(block.index)).remove)
        base(**batch, **fewest_outputs(base))
    return kept


def _probe(hidden: torch.Tensor) -> torch.Tensor:
    """A vector (d,) of about the size of hidden states, in no direction that is special for a model."""
    width = hidden.shape[-1]
    wave = torch.sin(torch.arange(1, width + 1, dtype=torch.float64) ** 2)
    return wave.to(hidden)
