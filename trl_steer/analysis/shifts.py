"""Whether LoRA and steering shift hidden states in the same direction (arXiv 2603.00425, section 6.5 and Figure 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..tuners.steering.sites import get_hidden
from .adapters import lora_outside_attention, steering_at
from .states import Block, blocks_of, evaluation, input_device, right_padded, run_model

BINS = 100


def shift_similarity(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """
    The cosine similarity of the shifts of steering and of LoRA, for each token and block.

    In the model with its joint adapter, the shift of steering is what it adds to the output of the block, and that of
    LoRA the difference of what the MLP adds to the residual stream with and without LoRA in the MLP, for the same
    input of the MLP. Tokens where one of them is zero are left out.

    Args:
        model (`nn.Module`): A model with an active joint adapter.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): See [`text_batches`].

    Returns:
        `dict`: `blocks`, a list with `block`, `tokens`, and the `mean`, the `mean_abs` (of the absolute value) and the
        `std` of the similarity over the tokens; the same over all blocks, without `block`; and a histogram over all
        blocks: `edges` (101,) of its bins and `counts` (100,).

    Raises:
        ValueError: The model has no block with both LoRA in the MLP and steering, an adapter is merged, or there are
            no tokens where both shifts are not zero.
    """
    pairs = {block.index: _Shifts(block) for block in blocks_of(model)}
    pairs = {index: shifts for index, shifts in pairs.items() if shifts.is_complete}
    if not pairs:
        raise ValueError(
            "Expected a joint adapter with LoRA on the MLPs, but no block has both an active LoRA layer in its MLP "
            "and active steering of its output. `trl-steer join` makes one from a LoRA and a steering adapter."
        )
    moments = {index: torch.zeros(4, dtype=torch.float64) for index in pairs}
    counts = torch.zeros(BINS, dtype=torch.int64)
    for batch in batches:
        padded = right_padded(batch, input_device(model))
        mask = padded["attention_mask"].bool().flatten()
        with torch.no_grad(), evaluation(model), ExitStack() as stack:
            for shifts in pairs.values():
                stack.enter_context(shifts.recorded(mask))
            run_model(model, padded)
        for index, shifts in pairs.items():
            similarity = shifts.similarity()
            moments[index] += torch.stack([similarity**0, similarity, similarity.abs(), similarity**2]).sum(1)
            counts += torch.histc(similarity, BINS, -1, 1).long()
    total = torch.stack(list(moments.values())).sum(0)
    if not total[0]:
        raise ValueError("There is no token where both shifts are not zero: the adapter is untrained, or has no text.")
    return {
        "blocks": [{"block": index, **_summary(sums)} for index, sums in moments.items()],
        **_summary(total),
        "edges": torch.linspace(-1, 1, BINS + 1, dtype=torch.float64).tolist(),
        "counts": counts.tolist(),
    }


def _summary(moments: torch.Tensor) -> dict[str, Any]:
    tokens = int(moments[0])
    if not tokens:
        return {"tokens": 0, "mean": None, "mean_abs": None, "std": None}
    mean, mean_abs, mean_square = (moments[1:] / tokens).tolist()
    return {"tokens": tokens, "mean": mean, "mean_abs": mean_abs, "std": max(mean_square - mean**2, 0) ** 0.5}


class _Shifts:
    """
    The two shifts of one block in one forward pass.

    When the block has run, it runs once more without LoRA in its MLP. It then gets the same inputs, and its attention
    is the same, so the MLP gets the same input too.
    """

    def __init__(self, block: Block):
        self.block = block
        self.lora = list(lora_outside_attention(block).values())
        self.steering = [layer for layer, _ in steering_at(block, "post_block")]
        self._mlp: Any = None
        self._shifts: dict[str, torch.Tensor] = {}

    @property
    def is_complete(self) -> bool:
        return bool(self.lora and self.steering)

    @contextmanager
    def recorded(self, mask: torch.Tensor) -> Iterator[None]:
        """Context manager that records the shifts of the tokens in `mask` (rows * length,)."""
        layer = self.steering[0]
        mlp = self.block.module.get_submodule(self.block.site("post_mlp").module)
        with ExitStack() as stack:
            # The hook of steering has been registered with `prepend=True`, so it runs before the one of this block.
            for hook in (
                mlp.register_forward_hook(lambda module, _, output: self._keep_mlp(get_hidden(output, module), mask)),
                layer.register_forward_pre_hook(lambda layer, args: self._keep_steering(layer, args[0], mask)),
                self.block.module.register_forward_hook(
                    lambda block, args, kwargs, _: self._run_without_lora(block, args, kwargs), with_kwargs=True
                ),
            ):
                stack.callback(hook.remove)
            yield

    def similarity(self) -> torch.Tensor:
        """(tokens,), float64, on the CPU."""
        steering, lora = self._shifts["steering"], self._shifts["lora"]
        both = (steering.norm(dim=1) > 0) & (lora.norm(dim=1) > 0)
        return torch.cosine_similarity(steering[both], lora[both], dim=1, eps=0).clamp(-1, 1).cpu()

    def _keep_mlp(self, output: torch.Tensor, mask: torch.Tensor) -> None:
        self._mlp = output.reshape(-1, output.shape[-1])[mask.to(output.device)].double()

    def _keep_steering(self, layer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        shift = layer.forward(hidden.double(), site="post_block") - hidden.double()
        self._shifts["steering"] = shift.reshape(-1, shift.shape[-1])[mask.to(shift.device)]

    def _run_without_lora(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        with_lora = self._mlp
        with _disabled(self.lora):
            block.forward(*args, **kwargs)  # without the hooks of the block, of which this is one
        self._shifts["lora"] = with_lora - self._mlp


@contextmanager
def _disabled(layers: list[Any]) -> Iterator[None]:
    """Not with `enable_adapters`, which would also set `requires_grad`."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
