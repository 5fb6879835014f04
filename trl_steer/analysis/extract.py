"""Steering vectors from contrast pairs: texts with and without a property.

The definitions are those of repeng (github.com/vgel/repeng): `"pca"` is its `pca_diff`, `"pca_center"` its method of
that name, and the sign of a direction makes most positive texts project further along it than their negative ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from peft import PeftModel, get_peft_model

from trl_steer.choices import ExtractionMethod

from ..tuners.post_block_steering import PostBlockSteeringConfig
from .distill import Progress
from .states import blocks_of, record

METHODS = get_args(ExtractionMethod)
_NEWTON_STEPS = 100


class Extracted(NamedTuple):
    """
    Steering vectors.

    Attributes:
        model ([`~peft.PeftModel`]): The model with the vectors as an adapter, which `save_pretrained` writes.
        report (`list[dict]`):
            A row for each block: `block`, its index; `norm`, the mean norm of the hidden states at the position;
            `difference`, the norm of the difference of means as a share of it; `separated`, the share of the pairs
            whose positive text projects further along the direction than its negative one; and `cosine`, that with
            the difference of means.
    """

    model: PeftModel
    report: list[dict[str, Any]]


def extract(
    model: Any,
    positive: Sequence[Mapping[str, torch.Tensor]],
    negative: Sequence[Mapping[str, torch.Tensor]],
    method: ExtractionMethod = "mean",
    position: int = -1,
    strength: float = 0.1,
    blocks: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> Extracted:
    """
    Finds a steering vector for each block from pairs of texts, and adds them to the model as an adapter.

    Two states (d,) for each pair and block are kept in memory, those of one token of each text.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, to which the adapter is added.
        positive, negative (`Sequence[Mapping[str, torch.Tensor]]`): Batches of the texts with and without the
            property, whose rows are pairs in the same order.
        method (`str`, defaults to `"mean"`):
            The direction, from the outputs `h+` and `h-` of a block:

            - `"mean"`: the mean of `h+ - h-`;
            - `"pca"`: the first principal component of the differences `h+ - h-` around their mean;
            - `"pca_center"`: that of all states around the middle of their pair, which is that of the differences
              around zero;
            - `"logistic"`: the weights of a logistic regression that tells `h+` from `h-`, with scikit-learn's
              penalty, on states that are centred and divided by their standard deviation over all entries.
        position (`int`, defaults to -1):
            The token of each text: from 0 for the first ones, from -1 for the last ones.
        strength (`float`, defaults to 0.1): Norm of a vector, as a share of the mean norm of the states.
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: all.
        progress (`Callable`, *optional*): Called with the number of finished batches and that of all batches.

    Raises:
        ValueError: There are fewer than two pairs, or not as many positive as negative texts; a text has no such
            token; the method does not exist; or the texts of all pairs have the same states.
    """
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    indices = [block.index for block in blocks_of(model, blocks)]
    total, done = len(positive) + len(negative), 0
    states: list[dict[int, torch.Tensor]] = []
    for batches in (positive, negative):
        rows: dict[int, list[torch.Tensor]] = {index: [] for index in indices}
        for batch in batches:
            recorded = record(model, batch, ["post_block"], indices)
            tokens = _token_rows(recorded.lengths, position)
            for index in indices:
                rows[index].append(recorded[index, "post_block"][tokens].cpu())
            done += 1
            progress(done, total)
        states.append({index: torch.cat(found) for index, found in rows.items() if found})
    _check_pairs(*states)
    directions, report = {}, []
    for index in indices:
        h_plus, h_minus = states[0][index], states[1][index]
        unit, row = direction(h_plus, h_minus, method)
        directions[index] = strength * row["norm"] * unit
        report.append({"block": index, **row})
    return Extracted(_steered(model, directions, blocks), report)


def direction(
    h_plus: torch.Tensor, h_minus: torch.Tensor, method: ExtractionMethod
) -> tuple[torch.Tensor, dict[str, float]]:
    """
    The direction from negative to positive states.

    Args:
        h_plus, h_minus (`torch.Tensor`): (pairs, d), float64.
        method (`str`): See [`extract`].

    Returns:
        A vector (d,) of norm 1, and its row in the report of [`extract`].

    Raises:
        ValueError: All states are the same, or with `"pca"` all differences.
    """
    difference = h_plus - h_minus
    if not difference.any():
        raise ValueError("Positive and negative texts have the same states. Check that they differ before the token.")
    found = _DIRECTIONS[method](h_plus, h_minus)
    further = difference @ found
    if method.startswith("pca") and _points_back(further):
        found, further = -found, -further
    unit = found / found.norm()
    mean = difference.mean(0)
    norm = torch.cat([h_plus, h_minus]).norm(dim=1).mean()
    return unit, {
        "norm": norm.item(),
        "difference": (mean.norm() / norm).item(),
        "separated": (further > 0).double().mean().item(),
        "cosine": (unit @ mean / mean.norm().clamp_min(torch.finfo(torch.float64).tiny)).item(),
    }


def _points_back(further: torch.Tensor) -> bool:
    """Whether most differences point against a direction, or if as many do as do not, their mean."""
    votes = further.sign().sum()
    return bool(votes < 0 or (votes == 0 and further.sum() < 0))


def _mean(h_plus: torch.Tensor, h_minus: torch.Tensor) -> torch.Tensor:
    return (h_plus - h_minus).mean(0)


def _pca(h_plus: torch.Tensor, h_minus: torch.Tensor) -> torch.Tensor:
    difference = h_plus - h_minus
    centred = difference - difference.mean(0)
    if centred.norm() <= 1e-6 * difference.norm():
        raise ValueError("All pairs differ in the same way, so that their differences have no principal component.")
    return _first_component(centred)


def _pca_center(h_plus: torch.Tensor, h_minus: torch.Tensor) -> torch.Tensor:
    return _first_component(h_plus - h_minus)


def _first_component(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]


def _logistic(h_plus: torch.Tensor, h_minus: torch.Tensor) -> torch.Tensor:
    """Weights `w` that minimize `|w|^2 / 2 + sum log(1 + exp(-y (w x + b)))`, `y` 1 and -1, by Newton's method with
    backtracking. They lie in the span of the states, so that the Hessian has the size of the number of states at
    most."""
    states = torch.cat([h_plus, h_minus])
    centred = states - states.mean(0)
    basis, values, right = torch.linalg.svd(centred / centred.square().mean().sqrt(), full_matrices=False)
    x = torch.cat([basis * values, torch.ones(len(states), 1).to(states)], dim=1)
    y = torch.cat([torch.ones(len(h_plus)), -torch.ones(len(h_minus))]).to(states)
    penalty = torch.ones(x.shape[1]).to(x)
    penalty[-1] = 0  # not on the intercept
    w = torch.zeros(x.shape[1]).to(x)

    def objective(w: torch.Tensor) -> torch.Tensor:
        return (penalty * w.square()).sum() / 2 + torch.nn.functional.softplus(-y * (x @ w)).sum()

    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(-y * (x @ w))
        gradient = penalty * w - x.T @ (y * p)
        hessian = torch.diag(penalty) + (x.T * (p * (1 - p))) @ x
        step = torch.linalg.solve(hessian, gradient)
        while objective(w - step) > objective(w) and step.norm() > 1e-12 * w.norm():
            step = step / 2
        w = w - step
        if step.norm() <= 1e-12 * w.norm():
            break
    return right.T @ w[:-1]


_DIRECTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": _mean,
    "pca": _pca,
    "pca_center": _pca_center,
    "logistic": _logistic,
}


def _token_rows(lengths: Sequence[int], position: int) -> list[int]:
    """Where the token at `position` of each text is in the tokens of a batch."""
    rows, start = [], 0
    for length in lengths:
        inside = position if position >= 0 else length + position
        if not 0 <= inside < length:
            raise ValueError(f"There is no token at position {position} of a text of {length} tokens.")
        rows.append(start + inside)
        start += length
    return rows


def _check_pairs(positive: Mapping[int, torch.Tensor], negative: Mapping[int, torch.Tensor]) -> None:
    counts = [len(next(iter(states.values()), ())) for states in (positive, negative)]
    if counts[0] != counts[1] or counts[0] < 2:
        raise ValueError(
            f"Expected at least two pairs of a positive and a negative text, got {counts[0]} positive and {counts[1]} "
            "negative texts."
        )


@torch.no_grad()
def _steered(model: Any, vectors: Mapping[int, torch.Tensor], blocks: Sequence[int] | None) -> PeftModel:
    config = PostBlockSteeringConfig(
        steering_type="vector", layers_to_transform=None if blocks is None else list(blocks), task_type="CAUSAL_LM"
    )
    steered: Any = get_peft_model(model, config)
    for block in blocks_of(steered):
        if block.index in vectors:
            layer: Any = block.module.get_submodule("post_block_steering")
            layer.adapters["default"].vector.copy_(vectors[block.index])
    return steered.eval()
