"""Many adapters: in one batch, loaded of which a batch uses a few, and added to a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from peft import PeftConfig, PeftModel
from transformers import DynamicCache, PreTrainedModel

from trl_steer import PostBlockSteeringConfig

from . import models
from .harness import Result, alternate, compare

NAME = "adapters"
ROWS, TOKENS = 256, 8
IN_BATCH, BOUNDED = (1, 8, 64, 256), 64
NAMED, LOADED, ADDED = 8, 1000, 64
ONE, OURS, LORA = "one adapter for all rows", "low rank r=8", "LoRA r=8 all-linear"
ROUNDS_PER_REPEAT = 3


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratios for batches with several adapters, for many that are loaded, and for adding adapters."""
    config = models.tiny() if quick else models.eight_blocks()
    name = "tiny Llama" if quick else "Llama 8 x 512"
    base, bounded = models.build(config, device).eval(), not quick and device == "cpu"
    yield from _in_one_batch(base, name, device, repeats, bounded)
    yield from _loaded(base, name, 2 * NAMED if quick else LOADED, device, repeats, bounded)
    if not quick:
        config.num_hidden_layers = 16
        name = "Llama 16 x 512"
    yield _added(models.build(config, device), name, device, repeats, bounded)


def _in_one_batch(base: PreTrainedModel, name: str, device: str, repeats: int, bounded: bool) -> Iterator[Result]:
    model = _adapted(base, max(IN_BATCH))
    tokens = models.random_tokens(base.config, ROWS, TOKENS, device)
    for stage, make in _STAGES.items():
        sides = {ONE: make(model, tokens)}
        sides |= {_adapters(count): make(model, tokens, _names(count, ROWS)) for count in IN_BATCH}
        times = alternate(sides, repeats * ROUNDS_PER_REPEAT, device, warmup=2)
        for count in IN_BATCH:
            bound = "<= 1.15" if bounded and count == BOUNDED else None
            case = f"{stage}, {name}, float32, {ROWS} rows"
            yield compare(NAME, case, times, _adapters(count), ONE, bound=bound)


def _loaded(
    base: PreTrainedModel, name: str, count: int, device: str, repeats: int, bounded: bool
) -> Iterator[Result]:
    loaded = {f"{each} adapters loaded": _adapted(base, each) for each in (count, NAMED)}
    many, few = loaded
    tokens = models.random_tokens(base.config, NAMED, TOKENS, device)
    for stage, make in _STAGES.items():
        sides = {side: make(model, tokens, _names(NAMED, NAMED)) for side, model in loaded.items()}
        times = alternate(sides, repeats * ROUNDS_PER_REPEAT, device, warmup=2)
        case = f"{stage}, {name}, float32, {NAMED} rows of {NAMED} adapters"
        yield compare(NAME, case, times, many, few, bound="<= 1.05" if bounded else None)


def _added(base: PreTrainedModel, name: str, device: str, repeats: int, bounded: bool) -> Result:
    sides = {
        OURS: lambda: _adapted(base, ADDED),
        LORA: lambda: _adapted(base, ADDED, models.adapter_config("lora")),
    }
    times = alternate(sides, repeats, device)
    return compare(NAME, f"adding {ADDED} adapters, {name}", times, OURS, LORA, bound="<= 0.5" if bounded else None)


def _adapted(base: PreTrainedModel, count: int, config: PeftConfig | None = None) -> PeftModel:
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


def _adapters(count: int) -> str:
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


_STAGES: dict[str, Callable[..., Callable[[], None]]] = {
    f"prefill of {TOKENS} tokens": _prefill,
    f"1 token after {TOKENS}": _decode,
}
