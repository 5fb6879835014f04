"""Folding steering vectors into the base model, where that is exact.

`h + v` after the last residual addition is a bias on the last linear layer of the block, if the block adds that
layer's output straight to the residual stream, and if that layer has a bias: one that the model's configuration does
not know of would silently be lost by saving and loading. No table of models says so; each block is run and looked at.
The low-rank update also multiplies the skip path, so it folds into no weight at all.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..blocks import linear_layers, out_features, text_config
from .layer import PostBlockSteeringLayer

# How far a block's response to a bias may be from the bias itself, relative to the size of the output: rounding only.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 5e-2
_PROBE_TOKENS = 32


def fold(tuner, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Adds the vectors of `adapter_names` (the active adapters by default) to biases of the base model.

    Raises:
        ValueError: An adapter is low-rank, or some block cannot take a vector exactly. Nothing has changed then.
    """
    names = tuner.active_adapters if adapter_names is None else adapter_names
    _check_are_vectors(tuner, names)
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, PostBlockSteeringLayer) and any(adapter in layer.adapters for adapter in names)
    }
    sites = _find_sites(tuner, layers)
    folded = {}
    for site, layer in layers.items():
        to_merge = [name for name in check_adapters_to_merge(layer, names) if name in layer.adapters]
        bias = sites[site].bias
        dtype = torch.promote_types(bias.dtype, torch.float32)
        total = bias.data.to(dtype)
        for adapter in to_merge:
            steering: Any = layer.adapters[adapter]
            total = total + (steering.scaling * steering.vector.data.to(dtype)).to(total.device)
        if safe_merge and not torch.isfinite(total).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(to_merge)} seems to be broken: at "
                f"{site} its vector holds NaN or infinite values. Nothing was merged."
            )
        folded[site] = (to_merge, total.to(bias.dtype))
    for site, (to_merge, bias) in folded.items():
        layers[site].folded.append((sites[site], sites[site].bias.data, bias))
        sites[site].bias.data = bias.clone()  # which LoRA may write into
        layers[site].merged_adapters.extend(to_merge)


def unfold(layer: PostBlockSteeringLayer) -> None:
    """Puts the bias of before back, bit for bit; if something else was added to it since, only the vectors go."""
    for linear, before, after in reversed(layer.folded):
        now = linear.bias.data
        before, after = (bias.to(device=now.device, dtype=now.dtype) for bias in (before, after))
        # The bias of a LoRA adapter is merged into the same place, and taken out before or after this.
        linear.bias.data = before.clone() if torch.equal(now, after) else now - (after - before)
    layer.folded.clear()
    layer.merged_adapters.clear()


def _check_are_vectors(tuner, names: list[str]) -> None:
    for name in names:
        if name not in tuner.peft_config:
            raise ValueError(f"There is no adapter {name!r} to merge; this model has {sorted(tuner.peft_config)}.")
        if tuner._steering_config(tuner.peft_config[name]).steering_type != "vector":
            raise ValueError(
                f"Adapter {name!r} cannot be merged: low-rank post-block steering multiplies the whole residual "
                "stream, skip connection included, so it equals no change of weights. Keep it as an adapter: save it "
                "with `save_pretrained` and load it with `PeftModel.from_pretrained`. For the same reason it cannot "
                "be served by engines that want merged weights, such as vLLM under TRL's `use_vllm=True`; generate "
                "with transformers (`use_vllm=False`), or train steering_type='vector' on a model whose blocks end in "
                "a linear layer with bias."
            )


@torch.no_grad()
def _find_sites(tuner, layers: dict[str, PostBlockSteeringLayer]) -> dict[str, Any]:
    """For each layer, the module whose bias is the same as adding to the block's output."""
    model, was_training = tuner.model, tuner.model.training
    calls: dict[str, tuple] = {}
    last_linear: dict[str, Any] = {}

    def remember_call(name):
        return lambda module, args, kwargs: calls.__setitem__(name, (args, kwargs))

    embeddings = model.get_input_embeddings()
    count = min(_PROBE_TOKENS, getattr(text_config(model), "max_position_embeddings", None) or _PROBE_TOKENS)
    tokens = torch.arange(count, device=embeddings.weight.device).remainder(embeddings.num_embeddings)

    def remember_linear(name):
        def hook(module, args, output):
            # An expert that sees only some of the tokens is not a candidate.
            if output.numel() == count * layers[name].hidden_size:
                last_linear[name] = module

        return hook

    handles = []
    for name, layer in layers.items():
        block = layer.get_base_layer()
        handles.append(block.register_forward_pre_hook(remember_call(name), with_kwargs=True))
        for linear in linear_layers(block).values():
            if out_features(linear) == layer.hidden_size:
                handles.append(linear.register_forward_hook(remember_linear(name)))
    enabled = [layer for layer in layers.values() if not layer.disable_adapters]
    try:
        model.eval()
        for layer in enabled:
            layer._disable_adapters = True
        model(input_ids=tokens[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            _check_site(name, layer.get_base_layer(), last_linear.get(name), calls[name], tuner.model.config)
    finally:
        for handle in handles:
            handle.remove()
        for layer in enabled:
            layer._disable_adapters = False
        model.train(was_training)
    return last_linear


def _check_site(name: str, block: nn.Module, linear: Any, call: tuple, config) -> None:
    block_name = name.rpartition(".")[0]
    if linear is None or linear.bias is None:
        hint = (
            " Its configuration has `mlp_bias`: load the base model with `mlp_bias=True`, which adds biases of zero, "
            "then load the adapter and merge."
            if getattr(config, "mlp_bias", None) is False
            else ""
        )
        raise ValueError(
            f"The steering vector of {block_name} cannot be merged: the last linear layer of the block has no bias, "
            "and one that the model's configuration does not know of would be lost by saving and loading. Keep it as "
            f"an adapter instead (`save_pretrained`).{hint}"
        )
    if linear.bias.is_meta:
        raise ValueError(
            f"The steering vector of {block_name} cannot be merged while the weights of the block are offloaded. Load "
            "the base model without offloading."
        )
    bias = linear.bias.data
    args, kwargs = call
    before = _hidden(block(*args, **kwargs))
    probe = torch.randn_like(bias) * before.float().std().to(bias.dtype)
    try:
        linear.bias.data = bias + probe
        after = _hidden(block(*args, **kwargs))
    finally:
        linear.bias.data = bias
    error = (after.float() - before.float() - probe.float().to(after.device)).abs().max()
    scale = before.float().abs().max() + probe.float().abs().max()
    if not error <= _TOLERANCE.get(bias.dtype, _TOLERANCE_16_BIT) * scale:
        raise ValueError(
            f"The steering vector of {block_name} cannot be merged: the block does not add the output of its last "
            "linear layer straight to the residual stream (a norm, a factor or a router comes between), so a bias "
            "there is not the same. Keep it as an adapter instead (`save_pretrained`)."
        )


def _hidden(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
