"""Runs single blocks of a model, to test whether an update can be merged there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapter import AffineUpdate
from .matching import text_config
from .sites import BlockAnatomy, Site, get_hidden, replace_hidden

_PROBE_TOKENS = 32


class Call(NamedTuple):
    """The arguments of a call of a block."""

    args: tuple
    kwargs: dict


@contextmanager
def adapters_disabled(model: nn.Module, layers: dict[str, Any]) -> Iterator[None]:
    """Context manager in which the model is in evaluation mode and the adapters of `layers` are disabled."""
    modes = [(module, module.training) for module in model.modules()]
    enabled = [layer for layer in layers.values() if not layer.disable_adapters]
    try:
        model.eval()
        for layer in enabled:
            layer._disable_adapters = True  # `enable_adapters` would change `requires_grad`
        yield
    finally:
        for layer in enabled:
            layer._disable_adapters = False
        for module, training in modes:
            module.training = training


@torch.no_grad()
def record_block_calls(model: Any, layers: dict[str, Any]) -> dict[str, Call]:
    """Runs the model on a prompt and records the arguments with which it calls each block.

    Raises:
        ValueError: The model cannot be run on token ids alone.
    """
    found: dict[str, Call] = {}
    handles = [
        layer.get_base_layer().register_forward_pre_hook(_record_call(found, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    embeddings = model.get_input_embeddings()
    positions = getattr(text_config(model), "max_position_embeddings", None) or 0
    count = min(_PROBE_TOKENS, positions) if positions > 0 else _PROBE_TOKENS  # XLNet has -1, no limit
    tokens = torch.arange(count, device=embeddings.weight.device).remainder(len(embeddings.weight))
    names = ["input_ids"]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    try:
        model(**dict.fromkeys(names, tokens[None]), use_cache=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Adapters cannot be merged into {type(model).__name__}: to test that merging is exact, it was run on "
            f"{' and '.join(names)} alone, which failed ({type(error).__name__}: {error}). Keep the adapter instead "
            "(`save_pretrained`)."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _record_call(found: dict[str, Call], name: str) -> Callable:
    return lambda module, args, kwargs: found.__setitem__(name, Call(args, kwargs))


def input_linear_layers(anatomy: BlockAnatomy, site: Site, linears: dict[str, Any], call: Call) -> list[str]:
    """Names of the linear layers of a block whose input is the input of the site's module, or a view of it."""
    entered: list[torch.Tensor] = []
    found: list[str] = []

    def enter(module, args, kwargs):
        entered.append(get_hidden(args or kwargs))

    def read(name):
        def hook(module, args):
            if entered and args[0].data_ptr() == entered[-1].data_ptr() and args[0].numel() == entered[-1].numel():
                found.append(name)

        return hook

    target = anatomy.block.get_submodule(site.module)
    handles = [target.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [linear.register_forward_pre_hook(read(name)) for name, linear in linears.items()]
    try:
        anatomy.block(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def output_with_update(anatomy: BlockAnatomy, site: Site, update: AffineUpdate, call: Call) -> torch.Tensor:
    """The output of a block, in float64, when a hook applies an update at a site."""

    def steered(hidden: torch.Tensor) -> torch.Tensor:
        h = hidden.double()
        h = h + update.multiply(h, transpose=True)
        return (h if update.offset is None else h + update.offset).to(hidden.dtype)

    def on_input(module, args, kwargs):
        if args:
            return (steered(args[0]), *args[1:]), kwargs
        return args, replace_hidden(kwargs, steered(get_hidden(kwargs)))

    def on_output(module, args, output):
        return replace_hidden(output, steered(get_hidden(output)))

    module = anatomy.block.get_submodule(site.module)
    handle = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if site.is_input
        else module.register_forward_hook(on_output)
    )
    try:
        return get_hidden(anatomy.block(*call.args, **call.kwargs)).double()
    finally:
        handle.remove()
