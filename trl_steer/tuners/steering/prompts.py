"""The position of the prompt among the tokens of a forward pass.

The prompt is found from the arguments of the model, see [`prompt_in_call`]. Cached and generated tokens are not
edited, so each prompt token is edited once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .contexts import ContextStack
from .positions import chosen_tokens

logger = logging.get_logger(__name__)

# Arguments of transformers' models with the results of earlier forward passes. The first is that of 5.24 and later.
_CACHES = ("cache", "past_key_values", "cache_params")


class Prompt:
    """
    The prompt of each row of a batch, and the part of it in one forward pass.

    Args:
        mask (`torch.Tensor`): (batch, tokens), boolean. Which tokens belong to the prompt, including cached ones.
        start (`int`): Index of the first token of the forward pass. Earlier tokens are in the cache.
        length (`int`): Number of tokens of each row in the forward pass.
    """

    def __init__(self, mask: torch.Tensor, start: int, length: int):
        self.start, self.length, self.batch = start, length, len(mask)
        self.mask = mask
        self._indices: dict[tuple[str, int, torch.device], list[torch.Tensor]] = {}

    @property
    def is_over(self) -> bool:
        """Whether the forward pass starts after the prompt, so that there is nothing to edit."""
        return self.start >= self.mask.shape[1]

    def indices(self, positions: str, parts: int, device: torch.device) -> list[torch.Tensor]:
        """Indices into (batch * length) of the tokens to edit in this forward pass: in one tensor, or in two (`parts`)
        for the first and the last tokens."""
        key = (positions, parts, device)
        if key not in self._indices:
            first, last = chosen_tokens(self.mask, positions)
            groups = (first, last) if parts == 2 else (first | last,)
            self._indices[key] = [self._in_pass(chosen).to(device) for chosen in groups]
        return self._indices[key]

    def _in_pass(self, chosen: torch.Tensor) -> torch.Tensor:
        missing = self.start + self.length - chosen.shape[1]
        chosen = F.pad(chosen, (0, max(missing, 0)))[:, self.start : self.start + self.length]
        return chosen.flatten().nonzero().flatten()


class _Generation:
    """
    A call of `generate`. All of its forward passes have the same prompt.

    Args:
        model (`nn.Module`): The model.
        args (`tuple`), kwargs (`Mapping`): The arguments of `generate`.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]):
        given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        tokens = next((value for value in given if isinstance(value, torch.Tensor)), None)
        self.model = model
        self.attention_mask = kwargs.get("attention_mask")
        if self.attention_mask is None and tokens is not None and tokens.dim() == 2:
            self.attention_mask = _guessed_mask(model, tokens, kwargs)
        # With a cache from an earlier call, the tokens may be only the new ones, while the mask is for all.
        shapes = [value.shape for value in (tokens, self.attention_mask) if value is not None]
        self.length = max((shape[1] for shape in shapes), default=1)
        self._cache: ref | None = None
        self._computed = 0

    def is_for(self, cache: Any) -> bool:
        """Whether a cache is the one of this prompt, and not for example that of the unconditional branch of
        classifier-free guidance."""
        return cache is None or self._cache is None or self._cache() is cache

    def prompt(self, tokens: torch.Tensor, attention_mask: Any, cache: Any) -> Prompt:
        batch, length = tokens.shape[:2]
        start = 0
        if cache is not None:
            if self._cache is None:
                self._cache, self._computed = ref(cache), _cached_tokens(cache) or 0
            start = self._computed
            self._computed += length
        if start >= self.length:
            return Prompt(tokens.new_ones((batch, 0), dtype=torch.bool), start, length)
        real = _real_tokens(attention_mask, batch, min(self.length, start + length), tokens.device)
        real = F.pad(real, (0, self.length - real.shape[1]), value=True)
        if self.attention_mask is not None:  # for the whole prompt, even if it is computed in chunks
            repeats = batch // len(self.attention_mask)  # one for each beam
            real = self.attention_mask.to(tokens.device).bool().repeat_interleave(repeats, dim=0)
        return Prompt(real, start, length)


