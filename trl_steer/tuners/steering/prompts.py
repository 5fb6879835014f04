"""The position of the prompt among the tokens of a forward pass.

The prompt is found from the arguments of the model, see [`prompt_in_call`]. Cached and generated tokens are not
edited, so each prompt token is edited once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .contexts import ContextStack
from .positions import chosen_tokens

logger = logging.get_logger(__name__)

# Arguments of transformers' models with the results of earlier forward passes.
_CACHES = ("past_key_values", "cache_params")


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
        args (`tuple`), kwargs (`Mapping`): The arguments of `generate`.
    """

    def __init__(self, args: tuple, kwargs: Mapping[str, Any]):
        given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        tokens = next((value for value in given if isinstance(value, torch.Tensor)), None)
        self.attention_mask = kwargs.get("attention_mask")
        # With a cache from an earlier call, the tokens may be only the new ones, while the mask is for all.
        shapes = [value.shape for value in (tokens, self.attention_mask) if value is not None]
        self.length = max((shape[1] for shape in shapes), default=1)
        self._computed: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def prompt(self, tokens: torch.Tensor, attention_mask: Any, cache: Any) -> Prompt:
        batch, length = tokens.shape[:2]
        start = 0
        if cache is not None:
            start = self._computed.get(cache, -1)
            start = int(cache.get_seq_length()) if start < 0 else start
            self._computed[cache] = start + length
        if start >= self.length:
            return Prompt(tokens.new_ones((batch, 0), dtype=torch.bool), start, length)
        real = _real_tokens(attention_mask, batch, min(self.length, start + length), tokens.device)
        real = F.pad(real, (0, self.length - real.shape[1]), value=True)
        if self.attention_mask is not None:  # for the whole prompt, even if it is computed in chunks
            repeats = batch // len(self.attention_mask)  # one for each beam
            real = self.attention_mask.to(tokens.device).bool().repeat_interleave(repeats, dim=0)
        return Prompt(real, start, length)


# An error is stored in place of a prompt, and raised when the prompt is needed: perhaps no adapter is active.
_PROMPTS: ContextStack[Prompt | ValueError] = ContextStack("steering_prompt")
_GENERATIONS: ContextStack[_Generation] = ContextStack("steering_generation")
# Prompts by cache, for a `generate` that was not called through a tuner.
_CACHED: WeakKeyDictionary[Any, _Generation] = WeakKeyDictionary()


def current_prompt() -> Prompt | None:
    """The prompt of the current forward pass, or `None` outside of one.

    Raises:
        ValueError: The prompt could not be found, see [`prompt_in_call`].
    """
    prompt = next(iter(_PROMPTS), None)
    if isinstance(prompt, ValueError):
        raise prompt
    return prompt


@contextmanager
def generation(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Context manager for a call of `generate` with these arguments. Its inputs are the prompt."""
    entry = _GENERATIONS.push(_Generation(args, kwargs))
    try:
        yield
    finally:
        _GENERATIONS.remove(entry)


def watch(model: nn.Module) -> None:
    """Adds hooks to a model that find the prompt in each call."""
    if not is_watched(model):
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
    try:
        _PROMPTS.push(prompt_in_call(model, args, kwargs))
    except ValueError as error:
        _PROMPTS.push(error)
    return args, kwargs


@torch.compiler.disable
def _after(model: nn.Module, args: tuple, output: Any) -> None:
    entry = _PROMPTS.innermost()
    if entry is not None:
        _PROMPTS.remove(entry)


def prompt_in_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Prompt:
    """The prompt in a call of a causal language model.

    The first of these that applies says what the prompt is:

    - inside `generate`, its inputs;
    - `completion_mask` (batch, sequence), which is removed from `kwargs`: the tokens before the completion;
    - `labels`: the tokens before the first one that is not -100;
    - `logits_to_keep` of at least two, as in TRL's GRPO and RLOO trainers: the tokens before the completion;
    - a cache: the tokens of its first forward pass;
    - in evaluation mode, the whole input.

    Raises:
        ValueError: In training, the prompt is unknown, a row has none, or a row has several sequences.
    """
    tokens = next(
        (t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if isinstance(t, torch.Tensor)),
        None,
    )
    if tokens is None:
        raise ValueError("Expected `input_ids` or `inputs_embeds`, which are needed to find the prompt; got neither.")
    attention_mask = kwargs.get("attention_mask")
    completion_mask = kwargs.pop("completion_mask", None)
    cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
    running = next(iter(_GENERATIONS), None)
    if running is not None:
        return running.prompt(tokens, attention_mask, cache)
    batch, length = tokens.shape[:2]
    real = _real_tokens(attention_mask, batch, length, tokens.device)
    _check_not_packed(kwargs, real)
    completion = _completion(completion_mask, kwargs, (batch, length))
    if completion is not None:
        return Prompt(_before_completion(real, completion.to(real.device)), 0, length)
    if model.training:
        raise ValueError(
            "An adapter edits only some tokens of the prompt, but the prompt is unknown. Train on prompts and "
            "completions (TRL sets the labels of prompt tokens to -100), call the model with `labels` or "
            "`completion_mask`, or use positions='all'."
        )
    if cache is None:
        logger.warning_once(
            "An adapter edits only some tokens of the prompt, and the model was called without `labels` and not by "
            "`generate`. The whole input is used as the prompt."
        )
        return Prompt(real, 0, length)
    if cache not in _CACHED or cache.get_seq_length() == 0:
        _CACHED[cache] = _Generation((tokens,), {})
    return _CACHED[cache].prompt(tokens, attention_mask, cache)


def _completion(completion_mask: Any, kwargs: Mapping[str, Any], shape: tuple[int, int]) -> torch.Tensor | None:
    """Which tokens belong to the completion, or `None` if unknown."""
    if completion_mask is not None:
        return completion_mask.bool()
    labels, kept = kwargs.get("labels"), kwargs.get("logits_to_keep")
    if isinstance(labels, torch.Tensor) and labels.shape == shape:
        return labels != -100
    if isinstance(kept, int) and 1 < kept <= shape[1]:
        return torch.arange(shape[1]).expand(shape) > shape[1] - kept  # one logit more than there are tokens
    return None


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
