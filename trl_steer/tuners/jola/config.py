"""Configuration of JoLA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.utils import PeftType

from ..lofit.config import HeadSteeringConfig
from ..steering.config import check_choice, check_number

# Schedules of the penalty's weight, and the default of `penalty_weight` for each.
PENALTY_SCHEDULES = {"exponential": 0.1, "linear": 0.2, "constant": 0.1}


@dataclass
class JolaConfig(HeadSteeringConfig):
    """
    Configuration of a [`JolaModel`]: `x' = x + scaling * (g2 * a * x + g1 * v)` for each attention head, with `a`,
    `v` (k,), gates `g1`, `g2` in [0, 1], and `x` (batch, sequence, k) the head's output before the attention's output
    projection.

    Each gate has a parameter `l`. In training, it is sampled in each forward pass,
    `g = clamp(1.2 * sigmoid((logit(u) + l) / 0.33) - 0.1, 0, 1)` with `u` uniform; in evaluation, it is
    `g = clamp(1.2 * sigmoid(l) - 0.1, 0, 1)`. A penalty on the probability `p(l)` that a gate is open closes
    gates:

        [w * sum_blocks mean_heads p(l1) + (1 - w) * sum_blocks mean_heads p(l2)] / (L * H)

    with `L` blocks and `H` heads. The trainer needs [`PenaltyCallback`] for it.

    Reference: "Joint Localization and Activation Editing for Low-Resource Fine-Tuning" (arXiv 2502.01179), section 4.
    Like the released code, unlike the paper, the penalty divides by `H` twice.

    Args:
        penalty_schedule (`str`, defaults to `"exponential"`):
            How `w` depends on the optimizer step `t` of `T`:

            - `"exponential"`: `penalty_weight * exp(-0.01 * t)`;
            - `"linear"`: `penalty_weight * t / T`;
            - `"constant"`: `penalty_weight`.
        penalty_weight (`float`, *optional*):
            From 0 to 1. Default: 0.1, or 0.2 for `"linear"`.
        kwargs: The fields of [`SteeringConfig`]. `a` and `v` are sampled from N(0, 1e-3), or with `init_weights=False`
            from N(0, 0.2), and `l` is uniform in `+-sqrt(6 / (H + 1))`.

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    penalty_schedule: Literal["exponential", "linear", "constant"] = field(
        default="exponential",
        metadata={"help": "How the weight of the penalty changes: 'exponential', 'linear' or 'constant'."},
    )
    penalty_weight: float | None = field(
        default=None, metadata={"help": "Weight of the penalty, from 0 to 1. Default: 0.1, or 0.2 for 'linear'."}
    )

    def card_fields(self):
        return {"penalty": f"{self.penalty_schedule}, {self.penalty_weight}", **super().card_fields()}

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["JOLA"]  # added to PEFT's enum by trl_steer.registration
        check_choice("penalty_schedule", self.penalty_schedule, PENALTY_SCHEDULES)
        if self.penalty_weight is None:
            self.penalty_weight = PENALTY_SCHEDULES[self.penalty_schedule]
        check_number("penalty_weight", self.penalty_weight)
        if not 0 <= self.penalty_weight <= 1:
            raise ValueError(f"penalty_weight must be from 0 to 1, got {self.penalty_weight}.")
