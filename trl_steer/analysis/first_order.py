"""The first-order theory of steering and weight updates (arXiv 2603.00425, section 3.2 and appendix B)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call, jvp

from ..choices import ALL
from .adapters import lora_outside_attention, steering_at
from .states import Block, blocks_of, record

SCALES = tuple(10 ** (exponent / 2) for exponent in range(-6, 1))
# The slope is fitted to the scales up to this one. Beyond, terms of higher order are visible.
LARGEST_SCALE = 1e-2
# Remainders below this fraction of the change are rounding errors.
ROUNDING = 1e-10


def first_order(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    scales: Sequence[float] = SCALES,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    The change of an MLP's output, compared with its first-order prediction, along two paths.

    With `m` the MLP, `x` (d,) its input and `e` the scale:

    - *steering*: `m(x + e dx) - m(x)` against `e J dx`, with `J` the Jacobian of the MLP;
    - *weights*: `m_{W + e dW}(x) - m_W(x)` against its derivative, which is the sum of two terms: that of `dW` in the
      last linear layer, `dW_d phi`, which no steering before the MLP can express, and that of the other layers.

    What remains is of second order, so its logarithm over that of `e` has slope 2. `dx` and `dW` are those of the
    model's active adapter, if it has steering at `pre_mlp` or LoRA in the MLP (`e = 1` is the adapter as trained), and
    random otherwise (`e = 1` is as large as `x` or `W`). `x` is that of the base model. Computed in float64.

    Args:
        model (`nn.Module`): A causal language model, with or without adapters.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): See [`text_batches`].
        scales (`Sequence[float]`): The values of `e`.
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: all.
        seed (`int`, defaults to 0): Seed of the random directions.

    Returns:
        `list[dict]`: For each block and path `block`, `path` (`"steering"` or `"weights"`) and `source` (`"adapter"`
        or `"random"`); for each scale (lists) `scale`, `change`, `predicted` and `remainder`, which are root mean
        squares over tokens of norms (of the prediction's error for `remainder`); `slope`, that of the remainder over
        the scales up to 0.01, `None` for a linear change; and for weights, unless the MLP has experts, `last_layer`
        and `other_layers`, the norms of the two terms at `e = 1`.

    Raises:
        ValueError: There are no tokens, a block does not exist or has no MLP, or its weights are quantized or
            offloaded.
    """
    chosen = blocks_of(model, blocks)
    paths = {(block.index, kind): _Path(scales) for block in chosen for kind in ("steering", "weights")}
    tokens = 0
    for batch in batches:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            states = record(model, batch, ["pre_mlp"], [block.index for block in chosen])
        tokens += sum(states.lengths)
        for block in chosen:
            _measure(block, states[block.index, "pre_mlp"], paths, seed)
    if not tokens:
        raise ValueError("There are no prompts to measure on.")
    return [{"block": index, "path": kind, **path.result(tokens)} for (index, kind), path in paths.items()]


class _Path:
    """Sums of squares of the changes along one path."""

    def __init__(self, scales: Sequence[float]):
        self.scales = list(scales)
        self.sums = torch.zeros(3, len(self.scales), dtype=torch.float64)
        self.terms: Any = None
        self.source = ""

    def result(self, tokens: int) -> dict[str, Any]:
        change, predicted, remainder = (self.sums / tokens).sqrt().tolist()
        result = {
            "source": self.source,
            "scale": self.scales,
            "change": change,
            "predicted": predicted,
            "remainder": remainder,
            "slope": slope(self.scales, change, remainder),
        }
        if self.terms is not None:
            last, others = (self.terms / tokens).sqrt().tolist()
            result |= {"last_layer": last, "other_layers": others}
        return result


def slope(scales: Sequence[float], changes: Sequence[float], remainders: Sequence[float]) -> float | None:
    """The slope of the logarithms of remainders over those of scales up to [`LARGEST_SCALE`], by least squares. `None`
    if the change is linear, so that remainders are rounding errors."""
    points = [
        (math.log(scale), math.log(remainder))
        for scale, change, remainder in zip(scales, changes, remainders, strict=True)
        if scale <= LARGEST_SCALE * (1 + 1e-9) and remainder > ROUNDING * change
    ]
    if len(points) < 2:
        return None
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


