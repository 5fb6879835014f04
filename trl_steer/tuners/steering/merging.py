"""Merges updates into the base model, where that is exact.

An affine update `h + M h + v` of the output of a linear layer can be merged into this layer, as `(I + M) W` and
`(I + M) b + v`. An update of the input of linear layers can be merged into each of them, as `W (I + M)` and `b + W v`.

This requires that nothing but these linear layers returns or takes the hidden state, and that there is a bias to add
to: a bias that the model's configuration does not provide for would be lost when the model is saved and loaded. After
a residual addition, only `v` can be merged, since `M` also acts on the skip connection.

Whether merging is exact does not depend on a table of models. It is tested by running each block with random updates,
once applied by hooks and once merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_steer.choices import ALL

from .adapter import AffineUpdate
from .probing import Call, adapters_disabled, input_linear_layers, output_with_update, record_block_calls
from .sites import BlockAnatomy, Site, get_hidden

# Largest difference between the outputs of a block with merged and with hooked updates, relative to the effect of the
# update on the same token. Allows for rounding only.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 5e-2

_ADVICE = (
    "Keep it as an adapter: save it with `save_pretrained` and load it with `PeftModel.from_pretrained`. It cannot be "
    "used with engines that need merged weights, such as vLLM (`use_vllm=True` in TRL); generate with transformers "
    "(`use_vllm=False`)."
)


class MergedTensor(NamedTuple):
    """A weight or bias that an update was merged into, and its values before and after."""

    parameter: nn.Parameter
    before: torch.Tensor
    after: torch.Tensor


def merge(tuner: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Merges adapters into linear layers of the base model, by default the active ones.

    Active adapters all get the same hidden state. So adapters that are already merged are unmerged, and merged again
    together with the new ones.

    Raises:
        ValueError: There is no such adapter, or an update cannot be merged exactly. The model is left unchanged.
    """
    names = tuner.active_adapters if adapter_names is None else adapter_names
    for name in names:
        if name not in tuner.peft_config:
            raise ValueError(
                f"There is no adapter {name!r} to merge in this model, which has {list(tuner.peft_config)}."
            )
    layers = {name: layer for name, layer in tuner.named_steering_layers() if set(names) & set(layer.adapters)}
    new = {
        name: [adapter for adapter in check_adapters_to_merge(layer, names) if adapter in layer.adapters]
        for name, layer in layers.items()
    }
    layers = {name: layer for name, layer in layers.items() if new[name]}
    together = {name: layer.merged_adapters + new[name] for name, layer in layers.items()}
    updates = {name: _updates(layer, together[name]) for name, layer in layers.items()}
    shared = _shared_parameters(tuner.model)
    done: list[tuple[Any, MergedTensor]] = []
    with _restored_merges_on_failure(layers.values(), done):
        for layer in layers.values():
            unmerge(layer)
        with adapters_disabled(tuner.model, dict(tuner.named_steering_layers())):
            calls = record_block_calls(tuner.model, layers)
            for name, layer in layers.items():
                for site_name, update in updates[name].items():
                    site = layer.anatomy.site(site_name)
                    for merged in _plan_merge(name, layer.anatomy, site, update, calls[name]):
                        if id(merged.parameter) in shared:
                            raise ValueError(_cannot_merge(name, "into weights that are shared with other layers"))
                        if safe_merge and not torch.isfinite(merged.after).all():
                            raise ValueError(
                                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                                f"broken: its weights at {name} have NaN or infinite values. Nothing was merged."
                            )
                        merged.parameter.data = merged.after.clone()  # other adapters may be merged into it in place
                        done.append((layer, merged))
    for layer, merged in done:
        layer.merged_tensors.append(merged)
    for name, layer in layers.items():
        layer.merged_adapters[:] = together[name]


@contextmanager
def _restored_merges_on_failure(layers: Iterable[Any], done: list[tuple[Any, MergedTensor]]) -> Iterator[None]:
    before = [
        (layer, list(layer.merged_adapters), [(tensor, tensor.parameter.data) for tensor in layer.merged_tensors])
        for layer in layers
    ]
    try:
        yield
    except BaseException:
        for _, merged in reversed(done):
            merged.parameter.data = merged.before
        for layer, names, tensors in before:
            layer.merged_adapters[:] = names
            layer.merged_tensors[:] = [tensor for tensor, _ in tensors]
            for tensor, data in tensors:
                tensor.parameter.data = data
        raise


