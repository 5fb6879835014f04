"""Memory that autograd keeps between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn


class _Kept:
    """A tensor saved by autograd. It is garbage collected when the graph releases it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """
    Bytes of the distinct storages that the graph keeps at the end of `forward`, without parameters and buffers.

    With gradient checkpointing, these are the inputs of the blocks, and tensors saved outside of blocks.

    Args:
        forward (`Callable`): Returns the loss. The backward pass is not run.
        model (`nn.Module`): The model whose parameters and buffers are not counted.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        entry = _Kept(tensor)
        kept.add(entry)
        return entry

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
        loss = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages = {}
    for entry in kept:
        storage = entry.tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
    del loss
    return sum(storages.values())
