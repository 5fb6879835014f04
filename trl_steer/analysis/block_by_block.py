"""Runs a model on the same batches again and again, each time up to the next block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tuners.steering.matching import text_config
from ..tuners.steering.sites import get_hidden, replace_hidden
from .states import base_of, blocks_of, evaluation, fewest_outputs, input_device, right_padded


class BlockByBlock:
    """
    Runs a model up to one block after the other, which must come in order, without running the blocks before again:
    the hidden states of each batch are kept in a file. So all blocks together cost about as much as one forward pass.

    Args:
        model (`nn.Module`): A causal language model, with or without adapters.
        folder (`Path`): An existing folder for the files.
        changes (`bool`, defaults to `False`):
            Whether a block's adapter changes after the runs up to this block. Then each run includes the block before,
            whose output was another one in its own run.
    """

    def __init__(self, model: nn.Module, folder: Path, changes: bool = False):
        self.model, self.folder, self.changes = model, folder, changes
        self.blocks = blocks_of(model)
        self._widths: dict[int, int] = {}
        # The attention of some blocks reads keys and values of earlier ones, so that all of them have to run.
        self._skips = not getattr(text_config(base_of(model)), "num_kv_shared_layers", 0)

    @torch.no_grad()
    def run(
        self, block: int, number: int, batch: Mapping[str, torch.Tensor], also: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            block (`int`): Position of the block in `blocks`: 0 for all batches first, then 1, ...
            number (`int`): Number of the batch, the same in all runs.
            batch (`Mapping[str, torch.Tensor]`): `input_ids` and, if there is padding, `attention_mask`.
            also (`nn.Module`, *optional*): A module in this block whose input is returned too.

        Returns:
            The output of the block and the input of `also`, (tokens, width) each, without padding.
        """
        batch = right_padded(batch, input_device(self.model))
        mask, file = batch["attention_mask"].bool(), self.folder / f"{number}.pt"
        first = block - self.changes
        found: dict[str, torch.Tensor] = {}

        def tokens(hidden: torch.Tensor) -> torch.Tensor:
            stream = self.blocks[block].anatomy.stream
            if hidden.dim() == 4 and stream is not None:
                hidden = hidden[stream]
            return hidden.reshape(-1, hidden.shape[-1])[mask.flatten().to(hidden.device)]

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._widths[first] = len(output) if isinstance(output, tuple) else 0
            torch.save(get_hidden(output, module).cpu(), file)

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found["output"] = tokens(get_hidden(output, module))
            raise _StopForwardError

        def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            found["also"] = tokens(get_hidden(args or kwargs, module))

        with evaluation(self.model), ExitStack() as stack:
            if self._skips and first > 0:
                for position in range(first):
                    stack.callback(_skip(self.blocks[position].module, self._widths[position]))
                stack.callback(_replace_input(self.blocks[first].module, torch.load(file)))
            if first >= 0:
                stack.callback(self.blocks[first].module.register_forward_hook(keep).remove)
            if also is not None:
                stack.callback(also.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            stack.callback(self.blocks[block].module.register_forward_hook(stop).remove)
            with suppress(_StopForwardError):
                self.model(**batch, **fewest_outputs(self.model))
        return found["output"], found.get("also")


class _StopForwardError(Exception):
    """Ends a forward pass."""


def _skip(module: nn.Module, width: int) -> Any:
    """Makes a block return its hidden states unchanged, in a tuple of `width` entries if it returns a tuple. Returns
    the function that undoes it."""
    before = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = get_hidden(args or kwargs, module)
        return (hidden, *[None] * (width - 1)) if width else hidden

    def restore() -> None:
        vars(module).pop("forward")
        if before is not None:
            module.forward = before

    module.forward = forward
    return restore


def _replace_input(module: nn.Module, hidden: torch.Tensor) -> Any:
    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = get_hidden(args or kwargs, module)
        new = hidden.to(given.device)
        return (replace_hidden(args, new), kwargs) if args else (args, replace_hidden(kwargs, new))

    return module.register_forward_pre_hook(replace, with_kwargs=True).remove
