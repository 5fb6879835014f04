"""The adapter of JoLA, and the layer that holds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..lofit.layer import INIT_STD, RANDOM_STD, HeadAdapter, layout_of, rows_shape
from ..steering.adapter import SteeringAdapter, TrainingProgress
from ..steering.layer import SteeringLayer
from .config import JolaConfig

# Hard concrete gates: a sigmoid with this temperature, stretched from (0, 1) to (LOW, HIGH) and cut off.
TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1
EPSILON = 1e-6
DECAY = 0.01
# A gate with this parameter is exactly 1, in evaluation and, whatever is drawn, in training.
OPEN = 20.0


class JolaAdapter(HeadAdapter):
    """
    `x' = x + scaling * (g2 * scale * x + g1 * offset)` for each head, see [`JolaConfig`].

    Attributes:
        offset (`nn.Parameter`): (H, k), `v`.
        scale (`nn.Parameter`): (H, k), `a`.
        offset_log_gate (`nn.Parameter`): (H,), `l1`.
        scale_log_gate (`nn.Parameter`): (H,), `l2`.
        penalty_schedule (`str`): How the weight of the penalty changes.
        penalty_weight (`float`): Weight of the penalty.
    """

    setting_fields = ("penalty_schedule", "penalty_weight")
    offset: torch.Tensor
    scale: torch.Tensor
    offset_log_gate: torch.Tensor
    scale_log_gate: torch.Tensor

    def __init__(self, width: int, config: JolaConfig):
        super().__init__(width, config)
        self.penalty_schedule: str = config.penalty_schedule
        self.penalty_weight: Any = config.penalty_weight

    @staticmethod
    def shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
        rows = rows_shape(config, width)
        gates = (layout_of(config, width).num_heads,)
        return {"offset": rows, "scale": rows, "offset_log_gate": gates, "scale_log_gate": gates}

    def reset_parameters(self, identity: bool = True) -> None:
        bound = math.sqrt(6 / (self.num_heads + 1))
        for log_gate in (self.offset_log_gate, self.scale_log_gate):
            nn.init.uniform_(log_gate, -bound, bound)
        for rows in (self.offset, self.scale):
            nn.init.normal_(rows, std=INIT_STD if identity else RANDOM_STD)

    def coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.training:
            return self.merged_coefficients()
        offset_draw, scale_draw = self.draw_uniform()
        return (
            self.scale * sampled_gate(self.scale_log_gate, scale_draw),
            self.offset * sampled_gate(self.offset_log_gate, offset_draw),
        )

    def merged_coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scale * gate(self.scale_log_gate), self.offset * gate(self.offset_log_gate)

    def draw_uniform(self) -> torch.Tensor:
        """Random numbers `u`, (2, H), for the gates of offsets and of scales.

        They come from the generator of their device, which checkpointing sets back before it computes a block again.
        """
        dtype = torch.promote_types(self.offset_log_gate.dtype, torch.float32)  # 16 bits round 1 - EPSILON to 1
        draw = torch.empty(2, self.num_heads, dtype=dtype, device=self.offset_log_gate.device)
        return draw.uniform_(EPSILON, 1 - EPSILON)

    def penalty(self, progress: TrainingProgress) -> torch.Tensor:
        w = penalty_weight_at(self.penalty_schedule, self.penalty_weight, progress)
        offset, scale = open_probability(self.offset_log_gate), open_probability(self.scale_log_gate)
        return (w * offset.mean() + (1 - w) * scale.mean()) / (progress.num_adapters * self.num_heads)

    @staticmethod
    def summed_fields(configs: Sequence[Any]) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def write_sum(self, parts: Sequence[tuple[float, Any]]) -> None:
        """The sum of the updates in evaluation, behind open gates."""
        self.write_rows(self.scale, parts, which=0)
        self.write_rows(self.offset, parts, which=1)
        for log_gate in (self.offset_log_gate, self.scale_log_gate):
            log_gate.fill_(OPEN)


class JolaLayer(SteeringLayer):
    """The adapters at the attention heads of one block, `<block>.jola`."""

    layer_name = "jola"

    @staticmethod
    def adapter_class(config: JolaConfig) -> type[SteeringAdapter]:
        return JolaAdapter


def gate(log_gate: torch.Tensor) -> torch.Tensor:
    """Gates (H, 1) in evaluation, for parameters (H,)."""
    return _stretched(log_gate.sigmoid())


def sampled_gate(log_gate: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Gates (H, 1) in training, for parameters and random numbers (H,)."""
    return _stretched(((draw.logit() + log_gate) / TEMPERATURE).sigmoid()).to(log_gate.dtype)


def open_probability(log_gate: torch.Tensor) -> torch.Tensor:
    """Probability (H,) that a gate is not 0 in training."""
    return (log_gate - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().clamp(EPSILON, 1 - EPSILON)


def penalty_weight_at(schedule: str, weight: float, progress: TrainingProgress) -> float:
    """The weight `w` at a step of training, see [`JolaConfig`]."""
    if schedule == "exponential":
        return weight * math.exp(-DECAY * progress.step)
    if schedule == "linear":
        return weight * min(progress.step / max(progress.max_steps, 1), 1.0)
    return weight


def _stretched(sigmoid: torch.Tensor) -> torch.Tensor:
    return (sigmoid * (HIGH - LOW) + LOW).clamp(0, 1).unsqueeze(-1)