def unmerge(layer: Any) -> None:
    """Restores the tensors that were merged into. If one has changed since, only subtracts the update."""
    for parameter, before, after in reversed(layer.merged_tensors):
        now = parameter.data
        before, after = (tensor.to(device=now.device, dtype=now.dtype) for tensor in (before, after))
        parameter.data = before if torch.equal(now, after) else now - (after - before)
    layer.merged_tensors.clear()
    layer.merged_adapters.clear()


def merge_other_layers(tuner: Any, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Merges the other adapter layers, as [`~peft.tuners.tuners_utils.BaseTuner.merge_adapter`] does. If merging fails
    in a layer, this layer is restored."""
    for layer in tuner.model.modules():
        if isinstance(layer, BaseTunerLayer) and not hasattr(layer, "merged_tensors"):
            with onload_layer(layer), _restored_on_failure(layer):
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)


@contextmanager
def _restored_on_failure(layer: Any) -> Iterator[None]:
    base, merged = layer.get_base_layer(), list(layer.merged_adapters)
    before = [
        (module, name, parameter, parameter.data.clone())
        for module in base.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        yield
    except BaseException:
        for module, name, parameter, value in before:
            parameter.data.copy_(value)
            module._parameters[name] = parameter  # for a quantized weight, merging assigns a new parameter
        layer.merged_adapters[:] = merged
        raise


def _shared_parameters(model: nn.Module) -> set[int]:
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in counts.items() if count > 1}


def _updates(layer: Any, names: list[str]) -> dict[str, AffineUpdate]:
    """The sum of the updates to merge, for each site of a block."""
    parts: dict[str, list[AffineUpdate]] = {}
    for name in names:
        adapter = layer.adapters[name]
        try:
            if adapter.is_offloaded():
                raise ValueError("its weights are offloaded.")
            if adapter.positions != ALL:
                raise ValueError(f"with positions={adapter.positions!r} it edits some tokens only.")
            update = adapter.merge(layer.anatomy.site(adapter.site), layer.effective_scaling(name, adapter))
            if adapter.site == "post_block" and not update.is_offset:
                raise ValueError(
                    "its update multiplies the residual stream including the skip connection, which no change of "
                    "weights can do."
                )
        except ValueError as error:
            raise ValueError(f"Adapter {name!r} cannot be merged: {error} {_ADVICE}") from error
        parts.setdefault(adapter.site, []).append(update)
    return {site: _sum(updates) for site, updates in parts.items()}


def _sum(updates: list[AffineUpdate]) -> AffineUpdate:
    lefts = [update.left.double() for update in updates if update.left is not None]
    rights = [update.right.double() for update in updates if update.right is not None]
    offsets = [update.offset.double() for update in updates if update.offset is not None]
    diagonals = [update.diagonal.double() for update in updates if update.diagonal is not None]
    return AffineUpdate(
        torch.cat(lefts, dim=1) if lefts else None,
        torch.cat(rights) if rights else None,
        torch.stack(offsets).sum(0) if offsets else None,
        torch.stack(diagonals).sum(0) if diagonals else None,
    )


@torch.no_grad()
def _plan_merge(name: str, anatomy: BlockAnatomy, site: Site, update: AffineUpdate, call: Call) -> list[MergedTensor]:
    """The changes that merge an update at a site, after testing that they are exact."""
    linears = _linear_layers_at(name, anatomy, site, call)
    for linear, linear_name in linears:
        _check_mergeable(name, linear, linear_name, update, anatomy, site)
    device = linears[0][0].weight.device
    update = AffineUpdate(*(None if part is None else part.to(device) for part in update))
    plain = get_hidden(anatomy.block(*call.args, **call.kwargs))
    probe = _random_like(update, plain.double().std())
    with _temporarily_merged([m for linear, _ in linears for m in _merged(linear, site, probe)]):
        merged = get_hidden(anatomy.block(*call.args, **call.kwargs)).double()
    hooked = output_with_update(anatomy, site, probe, call)
    tolerance = _TOLERANCE.get(linears[0][0].weight.dtype, _TOLERANCE_16_BIT)
    # The residual stream has entries that are much larger than the others, and are rounded accordingly.
    rounding = 8 * torch.finfo(plain.dtype).eps * hooked.abs()
    effect = (hooked - plain.double()).abs().amax(dim=-1, keepdim=True)
    if not ((merged - hooked).abs() <= tolerance * effect + rounding).all():
        raise ValueError(
            _cannot_merge(
                name,
                f"at {site.name}: the hidden state there is not exactly the {'input' if site.is_input else 'output'} "
                f"of {', '.join(n for _, n in linears)} (there is a norm, a factor or another layer in between)",
            )
        )
    return [merged for linear, _ in linears for merged in _merged(linear, site, update)]


def _linear_layers_at(name: str, anatomy: BlockAnatomy, site: Site, call: Call) -> list[tuple[Any, str]]:
    """The linear layers whose input is the hidden state of the site, or the one whose output it is."""
    linears = anatomy.linear_layers()
    if site.is_input:
        found = input_linear_layers(anatomy, site, linears, call)
    else:
        last = anatomy.attention_output() if site.name == "post_attn" else anatomy.mlp_output()
        found = [last] if last is not None else []
    if not found:
        raise ValueError(_cannot_merge(name, f"at {site.name}: no linear layer was found there"))
    return [(linears[linear], linear) for linear in found]


def _check_mergeable(
    name: str, linear: Any, linear_name: str, update: AffineUpdate, anatomy: BlockAnatomy, site: Site
) -> None:
    """Checks that an update can be merged into a linear layer, as far as possible without running it.

    Raises:
        ValueError: It cannot: the layer is trained in full, offloaded, quantized, has an adapter or lacks a bias.
    """
    parent = anatomy.block.get_submodule(linear_name.rpartition(".")[0])
    wrapper = anatomy.block.get_submodule(linear_name)
    if isinstance(parent, AuxiliaryTrainingWrapper) or ".modules_to_save." in f".{linear_name}":
        raise ValueError(_cannot_merge(name, f"into {linear_name}, which is one of modules_to_save"))
    if linear.weight.is_meta:
        raise ValueError(
            _cannot_merge(
                name, "while the weights of the block are offloaded", "Load the base model without offloading."
            )
        )
    if not update.is_offset and isinstance(wrapper, BaseTunerLayer):
        raise ValueError(_cannot_merge(name, f"into the weight of {linear_name}, which has an adapter of its own"))
    if (not update.is_offset or site.is_input) and not linear.weight.is_floating_point():
        raise ValueError(_cannot_merge(name, f"into {linear_name}, whose weight is quantized"))
    if update.offset is not None and linear.bias is None:
        field = "attention_bias" if anatomy.is_in_attention(linear_name) else "mlp_bias"
        hint = (
            f" The model's configuration has `{field}`: load the base model with `{field}=True`, which adds zero "
            "biases, then load the adapter and merge it."
            if getattr(anatomy.config, field, None) is False
            else ""
        )
        raise ValueError(
            _cannot_merge(
                name,
                f"into {linear_name}, which has no bias. One that the model's configuration does not provide for "
                "would be lost when the model is saved and loaded",
            )
            + hint
        )


def _merged(linear: Any, site: Site, update: AffineUpdate) -> Iterator[MergedTensor]:
    """The tensors of a linear layer that change when an update is merged into it, computed in float64."""
    transposed = isinstance(linear, Conv1D)
    if not update.is_offset:
        weight = (linear.weight.data.mT if transposed else linear.weight.data).double()
        merged = update.multiply(weight) if site.is_input else update.multiply(weight.mT, transpose=True).mT
        merged = (weight + merged).to(linear.weight.dtype)
        yield MergedTensor(linear.weight, linear.weight.data, (merged.mT if transposed else merged).contiguous())
    if linear.bias is not None:
        bias = linear.bias.data.double()
        added = torch.zeros_like(bias) if site.is_input else update.multiply(bias, transpose=True)
        if update.offset is not None and site.is_input:
            # the weight of before: an offset is not multiplied by the update
            added += (linear.weight.data.mT if transposed else linear.weight.data).double() @ update.offset
        elif update.offset is not None:
            added += update.offset
        if update.offset is not None or not site.is_input:
            yield MergedTensor(linear.bias, linear.bias.data, (bias + added).to(linear.bias.dtype))


@contextmanager
def _temporarily_merged(tensors: list[MergedTensor]) -> Iterator[None]:
    """Context manager in which the merged tensors are used by the model."""
    try:
        for parameter, _, after in tensors:
            parameter.data = after
        yield
    finally:
        for parameter, before, _ in tensors:
            parameter.data = before


def _random_like(update: AffineUpdate, scale: torch.Tensor) -> AffineUpdate:
    """A random update with tensors of the same shapes, about as large as a hidden state of standard deviation
    `scale`."""
    left, right, offset, diagonal = (None if part is None else torch.randn_like(part) for part in update)
    if left is not None and right is not None:
        left, right = left / len(left) ** 0.5, right / len(right) ** 0.5
    return AffineUpdate(left, right, None if offset is None else offset * scale.to(offset.device), diagonal)


def _cannot_merge(layer_name: str, why: str, what_to_do: str = "") -> str:
    block = layer_name.rpartition(".")[0]
    advice = what_to_do or "Keep it as an adapter instead (`save_pretrained`)."
    return f"The steering update of {block} cannot be merged {why}. {advice}"
