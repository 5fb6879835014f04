"""The layer in a block, on blocks of every kind of return value."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from steering_cases import adapters_of, layers_of, over_kinds, steer, steering_config, update_of
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from trl_steer.tuners.post_block_steering import LowRankAdapter, VectorAdapter

D = 6
BlockOutput = namedtuple("BlockOutput", ["hidden", "attention"])

RETURNS = {
    "tensor": (lambda hidden: hidden, lambda output: output),
    "tuple": (lambda hidden: (hidden, "attention"), lambda output: output[0]),
    "tuple of one": (lambda hidden: (hidden,), lambda output: output[0]),
    "list": (lambda hidden: [hidden, "attention"], lambda output: output[0]),
    "namedtuple": (lambda hidden: BlockOutput(hidden, "attention"), lambda output: output.hidden),
    "ModelOutput": (
        lambda hidden: BaseModelOutput(last_hidden_state=hidden, attentions=("attention",)),
        lambda output: output.last_hidden_state,
    ),
    "dict": (lambda hidden: {"attention": 1, "hidden_states": hidden}, lambda output: output["hidden_states"]),
}


class Block(nn.Module):
    def __init__(self, wrap=lambda hidden: hidden):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.wrap = wrap
        self.returned = None

    def forward(self, hidden):
        self.returned = self.wrap(hidden + self.linear(hidden))
        return self.returned


class TwoBlocks(nn.Module):
    """Blocks by themselves: what a block returns is what the model returns."""

    def __init__(self, wrap=lambda hidden: hidden):
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=2, hidden_size=D)
        self.layers = nn.ModuleList([Block(wrap), Block(wrap)])

    def forward(self, hidden):
        return self.layers[0](hidden)


def steered(kind="low_rank", wrap=lambda hidden: hidden, **fields):
    torch.manual_seed(0)
    return steer(TwoBlocks(wrap), kind, task_type=None, **fields)


@over_kinds
@pytest.mark.parametrize("returns", RETURNS)
def test_hidden_state_is_steered_wherever_a_block_returns_it(returns, kind):
    wrap, hidden_of = RETURNS[returns]
    model = steered(kind, wrap)
    block = model.get_base_model().layers[0]
    hidden = torch.randn(2, 4, D)
    output = model(hidden)
    unsteered = block.returned
    assert type(output) is type(unsteered)
    expected = hidden_of(unsteered) + update_of(adapters_of(model)[0], hidden_of(unsteered))
    torch.testing.assert_close(hidden_of(output), expected)
    # the rest is passed on, and what the block returned is not written to
    torch.testing.assert_close(hidden_of(unsteered), hidden + block.linear(hidden))
    if isinstance(unsteered, dict):
        assert {key for key in output if output[key] is not unsteered[key]} == {
            next(key for key in output if "hidden" in key)
        }
    elif not isinstance(unsteered, torch.Tensor):
        assert list(output[1:]) == list(unsteered[1:])


def test_block_output_without_a_hidden_state_is_an_error_that_names_the_block():
    with pytest.raises(TypeError, match="Block takes or returns str"):
        steered(wrap=lambda hidden: "hidden")(torch.randn(1, 2, D))


@over_kinds
@pytest.mark.parametrize("shape", [(3, D), (2, 3, D), (2, 3, 4, D), (0, 3, D)])
def test_any_leading_shape_is_steered(kind, shape):
    adapter = adapters_of(steered(kind))[0]
    h = torch.randn(shape)
    torch.testing.assert_close(adapter(h), h + update_of(adapter, h))


@over_kinds
def test_output_is_never_the_input(kind):
    # a block's output can alias something else
    for identity in (True, False):
        adapter = adapters_of(steered(kind, init_weights=identity))[0]
        h = torch.randn(2, 3, D)
        before = h.clone()
        with torch.no_grad():
            adapter(h).add_(1)
        assert torch.equal(h, before)


@pytest.mark.parametrize("init_scale", [1.0, 1e-3])
def test_low_rank_starts_like_lora_times_init_scale(init_scale):
    adapter = LowRankAdapter(1000, steering_config(r=64, init_scale=init_scale))
    adapter.reset_parameters()
    bound = init_scale / 1000**0.5  # Kaiming uniform with a = sqrt(5)
    assert adapter.down.shape == (64, 1000)
    assert adapter.up.shape == (1000, 64)
    assert bool((adapter.up == 0).all())
    assert 0.99 * bound < adapter.down.abs().max() <= bound
    assert adapter.down.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_vector_starts_at_zero():
    adapter = VectorAdapter(D, steering_config("vector"))
    adapter.reset_parameters()
    assert torch.equal(adapter.vector, torch.zeros(D))


def test_layer_is_a_child_of_its_block_but_not_the_other_way_round():
    model = steered()
    layer = layers_of(model)[0]
    block = model.get_base_model().layers[0]
    assert block.post_block_steering is layer
    assert layer.get_base_layer() is block
    assert block not in set(layer.modules())
    assert not hasattr(layer, "weight")


def test_hook_of_a_deep_copied_block_calls_the_copy():
    model = steered()
    clone = copy.deepcopy(model)
    for adapter in adapters_of(clone):
        adapter.up.data.zero_()
    hidden = torch.randn(1, 2, D)
    block = clone.get_base_model().layers[0]
    assert torch.equal(clone(hidden), block.returned)
    assert not torch.allclose(model(hidden), model.get_base_model().layers[0].returned)


def test_hook_runs_before_hooks_that_were_there_already():
    base = TwoBlocks()
    seen = []
    base.layers[0].register_forward_hook(lambda block, args, output: seen.append(output))
    model = steer(base, task_type=None)
    output = model(torch.randn(1, 2, D))
    assert seen[0] is output


@over_kinds
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_dtype_is_the_input_dtype(kind, dtype, adapter_dtype):
    adapter = adapters_of(steered(kind))[0].to(adapter_dtype)
    h = torch.randn(2, 3, D).to(dtype)
    output = adapter(h)
    assert output.dtype == dtype
    expected = h.double() + update_of(adapter.double(), h.double())
    tolerance = 5e-2 if torch.bfloat16 in (dtype, adapter_dtype) else 5e-3
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
