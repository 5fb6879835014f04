"""How many bytes autograd keeps between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn


class _Kept:
    """Stands for a saved tensor; it lives as long as the graph holds it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """
    Bytes of the distinct storages that the graph holds at the end of `forward`, parameters and buffers left out.

    Under gradient checkpointing what a block computes is dropped on the way, so what counts is what is still alive in
    the end: the inputs of the blocks, and what is kept outside of them.

    Args:
        forward (`Callable`): Returns the loss. No backward runs.
        model (`nn.Module`): Whose parameters and buffers do not count.
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
