"""Adapters in closed form from a fine-tuned model, without a gradient step.

Block by block, a regression finds the update that moves the output of the base model, with the adapter in all earlier
blocks, closest to that of the fine-tuned model. So the update of a block also corrects the errors of earlier ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from ..tuners.post_block_steering import PostBlockSteeringConfig
from .block_by_block import BlockByBlock
from .moments import Moments, inverse_square_norms
from .regression import RANK_TOLERANCE, RIDGES, Factors, choose, constant_error, explained_share, map_error
from .splits import Batches, Split
from .states import Block, base_of, check_same_shape
from .targets import LastLinearTarget, SteeringTarget

Progress = Callable[[int, int], None]


class Distilled(NamedTuple):
    """
    A distilled adapter.

    Attributes:
        model ([`~peft.PeftModel`]): The base model with the adapter, which `save_pretrained` writes.
        report (`list[dict]`):
            A row for each block with an update, measured on the held-out tokens: `block`, its index; `rank` and
            `ridge`, the rank and the penalty (not for vectors); `before`, the distance of the block's output from that
            of the fine-tuned model without this update, as a share of the norm of the latter (of root mean
            squares over tokens); `after`, the same with the update;
            `explained`, the share of the squared distance that the update removes.
    """

    model: PeftModel
    report: list[dict[str, Any]]


def distill(
    base: Any,
    tuned: Any,
    split: Split,
    config: PostBlockSteeringConfig | LoraConfig,
    choose_rank: bool = False,
    relative: bool = False,
    ridges: Sequence[float] = RIDGES,
    tolerance: float = RANK_TOLERANCE,
    progress: Progress = lambda done, total: None,
) -> Distilled:
    """
    Finds the adapter of a base model that explains a fine-tuned one best.

    The states of all tokens, (tokens, d) for each model, are kept in a temporary folder, and never in memory.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, to which the adapter is added.
        tuned (`nn.Module`): A model fine-tuned from it, or another copy of it with an adapter.
        split ([`Split`]): Batches to fit on, to choose by, and to measure on.
        config ([`PostBlockSteeringConfig`] or [`~peft.LoraConfig`]):
            The adapter: linear steering of all tokens; or LoRA, of which `r`, `layers_to_transform` and `task_type`
            are used, on the last linear layer of each block's MLP.
        choose_rank (`bool`, defaults to `False`):
            Whether to choose the rank of each block, at most that in `config`, by the error on the validation tokens.
            The adapter then has a `rank_pattern`. Only for low-rank steering.
        relative (`bool`, defaults to `False`):
            Whether distances are relative to the norm of the fine-tuned model's state, token by token. If not, tokens
            with large states count more, such as the first one in many models, as in plain least squares.
        ridges (`Sequence[float]`): The penalties to choose from, by the error on the validation tokens.
        tolerance (`float`): See [`regression.choose`].
        progress (`Callable`, *optional*): Called with the number of finished blocks and that of all blocks.

    Raises:
        ValueError: The models have different shapes or are the same object, the configuration cannot be used, or there
            are too few tokens. The base model has no adapter then.
    """
    check_same_shape(base, tuned)
    if base_of(base) is base_of(tuned):
        raise ValueError("The base model and the fine-tuned one are the same object. Load the base model twice.")
    target: Any = (
        LastLinearTarget(config, base, split.fit[0]) if isinstance(config, LoraConfig) else SteeringTarget(config)
    )
    if choose_rank and (target.is_vector or isinstance(config, LoraConfig)):
        raise ValueError("choose_rank is for low-rank steering only. Leave it out.")
    student = target.add_to(base)
    fit = _Fit(target, choose_rank, ridges, tolerance)
    try:
        with tempfile.TemporaryDirectory() as folder:
            pair = _Pair(student, tuned, split, Path(folder), relative)
            for position, block in enumerate(pair.student.blocks):
                fit.block(pair, position, block)
                progress(position + 1, len(pair.student.blocks))
    except BaseException:
        student.unload()
        raise
    if choose_rank:
        student = target.with_ranks(student, fit.updates)
    return Distilled(student.eval(), fit.report)


class _Part(NamedTuple):
    """What a part of the tokens says about one block: `moments` of the regressors and of the distance between both
    models, and `tuned`, the weighted sum of the squared norms of the fine-tuned model's states."""

    moments: Moments
    tuned: torch.Tensor


class _Pair:
    """Both models, which run on the same batches up to the same block."""

    def __init__(self, student: Any, tuned: Any, split: Split, folder: Path, relative: bool):
        self.split, self.relative = split, relative
        runs = []
        for name, model in (("student", student), ("tuned", tuned)):
            (folder / name).mkdir()
            runs.append(BlockByBlock(model, folder / name, changes=name == "student"))
        self.student, self.tuned = runs

    def parts(self, position: int, regressor: nn.Module | None) -> list[_Part]:
        """One for each part of the split."""
        numbers = iter(range(sum(map(len, self.split))))
        return [self._part(position, regressor, batches, numbers) for batches in self.split]

    def skip(self, position: int) -> None:
        """Runs up to a block without an update."""
        for number, batch in enumerate(batch for batches in self.split for batch in batches):
            self.student.run(position, number, batch)
            self.tuned.run(position, number, batch)

    def _part(self, position: int, regressor: nn.Module | None, batches: Batches, numbers: Iterator[int]) -> _Part:
        part: _Part | None = None
        for batch, number in zip(batches, numbers, strict=False):
            output, x = self.student.run(position, number, batch, regressor)
            goal, _ = self.tuned.run(position, number, batch)
            goal = goal.to(output.device, torch.float64)
            x = output if x is None else x
            if part is None:
                part = _Part(Moments(x.shape[1], output.shape[1], x.device), goal.new_zeros(()))
            weights = inverse_square_norms(goal) if self.relative else torch.ones_like(goal[:, 0])
            part.moments.add(x, goal - output.double(), weights)
            part.tuned.add_(weights @ goal.square().sum(1))
        if part is None:
            raise ValueError("A part of the split has no batches. Pass more text.")
        return part


class _Fit:
    """The updates of the blocks so far."""

    def __init__(self, target: Any, choose_rank: bool, ridges: Sequence[float], tolerance: float):
        self.target, self.choose_rank, self.ridges, self.tolerance = target, choose_rank, ridges, tolerance
        self.updates: dict[int, Factors] = {}
        self.report: list[dict[str, Any]] = []

    def block(self, pair: _Pair, position: int, block: Block) -> None:
        """Fits and writes the update of a block, if it has one."""
        if self.target.adapter(block) is None:
            pair.skip(position)
            return
        fitted, validation, held_out = pair.parts(position, self.target.regressor(block))
        if self.target.is_vector:
            mean = fitted.moments.mean
            self.target.write(block, mean)
            row = _errors(constant_error(mean, held_out.moments), held_out)
        else:
            rank = self.target.rank(block)
            choice = choose(fitted.moments, validation.moments, rank, self.choose_rank, self.ridges, self.tolerance)
            self.updates[block.index] = choice.factors
            self.target.write(block, choice.factors)
            errors = _errors(map_error(choice.factors, held_out.moments), held_out)
            row = {"rank": choice.rank, "ridge": choice.ridge, **errors}
        self.report.append({"block": block.index, **row})


def _errors(error: torch.Tensor, part: _Part) -> dict[str, float]:
    return {
        "before": (part.moments.yy / part.tuned).sqrt().item(),
        "after": (error / part.tuned).sqrt().item(),
        "explained": explained_share(error, part.moments).item(),
    }