@torch.no_grad()
def _measure(block: Block, x: torch.Tensor, paths: dict[tuple[int, str], _Path], seed: int) -> None:
    mlp, delta, last = _float64_mlp(block)
    generator = torch.Generator().manual_seed(seed + block.index)
    matrices: dict[str, torch.Tensor] = {name: p for name, p in mlp.named_parameters() if p.dim() > 1}
    no_change = {name: torch.zeros_like(p) for name, p in matrices.items()}
    direction = _steering_at_input(block, x)
    steering, weights = paths[block.index, "steering"], paths[block.index, "weights"]
    steering.source = "random" if direction is None else "adapter"
    weights.source = "adapter" if delta else "random"
    unit = torch.randn(x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    if direction is None:
        direction = x.norm(dim=1, keepdim=True) * unit / unit.norm()
    if not delta:
        drawn = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in matrices.items()}
        delta = {name: drawn[name].to(p) * p.norm() / drawn[name].norm() for name, p in matrices.items()}
    delta = {**no_change, **delta}

    def output(changed: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        value = functional_call(mlp, changed, (at[None],))
        return (value if isinstance(value, torch.Tensor) else value[0])[0]

    def derivative(tangent: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        return jvp(output, (matrices, x), (tangent, at))[1]

    _add(
        steering, output(matrices, x), derivative(no_change, direction), lambda e: output(matrices, x + e * direction)
    )
    terms = [derivative({**no_change, last: delta[last]}, torch.zeros_like(x))] if last else []
    if last:
        terms.append(derivative({**delta, last: no_change[last]}, torch.zeros_like(x)))
        squares = torch.stack([term.square().sum() for term in terms]).cpu()
        weights.terms = squares if weights.terms is None else weights.terms + squares
    slopes = sum(terms) if terms else derivative(delta, torch.zeros_like(x))
    _add(weights, output(matrices, x), slopes, lambda e: output({n: p + e * delta[n] for n, p in matrices.items()}, x))


def _add(path: _Path, before: torch.Tensor, derivative: Any, output_at: Any) -> None:
    for index, scale in enumerate(path.scales):
        change = output_at(scale) - before
        for row, value in enumerate((change, scale * derivative, change - scale * derivative)):
            path.sums[row, index] += value.square().sum().cpu()


def _float64_mlp(block: Block) -> tuple[nn.Module, dict[str, torch.Tensor], str | None]:
    """A copy of the base model's MLP in float64, what active LoRA layers in it add to its weights, by their names, and
    the name of the weight of its last linear layer."""
    original = block.anatomy.mlp_module()
    if any(p.is_meta or not p.is_floating_point() for p in original.parameters()):
        raise ValueError(
            f"The MLP of block {block.index} is quantized or offloaded. Load the model in float32, without either."
        )
    lora = [id(layer) for layer in lora_outside_attention(block).values()]
    has_experts = any(parameter.dim() > 2 for parameter in original.parameters())
    last = None if has_experts else block.anatomy.linear_layers().get(block.anatomy.mlp_output() or "")
    delta, last_weight, mlp = {}, None, copy.deepcopy(original)
    modules: list[tuple[str, Any]] = list(original.named_modules())
    for name, layer in modules:
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if base is last and last is not None:
            last_weight = f"{name.removesuffix('.base_layer')}.weight"
        if id(layer) in lora:
            updates = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_B]
            delta[f"{name}.weight"] = torch.stack(updates).double().sum(0)
    _remove_adapters(mlp)
    return mlp.double().eval(), delta, last_weight


def _remove_adapters(mlp: nn.Module) -> None:
    """Removes adapters and hooks from a copy of an MLP."""
    modules: list[tuple[str, Any]] = list(mlp.named_modules())
    for name, layer in modules:
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        if hasattr(getattr(layer, "config", None), "_experts_implementation"):
            layer.config._experts_implementation = "eager"  # other implementations have no float64
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(mlp.get_submodule(parent), child, layer.get_base_layer())


def _steering_at_input(block: Block, x: torch.Tensor) -> torch.Tensor | None:
    """What active steering adds to the input of the MLP, (tokens, d)."""
    for layer, name in steering_at(block, "pre_mlp"):
        if layer.adapters[name].positions == ALL:
            return layer(x[None], site="pre_mlp")[0] - x
    return None
