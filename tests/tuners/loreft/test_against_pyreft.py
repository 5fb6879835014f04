"""The same outputs and texts as pyreft's own LoReFT with the same weights, at the outputs of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import EOS, PAD, VOCAB_SIZE, tiny_model
from peft import get_peft_model
from steering_cases import adapters_of
from torch.nn.utils import parametrizations

from trl_steer import LoReftConfig

pytestmark = pytest.mark.slow
PROMPT, RANK, POSITIONS = 17, 4, ("last_prompt", "f7+l7")


@pytest.fixture(scope="module")
def pyreft() -> Any:
    return pytest.importorskip("pyreft", reason="pyreft is not installed: pip install pyreft")


def prompt() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(positions: str):
    config = LoReftConfig(r=RANK, positions=positions, task_type="CAUSAL_LM", activation="silu")
    torch.manual_seed(0)
    return get_peft_model(tiny_model(), config).eval()


def theirs(pyreft: Any, model):
    """pyreft's model with the weights of `model`, whose states it edits by itself."""
    base = tiny_model()
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=base.config.hidden_size, low_rank_dimension=RANK, act_fn="silu", dtype=torch.float32
            ),
        }
        for layer in range(base.config.num_hidden_layers)
    ]
    reft = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    reft.set_device("cpu")
    for (_, found), adapter in zip(sorted(reft.interventions.items()), adapters_of(model), strict=True):
        intervention = found[0] if isinstance(found, (list, tuple)) else found
        with torch.no_grad():
            intervention.learned_source.weight.copy_(adapter.weight)
            intervention.learned_source.bias.copy_(adapter.bias)
            layer = pyreft.interventions.LowRankRotateLayer(adapter.weight.shape[1], RANK)
            layer.weight.copy_(adapter.rotation.mT)
        intervention.rotate_layer = parametrizations.orthogonal(layer)
    reft.eval()
    return reft


def locations(positions: str, blocks: int) -> dict[str, Any]:
    tokens = [PROMPT - 1] if positions == "last_prompt" else [*range(7), *range(PROMPT - 7, PROMPT)]
    return {"sources->base": (None, [[tokens]] * blocks)}


@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_are_pyrefts(pyreft, positions):
    model = ours(positions)
    reft, inputs = theirs(pyreft, model), prompt()
    with torch.no_grad():
        _, expected = reft(inputs, unit_locations=locations(positions, len(adapters_of(model))))
        unedited = tiny_model()(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert (expected.logits - unedited).abs().max() > 1e-2


@pytest.mark.parametrize("positions", POSITIONS)
def test_generated_texts_are_pyrefts(pyreft, positions):
    model = ours(positions)
    reft, inputs = theirs(pyreft, model), prompt()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    with torch.no_grad():
        _, expected = reft.generate(
            inputs,
            unit_locations=locations(positions, len(adapters_of(model))),
            intervene_on_prompt=True,
            **options,
        )
        assert torch.equal(model.generate(**inputs, **options), expected)
