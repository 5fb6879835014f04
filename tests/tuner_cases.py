"""The tuners that the tests run over: a new tuner is a new row here, and gets every test of the matrix."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from model_zoo import FAMILIES
from peft import LoraConfig
from peft.config import PeftConfig

from trl_steer import (
    JointSteeringConfig,
    JolaConfig,
    LofitConfig,
    LoReftConfig,
    PostBlockSteeringConfig,
    SublayerSteeringConfig,
)

# Four that differ: norms only in front of the sublayers, norms behind them too, `Conv1D` with biases, an MLP whose
# layers are children of the block and get the tokens of all rows as one list.
FOUR_FAMILIES = ("llama", "gemma3", "gpt2", "opt")
VECTOR_IS_A_BIAS = tuple(name for name, family in FAMILIES.items() if family.merges_vector)


@dataclass(frozen=True)
class Row:
    """
    One way to configure a tuner, and what differs between tuners.

    Attributes:
        config_cls (`type`): The class of the configuration.
        fields (`dict`): Its fields, for an adapter whose weights are all drawn at random.
        families (`tuple[str, ...]`): Families of the model zoo to run on.
        starts_at_identity (`bool`): Whether a fresh adapter is the base model bit for bit.
        merges (`tuple[str, ...]`): Those of `families` where it can be merged into the base model.
        has_gates (`bool`): Whether training draws gates, of which shut ones leave parameters without a gradient.
    """

    config_cls: type[PeftConfig]
    fields: dict[str, Any]
    families: tuple[str, ...] = FOUR_FAMILIES
    starts_at_identity: bool = True
    merges: tuple[str, ...] = field(default=())
    has_gates: bool = False

    @property
    def has_lora(self) -> bool:
        """Whether LoRA layers are part of the adapter, which stand around linear layers of the base model."""
        return issubclass(self.config_cls, LoraConfig)

    def config(self, fresh: bool = False, **changes) -> PeftConfig:
        """The configuration.

        Args:
            fresh (`bool`): Initialize as the tuner does by default, and not at random.
            changes: Fields to change. Where an adapter has two halves, those of both that have the field.
        """
        values = {"task_type": "CAUSAL_LM", **(_without_init(self.fields) if fresh else self.fields)}
        own = {f.name for f in fields(self.config_cls)}
        if "steering" in own:
            half = {f.name for f in fields(PostBlockSteeringConfig)} - {f.name for f in fields(PeftConfig)}
            half -= {"modules_to_save", "trainable_token_indices"}
            values["steering"] = values["steering"] | {k: v for k, v in changes.items() if k in half}
            changes = {k: v for k, v in changes.items() if k in own}
        return self.config_cls(**{**values, **changes})


def _without_init(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_init(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not name.startswith("init_")
    }


LOW_RANK = {"r": 3, "init_weights": False}
SILU = {"r": 3, "activation": "silu", "init_weights": False}
VECTOR = {"steering_type": "vector", "init_weights": False}
LORA = {"r": 4, "init_lora_weights": False}
BIASED = ("gpt2", "opt")
HEADS = [(0, 1), (0, 3), (1, 0), (2, 0), (2, 2), (2, 3)]

ROWS = {
    "low_rank": Row(PostBlockSteeringConfig, LOW_RANK, families=tuple(FAMILIES)),
    "silu": Row(PostBlockSteeringConfig, SILU, families=tuple(FAMILIES)),
    "vector": Row(PostBlockSteeringConfig, VECTOR, families=tuple(FAMILIES), merges=VECTOR_IS_A_BIAS),
    "pre_mlp-low_rank": Row(SublayerSteeringConfig, {"site": "pre_mlp", **LOW_RANK}, merges=FOUR_FAMILIES),
    "pre_mlp-silu": Row(SublayerSteeringConfig, {"site": "pre_mlp", **SILU}),
    "pre_mlp-vector": Row(SublayerSteeringConfig, {"site": "pre_mlp", **VECTOR}, merges=BIASED),
    "post_mlp-low_rank": Row(SublayerSteeringConfig, {"site": "post_mlp", **LOW_RANK}, merges=("llama", *BIASED)),
    "post_mlp-silu": Row(SublayerSteeringConfig, {"site": "post_mlp", **SILU}),
    "post_mlp-vector": Row(SublayerSteeringConfig, {"site": "post_mlp", **VECTOR}, merges=BIASED),
    "post_attn-low_rank": Row(SublayerSteeringConfig, {"site": "post_attn", **LOW_RANK}, merges=("llama", *BIASED)),
    "post_attn-silu": Row(SublayerSteeringConfig, {"site": "post_attn", **SILU}),
    "post_attn-vector": Row(SublayerSteeringConfig, {"site": "post_attn", **VECTOR}, merges=BIASED),
    "loreft": Row(LoReftConfig, {"r": 3}, starts_at_identity=False),
    "post_mlp-loreft": Row(LoReftConfig, {"r": 3, "site": "post_mlp"}, starts_at_identity=False, merges=BIASED),
    "lofit": Row(LofitConfig, {"init_weights": False}, starts_at_identity=False, merges=BIASED),
    "lofit-heads": Row(LofitConfig, {"heads": HEADS, "init_weights": False}, starts_at_identity=False, merges=BIASED),
    "lofit-scale": Row(
        LofitConfig, {"phase": "scale", "init_weights": False}, starts_at_identity=False, merges=FOUR_FAMILIES
    ),
    "jola": Row(JolaConfig, {"init_weights": False}, starts_at_identity=False, merges=BIASED, has_gates=True),
    "joint-low_rank": Row(JointSteeringConfig, {**LORA, "steering": LOW_RANK}),
    "joint-vector": Row(JointSteeringConfig, {**LORA, "steering": VECTOR}, merges=BIASED),
}


def cases(
    rows: tuple[str, ...] = tuple(ROWS), families: tuple[str, ...] | None = None, slow: tuple[str, ...] = ()
) -> list:
    """A row and a family each: all families of the rows, or those of `families`. Those of `slow` are marked slow."""
    return [
        pytest.param(row, family, id=f"{row}-{family}", marks=[pytest.mark.slow] if family in slow else [])
        for row in rows
        for family in ROWS[row].families
        if families is None or family in families
    ]


over_rows = pytest.mark.parametrize("row", ROWS)
over_cases = pytest.mark.parametrize(("row", "family"), cases())


def over_rows_on(*families: str, slow: tuple[str, ...] = ()):
    """All rows, on some of their families only, of which some may be slow."""
    return pytest.mark.parametrize(("row", "family"), cases(families=(*families, *slow), slow=slow))
