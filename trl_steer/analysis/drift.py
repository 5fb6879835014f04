"""How far an adapter moves a model from its base, which arXiv 2603.00425 does not measure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .adapters import scaled
from .states import evaluation, input_device, right_padded, run_model

SCALINGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# Tokens whose logits are in float64 at a time.
CHUNK = 256


@torch.no_grad()
def drift(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], scalings: Sequence[float] = SCALINGS
) -> dict[str, Any]:
    """
    How a model with an adapter differs from its base model in the next tokens that it predicts.

    Args:
        model (`PeftModel`): A model with an active adapter, ours or LoRA.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            See [`text_batches`]. Text that the adapter was not trained on.
        scalings (`Sequence[float]`): Factors on the update as trained, for each of which the model is run.

    Returns:
        `dict`: `tokens`; `base_perplexity`; and `scalings`, a list with `scaling`; `kl`, the Kullback-Leibler
        divergence `KL(base || adapted)` of the next token, in nats, averaged over tokens; `agreement`, the share of
        tokens after which both models predict the same token first; and `perplexity` of the adapted model. Perplexity
        is over all tokens but the first of each text, `None` if there are none.

    Raises:
        ValueError: The adapter cannot be scaled, or there are no tokens.
    """
    totals = torch.zeros(len(scalings), 3, dtype=torch.float64)  # KL, agreements, negative log-likelihoods
    base_loss, tokens, predicted = 0.0, 0, 0
    for batch in batches:
        padded = right_padded(batch, input_device(model))
        with evaluation(model):
            with model.disable_adapter():
                base = _logits(model, padded)
            for index, scaling in enumerate(scalings):
                with scaled(model, scaling):
                    adapted = _logits(model, padded)
                totals[index] += _compare(base, adapted, padded)
        base_loss += _compare(base, base, padded)[2].item()
        tokens += len(base)
        predicted += int(padded["attention_mask"][:, 1:].sum())
    if not tokens:
        raise ValueError("There are no prompts to measure on.")
    rows = []
    for scaling, (divergence, agreements, loss) in zip(scalings, totals.tolist(), strict=True):
        rows.append(
            {
                "scaling": float(scaling),
                "kl": divergence / tokens,
                "agreement": agreements / tokens,
                "perplexity": _perplexity(loss, predicted),
            }
        )
    return {"tokens": tokens, "base_perplexity": _perplexity(base_loss, predicted), "scalings": rows}


def _logits(model: Any, padded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, vocabulary), without padding."""
    return run_model(model, padded, use_cache=False).logits[padded["attention_mask"].bool()]


def _compare(base: torch.Tensor, adapted: torch.Tensor, padded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sums over tokens of KL(base || adapted), of agreements, and of the adapted model's negative log-likelihood
    of the next token, (3,), float64."""
    mask = padded["attention_mask"].bool()
    following = padded["input_ids"].roll(-1, 1)[mask]
    has_next = mask.roll(-1, 1).index_fill(1, torch.tensor([mask.shape[1] - 1], device=mask.device), False)[mask]
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(base), CHUNK):
        part = slice(first, first + CHUNK)
        p, q = (logits[part].double().log_softmax(-1) for logits in (base, adapted))
        loss = -q.gather(1, following[part, None]).squeeze(1)
        sums += torch.stack(
            [
                (p.exp() * (p - q)).nansum(),  # a logit of minus infinity has probability 0
                (p.argmax(-1) == q.argmax(-1)).double().sum(),
                (loss * has_next[part]).nansum(),
            ]
        ).cpu()
    return sums


def _perplexity(loss: float, tokens: int) -> float | None:
    return math.exp(min(loss / tokens, 700)) if tokens else None
