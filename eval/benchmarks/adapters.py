"""Many adapters: in one batch, loaded of which a batch uses a few, and added to a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import DynamicCache

from trl_steer import PostBlockSteeringConfig

from . import models
from .harness import Result, alternate, compare

NAME = "adapters"
TOKENS = 8
ONE, OURS, LORA = "one adapter for all rows", "low rank r=8", "LoRA r=8 all-linear"
# A token takes a tenth of the time of a prefill.
_DECODES_PER_REPEAT = 4


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratios for batches with several adapters, for many that are loaded, and for adding adapters."""
    config, name = (models.tiny(), "tiny Llama") if quick else (models.eight_blocks(), "Llama 8 x 512")
    base = models.build(config, device).eval()
    bounded = not quick and device == "cpu"
    rows, counts, loaded, named, added = (8, (1, 4), 4, 2, 2) if quick else (256, (1, 8, 64, 256), 1000, 8, 64)
    yield from _in_one_batch(base, name, rows, counts, device, repeats, "<= 1.15" if bounded else None)
    yield from _loaded(base, name, loaded, named, device, repeats, "<= 1.05" if bounded else None)
    if not quick:
        config.num_hidden_layers, name = 16, "Llama 16 x 512"
    yield _added(models.build(config, device), name, added, device, repeats, "<= 0.5" if bounded else None)


def _in_one_batch(
    base: Any, name: str, rows: int, counts: tuple[int, ...], device: str, repeats: int, bound: str | None
) -> Iterator[Result]:
    """A batch with several adapters and one with a single active adapter. The bound is that of up to 64 adapters."""
    model = _adapted(base, max(counts))
    tokens = models.random_tokens(base.config, rows, TOKENS, device)
    for stage, (make, rounds) in _STAGES.items():
        sides = {ONE: make(model, tokens)}
        sides |= {_by_row(count): make(model, tokens, _names(count, rows)) for count in counts}
        times = alternate(sides, repeats * rounds, device)
        for count in counts:
            case = f"{stage}, {name}, float32, {rows} rows"
            yield compare(NAME, case, times, _by_row(count), ONE, bound=bound if count <= 64 else None)


def _loaded(
    base: Any, name: str, loaded: int, named: int, device: str, repeats: int, bound: str | None
) -> Iterator[Result]:
    """A batch that names a few adapters, of many that are loaded and of no others."""
    by_count = {f"{count} adapters loaded": _adapted(base, count) for count in (loaded, named)}
    many, few = by_count
    tokens = models.random_tokens(base.config, named, TOKENS, device)
    for stage, (make, rounds) in _STAGES.items():
        sides = {side: make(model, tokens, _names(named, named)) for side, model in by_count.items()}
        times = alternate(sides, repeats * rounds, device)
        case = f"{stage}, {name}, float32, {named} rows of {named} adapters"
        yield compare(NAME, case, times, many, few, bound=bound)


def _added(base: Any, name: str, count: int, device: str, repeats: int, bound: str | None) -> Result:
    sides = {
        OURS: lambda: _adapted(base, count),
        LORA: lambda: _adapted(base, count, models.adapter_config("lora")),
    }
    times = alternate(sides, 3, device, warmup=0)  # since LoRA takes half a minute
    return compare(NAME, f"adding {count} adapters, {name}", times, OURS, LORA, bound=bound)


def _adapted(base: Any, count: int, config: PeftConfig | None = None) -> PeftModel:
    """A copy of `base` with the same weights and adapters named by [`_name`], of low rank by default."""
    config = config or PostBlockSteeringConfig(r=8, init_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.adapted(base, copy.deepcopy(config))
        for index in range(1, count):
            model.add_adapter(_name(index), copy.deepcopy(config))
    return model.eval()


def _names(count: int, rows: int) -> list[str]:
    """Names for rows, in an order that is not that of the adapters."""
    return [_name(row * 7 % count) for row in range(rows)]


def _name(index: int) -> str:
    return "default" if index == 0 else f"adapter{index}"


def _by_row(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)} by row"


def _prefill(model: PeftModel, tokens: torch.Tensor, names: list[str] | None = None) -> Callable[[], None]:
    by_row = {} if names is None else {"adapter_names": names}

    @torch.no_grad()
    def prefill() -> None:
        model(input_ids=tokens, use_cache=True, logits_to_keep=1, **by_row)

    return prefill


def _decode(model: PeftModel, tokens: torch.Tensor, names: list[str] | None = None) -> Callable[[], None]:
    by_row = {} if names is None else {"adapter_names": names}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **by_row)
    last = tokens[:, -1:]

    @torch.no_grad()
    def decode() -> None:
        model(input_ids=last, past_key_values=cache, use_cache=True, **by_row)
        cache.crop(-1)

    return decode


_STAGES: dict[str, tuple[Callable[..., Callable[[], None]], int]] = {
    f"prefill of {TOKENS} tokens": (_prefill, 1),
    f"1 token after {TOKENS}": (_decode, _DECODES_PER_REPEAT),
}
