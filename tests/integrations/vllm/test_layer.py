"""The layer gives every token the update of its own adapter, and tokens of the base model none."""

import pytest
import torch
from serving_cases import WHY

pytest.importorskip("vllm", reason=WHY)

from transformers.activations import ACT2FN

from trl_steer.integrations.vllm.layer import Slots, SteeringLayer

WIDTH, SLOTS, MAX_RANK = 12, 3, 4


@pytest.fixture(params=[False, True], ids=["compiled", "eager"])
def layer(request):
    return SteeringLayer(WIDTH, Slots(SLOTS, MAX_RANK, 64, torch.float32, torch.device("cpu"), request.param))


def assign(layer, tokens: list[int]) -> torch.Tensor:
    """Hidden states of tokens with adapters in these slots, -1 for the base model."""
    layer.slots.set_tokens(tokens)
    return torch.randn(len(tokens), WIDTH)


def put(layer, slot: int, r: int, activation: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = torch.randn(r, WIDTH), torch.randn(WIDTH, r + 1)
    if activation is not None:
        layer.slots.allow(activation)
    layer.set_lora(slot, down, up)
    layer.slots.set_activation(slot, activation)
    return down, up


def update(h, down, up, activation=None):
    a = h @ down.T
    a = a if activation is None else ACT2FN[activation](a)
    return a @ up[:, :-1].T + up[:, -1]


@pytest.mark.parametrize(
    "tokens", [[2, 0, -1, 1, 1, 0, -1, 2], [1, 1], [2, 2, 2], [0, -1], [2, 1], [-1, 1, 0], [-1, -1]], ids=str
)
def test_each_token_gets_the_update_of_its_adapter(layer, tokens):
    factors = [put(layer, 0, 4), put(layer, 1, 2, "silu"), put(layer, 2, 0)]
    base, other = assign(layer, tokens), torch.randn(len(tokens), WIDTH)
    output = layer(base, other)
    for row, slot in enumerate(tokens):
        expected = base[row]
        if slot >= 0:
            expected = expected + update((base + other)[row], *factors[slot], "silu" if slot == 1 else None)
        torch.testing.assert_close(output[row], expected)


def test_tokens_of_the_base_model_are_unchanged_bit_for_bit(layer):
    for slot in range(SLOTS):
        put(layer, slot, 4, "relu")
    h = assign(layer, [-1] * 5)
    assert torch.equal(layer(h), h)


def test_another_adapter_in_a_slot_leaves_nothing_of_the_last(layer):
    put(layer, 1, 4, "gelu")
    down, up = put(layer, 1, 2)
    h = assign(layer, [1, 1])
    torch.testing.assert_close(layer(h), h + update(h, down, up))
    layer.reset_lora(1)
    assert torch.equal(layer(h), h)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_stay_in_their_rows(layer, value):
    put(layer, 0, 4)
    down, up = put(layer, 1, 4)
    layer.down[layer.slots.of(0)] = value
    h = assign(layer, [1, -1, 0])
    output = layer(h)
    torch.testing.assert_close(output[0], h[0] + update(h[0], down, up))
    assert torch.equal(output[1], h[1])


@pytest.mark.parametrize("layer", [False], indirect=True, ids=["compiled"])
def test_one_compiled_graph_serves_whatever_is_in_the_slots(layer):
    layer.slots.allow("silu")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True, assume_static_by_default=False):
        for activation, tokens in ((None, [0, 1, -1, 0]), ("silu", [1, 1, -1, 2, 0])):
            put(layer, 1, 3, activation)
            h = assign(layer, tokens)
            torch.testing.assert_close(compiled(h), layer(h))
