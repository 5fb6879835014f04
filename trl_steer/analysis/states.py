"""The hidden states of a model's blocks, recorded for one batch at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tuners.steering.matching import block_index, find_blocks, text_config
from ..tuners.steering.prompts import is_watched
from ..tuners.steering.sites import SITES, BlockAnatomy, Site, get_hidden

RESIDUAL = "residual"
STATES = (RESIDUAL, *SITES)


@dataclass(frozen=True)
class Block:
    """
    A transformer block.

    Attributes:
        index (`int`): Its index in the model.
        module (`nn.Module`): The block.
        anatomy ([`BlockAnatomy`]): Its parts.
    """

    index: int
    module: nn.Module
    anatomy: BlockAnatomy

    def site(self, name: str) -> Site:
        """The site `name` (one of [`STATES`]) of this block.

        Raises:
            ValueError: The block does not have it.
        """
        if name == RESIDUAL:
            return Site(RESIDUAL, "", True, self.anatomy.hidden_size)
        return self.anatomy.site(name)


class States:
    """
    The hidden states of one batch: `states[block, name]` is a tensor (tokens, width) in float64, with a row for each
    token that is not padding, in the order of the batch. `name` is one of [`STATES`]:

    - `"residual"`, the residual stream before the block;
    - `"post_block"`, the output of the block, which is the residual stream after it;
    - `"post_attn"` and `"post_mlp"`, what the attention and the MLP add to the residual stream;
    - `"pre_mlp"`, the input of the MLP, and `"heads"`, the input of the attention's output projection.

    All of them include the updates of active adapters.

    Attributes:
        lengths (`list[int]`): The number of tokens of each row of the batch.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    def __getitem__(self, key: tuple[int, str]) -> torch.Tensor:
        return self._kept[key].double()


@torch.no_grad()
def record(
    model: Any, batch: Mapping[str, torch.Tensor], names: Sequence[str], blocks: Sequence[int] | None = None
) -> States:
    """
    Runs a model on a batch and records hidden states, in the dtype of the model.

    Padding, on either side, is moved behind the last token of a row first. So it changes neither positions nor, in a
    causal model, states.

    Args:
        model (`nn.Module`): A causal language model, with or without adapters. Runs in evaluation mode.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids` (rows, length) and, if there is padding, `attention_mask` (rows, length).
        names (`Sequence[str]`): Which states, see [`States`].
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: all.

    Raises:
        ValueError: A block does not exist, or does not have such a state.
    """
    batch = right_padded(batch, input_device(model))
    mask = batch["attention_mask"].bool()
    states = States(mask.sum(1).tolist())
    with evaluation(model), ExitStack() as stack:
        for block in blocks_of(model, blocks):
            for name in names:
                stack.callback(_record_site(states._kept, block, name, mask).remove)
        run_model(model, batch)
    return states


def record_pair(
    base: Any, tuned: Any, batch: Mapping[str, torch.Tensor], names: Sequence[str], blocks: Sequence[int] | None = None
) -> tuple[States, States]:
    """
    The states of a base model and of a fine-tuned one on the same batch.

    Args:
        base (`nn.Module`, *optional*): The base model. `None` for that of the adapters of `tuned`, a `PeftModel`.
        tuned (`nn.Module`): The fine-tuned model.
        batch, names, blocks: See [`record`].
    """
    after = record(tuned, batch, names, blocks)
    if base is not None:
        return record(base, batch, names, blocks), after
    with tuned.disable_adapter():
        return record(tuned, batch, names, blocks), after


def blocks_of(model: Any, indices: Sequence[int] | None = None) -> list[Block]:
    """
    The blocks of a model, with or without adapters.

    Raises:
        ValueError: The blocks cannot be found, or there is no block with an index.
    """
    base = base_of(model)
    config, names = text_config(base), {block_index(name): name for name in find_blocks(base)}
    missing = sorted(set(indices or ()) - names.keys())
    if missing:
        raise ValueError(f"There is no block {missing[0]}: {type(base).__name__} has blocks 0 to {len(names) - 1}.")
    modules = {index: base.get_submodule(names[index]) for index in (names if indices is None else indices)}
    return [Block(index, module, BlockAnatomy(module, config)) for index, module in modules.items()]


def spread(model: Any) -> list[int]:
    """The indices of the first, the middle and the last block."""
    indices = [block.index for block in blocks_of(model)]
    return sorted({indices[0], indices[len(indices) // 2], indices[-1]})


def base_of(model: Any) -> Any:
    """The model itself, where `model` is a `PeftModel`. It still has the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_same_shape(base: Any, tuned: Any) -> None:
    """
    Checks that two models have the same number of blocks and hidden size.

    Raises:
        ValueError: They do not.
    """
    shapes = []
    for model in map(base_of, (base, tuned)):
        config: Any = text_config(model)
        shapes.append({"blocks": len(find_blocks(model)), "hidden size": config.hidden_size})
    if shapes[0] != shapes[1]:
        said = [", ".join(f"{name} {size}" for name, size in shape.items()) for shape in shapes]
        raise ValueError(
            f"The models have different shapes: the base model has {said[0]}, the fine-tuned one {said[1]}. Use a "
            "model that was fine-tuned from this base."
        )


def right_padded(batch: Mapping[str, torch.Tensor], device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` with the tokens of each row first, and then its padding.

    Raises:
        ValueError: There are no tokens.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not mask.any():
        raise ValueError("The batch has no tokens.")
    order = mask.bool().int().argsort(dim=1, descending=True, stable=True)
    return {name: t.gather(1, order).to(device) for name, t in (("input_ids", ids), ("attention_mask", mask))}


def input_device(model: Any) -> torch.device:
    """The device of the input embeddings."""
    return model.get_input_embeddings().weight.device


def run_model(model: Any, padded: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """
    Runs a causal model on a batch with all padding on the right.

    Padding is not masked, because no token before it attends to it. If it was, a padding token whose attention window
    holds only padding would attend to nothing, which gives NaN in some implementations of attention.

    Args:
        model (`nn.Module`): A causal language model, with or without adapters.
        padded (`Mapping[str, torch.Tensor]`): A batch of [`right_padded`].
        options: Arguments of the forward pass. Default: those of [`fewest_outputs`].
    """
    mask = padded["attention_mask"]
    # An adapter that edits some tokens of the prompt has to know where it ends.
    prompt = {"completion_mask": 1 - mask} if is_watched(base_of(model)) else {}
    options = options or fewest_outputs(model)
    return model(input_ids=padded["input_ids"], attention_mask=torch.ones_like(mask), **prompt, **options)


def fewest_outputs(model: Any) -> dict[str, Any]:
    """Arguments of the forward pass without a cache, and with the logits of one token only, where a model can."""
    accepted = inspect.signature(base_of(model).forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in accepted}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Context manager that sets evaluation mode."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _record_site(kept: dict[tuple[int, str], torch.Tensor], block: Block, name: str, mask: torch.Tensor) -> Any:
    site = block.site(name)
    module = block.module.get_submodule(site.module)

    def keep(value: Any) -> None:
        hidden = get_hidden(value, module)
        if hidden.dim() == 4 and block.anatomy.stream is not None:
            hidden = hidden[block.anatomy.stream]
        # Indexing copies the tokens, which matters because a block may change its hidden states in place.
        kept[block.index, name] = hidden.reshape(-1, hidden.shape[-1])[mask.flatten().to(hidden.device)]

    if site.is_input:
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(args if args else kwargs), with_kwargs=True
        )
    return module.register_forward_hook(lambda _, args, output: keep(output))