def _guessed_mask(model: nn.Module, tokens: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask that `generate` infers from padding tokens if it is called without one, or `None` for all tokens."""
    configs = (kwargs.get("generation_config"), model.generation_config)

    def option(name: str) -> Any:
        given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in given if value is not None), None)

    pad, end = option("pad_token_id"), option("eos_token_id")
    return None if pad is None or pad in (end if isinstance(end, list) else [end]) else tokens != pad


def _cached_tokens(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError):  # of a recurrent model, which has no tokens in its cache
        return None


# An error is stored in place of a prompt, and raised when the prompt is needed: perhaps no adapter is active.
_PROMPTS: ContextStack[tuple[nn.Module, Prompt | ValueError]] = ContextStack("steering_prompt")
_GENERATIONS: ContextStack[_Generation] = ContextStack("steering_generation")
# Prompts by cache, for a `generate` that was not called through a tuner.
_CACHED: WeakKeyDictionary[Any, _Generation] = WeakKeyDictionary()


def current_prompt() -> Prompt | None:
    """The prompt of the current forward pass, or `None` outside of one.

    Raises:
        ValueError: The prompt could not be found, see [`prompt_in_call`].
    """
    _, prompt = next(iter(_PROMPTS), (None, None))
    if isinstance(prompt, ValueError):
        raise prompt
    return prompt


@contextmanager
def generation(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Context manager for a call of the model's `generate` with these arguments. Its inputs are the prompt."""
    entry = _GENERATIONS.push(_Generation(model, args, kwargs))
    try:
        yield
    finally:
        _GENERATIONS.remove(entry)


def watch(model: nn.Module) -> None:
    """Adds hooks to a model that find the prompt in each call."""
    if not is_watched(model):
        # Without guards on hooks, code compiled for one block would run for another whose hooks differ.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        model.register_forward_pre_hook(_before, prepend=True, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)


def is_watched(model: nn.Module) -> bool:
    """Whether [`watch`] was called for a model, because an adapter edits only some tokens."""
    return _before in model._forward_pre_hooks.values()


def unwatch(model: nn.Module) -> None:
    """Removes the hooks of [`watch`]."""
    for hooks, own in ((model._forward_pre_hooks, _before), (model._forward_hooks, _after)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                flags.pop(key, None)


@torch.compiler.disable  # torch.compile cannot trace context variables
def _before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = dict(kwargs)
    _close(model)  # after Ctrl-C, which skips `_after`
    try:
        _PROMPTS.push((model, prompt_in_call(model, args, kwargs)))
    except ValueError as error:
        _PROMPTS.push((model, error))
    return args, kwargs


@torch.compiler.disable
def _after(model: nn.Module, args: tuple, output: Any) -> None:
    _close(model)


def _close(model: nn.Module) -> None:
    entry = _PROMPTS.innermost()
    if entry is not None and entry.value is not None and entry.value[0] is model:
        _PROMPTS.remove(entry)


def prompt_in_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Prompt:
    """The prompt in a call of a causal language model.

    The first of these that applies says what the prompt is:

    - inside `generate`, its inputs;
    - `completion_mask` (batch, sequence), which is removed from `kwargs`: the tokens before the completion;
    - `labels`: the tokens before the first one that is not -100;
    - a cache: the tokens of its first forward pass;
    - in evaluation mode, the whole input, if it comes with an `attention_mask`.

    `generate` is only seen if it is called on a `PeftModel`. Called on the model itself it needs a cache, and the
    whole prompt in one pass.

    Raises:
        ValueError: The prompt is unknown, a row has none, or a row has several sequences.
    """
    tokens = next(
        (t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if isinstance(t, torch.Tensor)),
        None,
    )
    if tokens is None:
        raise ValueError("Expected `input_ids` or `inputs_embeds`, which are needed to find the prompt; got neither.")
    if kwargs.get("state") is not None:
        raise ValueError(
            "An adapter edits only some tokens of the prompt, but a model with a `state` in place of a cache (RWKV) "
            "does not tell them from generated ones. Use positions='all'."
        )
    attention_mask = kwargs.get("attention_mask")
    completion_mask = kwargs.pop("completion_mask", None)
    cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
    running = next((generation for generation in _GENERATIONS if generation.model is model), None)
    if running is not None and running.is_for(cache):
        return running.prompt(tokens, attention_mask, cache)
    batch, length = tokens.shape[:2]
    real = _real_tokens(attention_mask, batch, length, tokens.device)
    _check_not_packed(kwargs, real)
    completion = _completion(completion_mask, kwargs, (batch, length))
    if completion is not None:
        return Prompt(_before_completion(real, completion.to(real.device)), 0, length)
    # Without any of these it could be one of several passes of `generate`, or padded text of lm-eval.
    is_known = cache is not None or (attention_mask is not None and kwargs.get("use_cache") is not False)
    if model.training or not is_known:
        raise ValueError(
            "An adapter edits only some tokens of the prompt, but the prompt is unknown. Train on prompts and "
            "completions (TRL sets the labels of prompt tokens to -100, without label smoothing), call the model with "
            "`labels`, `completion_mask` or, for a prompt alone, `attention_mask`, call `generate` of the PeftModel, "
            "or use positions='all'."
        )
    if cache is None:
        logger.warning_once(
            "An adapter edits only some tokens of the prompt, and the model was called without `labels` and not by "
            "`generate`. The whole input is used as the prompt."
        )
        return Prompt(real, 0, length)
    if cache not in _CACHED or _cached_tokens(cache) == 0:
        # What a cache was filled with before was not edited, and what comes after it is not either.
        first = tokens[:, :0] if _cached_tokens(cache) else tokens
        _CACHED[cache] = _Generation(model, (first,), {"attention_mask": None})
    return _CACHED[cache].prompt(tokens, attention_mask, cache)


def _completion(completion_mask: Any, kwargs: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor | None:
    """Which tokens belong to the completion, or `None` if unknown."""
    if completion_mask is not None:
        return completion_mask.bool()
    labels = kwargs.get("labels")
    return labels != -100 if isinstance(labels, torch.Tensor) and labels.shape == shape else None


def _before_completion(real: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    prompt = real & (completion.cumsum(-1) == 0)
    without = completion.any(-1) & ~prompt.any(-1)
    if without.any():
        raise ValueError(
            f"Row {int(without.nonzero()[0])} of the batch has a completion but no prompt. Train on prompts and "
            "completions, with a loss on completions only (`completion_only_loss`), or use positions='all'."
        )
    return prompt


def _real_tokens(attention_mask: Any, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of the first `length` tokens are not padding, from an attention mask in any of transformers' formats."""
    if isinstance(attention_mask, dict):  # one mask for each type of attention
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if not isinstance(attention_mask, torch.Tensor):
        return torch.ones((batch, length), dtype=torch.bool, device=device)
    if attention_mask.dim() == 4:  # (batch, 1, queries, keys): what the last token attends to
        attention_mask = attention_mask[:, 0, -1]
        attention_mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    return attention_mask[:, :length].to(device).bool()


def _check_not_packed(kwargs: Mapping[str, Any], real: torch.Tensor) -> None:
    position_ids = kwargs.get("position_ids")
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    if isinstance(position_ids, torch.Tensor) and position_ids.shape == real.shape and not packed:
        falls = position_ids[:, 1:] <= position_ids[:, :-1]
        packed = bool((falls & real[:, 1:] & real[:, :-1]).any())
    if packed:
        raise ValueError(
            "A row of the batch has several sequences (packing, or padding-free batches), so its prompt is unknown. "
            "Train with packing=False and padding_free=False, or use positions='all'."
        )
