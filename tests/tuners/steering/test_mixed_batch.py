"""Batches in which each row has its own adapter: every row gets what its adapter alone would give it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import HIDDEN_SIZE, tiny_inputs, tiny_model
from steering_cases import adapters_of, layers_of, logits, steer
from torch import nn
from torch.nn.utils import prune

from trl_steer import adapter_scaling, hotswap_adapter, set_scaling
from trl_steer.tuners.post_block_steering import LowRankAdapter
from trl_steer.tuners.steering.mixed_batch import BatchRows, Tiles
from trl_steer.tuners.steering.ops.low_rank import low_rank_update
from trl_steer.tuners.steering.ops.stacked import stack_factors, stacked_low_rank_update

BASE = "__base__"
# Adapters that differ in all that may differ in one batch.
DIFFERENT = {
    "linear": ("low_rank", {"r": 3}),
    "linear wide": ("low_rank", {"r": 7, "scaling": -0.5}),
    "linear narrow": ("low_rank", {"r": 1, "scaling": 2.0}),
    "silu": ("silu", {"r": 4}),
    "sigmoid": ("silu", {"r": 2, "activation": "sigmoid"}),  # not zero at zero
    "vector": ("vector", {"scaling": 0.5}),
    "another vector": ("vector", {}),
    "off": ("low_rank", {"scaling": 0.0}),
}


def many(adapters=DIFFERENT, **model_fields):
    model = tiny_model(**model_fields)
    for seed, (name, (row, fields)) in enumerate(adapters.items()):
        model = steer(model, row, name, seed=seed, **fields)
    return model


def alone(model, inputs, names, **kwargs) -> torch.Tensor:
    """The logits of each row from a batch of all rows with its adapter only."""
    each = {}
    for name in {*names}:
        if name == BASE:
            with model.disable_adapter():
                each[name] = logits(model, inputs, **kwargs)
        else:
            model.set_adapter(name)
            each[name] = logits(model, inputs, **kwargs)
    return torch.stack([each[name][row] for row, name in enumerate(names)])


def assert_rows_are_as_alone(model, names=("a", BASE, "b", "a"), tolerance=1e-5):
    inputs = tiny_inputs(rows=len(names))
    expected = alone(model, inputs, names)
    torch.testing.assert_close(
        logits(model, inputs, adapter_names=list(names)), expected, atol=tolerance, rtol=tolerance
    )


# Every row gets what its adapter alone would give it


@pytest.fixture(scope="module")
def layer():
    return layers_of(many(num_hidden_layers=1).double())[0]


over_names = st.lists(st.sampled_from([BASE, *DIFFERENT]), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(names=over_names, length=st.integers(0, 3), is_flat=st.booleans(), seed=st.integers(0, 2**16))
def test_rows_are_steered_by_their_own_adapter_whatever_the_others_are(layer, names, length, is_flat, seed):
    h = torch.randn(len(names), length, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)).double()
    expected = torch.stack(
        [h[row] if name == BASE else layer.adapters[name](h[row]) for row, name in enumerate(names)]
    )
    found = layer(h.flatten(0, 1) if is_flat else h, adapter_names=names, site="post_block")
    assert found.shape == (h.flatten(0, 1) if is_flat else h).shape
    torch.testing.assert_close(found.view(h.shape), expected, atol=1e-12, rtol=1e-12)
    for row, name in enumerate(names):
        if name == BASE:
            assert torch.equal(found.view(h.shape)[row], h[row])


@pytest.mark.parametrize("count", [1, 8, 64])
def test_many_adapters_in_a_large_batch(count):
    adapters = {f"adapter{index}": ("low_rank", {"r": 1 + index % 3}) for index in range(count)}
    model = many(adapters, num_hidden_layers=1)
    names = [f"adapter{index * 7 % count}" for index in range(128)]
    names[5:8] = [BASE] * 3
    assert_rows_are_as_alone(model, names)


def test_rows_do_not_see_each_other(layer):
    """Not even a row that is not finite, though the rows of an adapter are computed together."""
    names = ["linear", "silu", "linear wide", BASE, "vector", "linear"]
    h = torch.randn(6, 2, HIDDEN_SIZE).double()
    expected = layer(h, adapter_names=names)
    for row in range(6):
        broken = h.clone()
        broken[row] = torch.tensor([float("nan"), float("inf")])[:, None]
        found = layer(broken, adapter_names=names)
        others = [other for other in range(6) if other != row]
        assert torch.equal(found[others], expected[others])
        assert not found[row].isfinite().any()


def test_generation_with_all_kinds_of_adapters_and_positions():
    adapters = {
        "all": ("silu", {}),
        "last": ("low_rank", {"positions": "last_prompt"}),
        "last vector": ("vector", {"positions": "last_prompt"}),
        "last wide": ("low_rank", {"positions": "last_prompt", "r": 5}),
        "ends": ("low_rank", {"positions": "f1+l1"}),
    }
    model = many({name: (row, {"scaling": 3.0, **fields}) for name, (row, fields) in adapters.items()})
    names = ["last", "ends", BASE, "last wide", "all", "last vector", "last"]
    inputs = tiny_inputs(rows=len(names))
    inputs["attention_mask"][1, :3] = 0
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    expected = []
    for row, name in enumerate(names):
        one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if name == BASE:
            with model.disable_adapter():
                expected.append(model.generate(**one, **arguments))
        else:
            model.set_adapter(name)
            expected.append(model.generate(**one, **arguments))
    assert torch.equal(model.generate(**inputs, **arguments, adapter_names=names), torch.cat(expected))


def test_adapters_without_a_common_form_are_called_for_their_rows():
    model = many({name: ("loreft", {"positions": "f2+l2", "share_weights": False}) for name in "ab"})
    assert_rows_are_as_alone(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_on_a_model_in_16_bits(dtype):
    model = tiny_model(num_hidden_layers=1).to(dtype)
    for seed, (row, name) in enumerate((("low_rank", "a"), ("silu", "b"), ("vector", "c"))):
        model = steer(model, row, name, seed=seed)
    steer(model, "low_rank", "in 16 bits", seed=7)
    adapters_of(model, "in 16 bits")[0].to(dtype)
    assert adapters_of(model, "a")[0].down.dtype == torch.float32
    names = ["a", "in 16 bits", "c", BASE, "b", "a"]
    inputs = tiny_inputs(rows=len(names))
    mixed = logits(model, inputs, adapter_names=names)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, alone(model, inputs, names), atol=2e-2, rtol=2e-2)
    (layer,) = layers_of(model)
    h = torch.randn(6, 2, HIDDEN_SIZE).to(dtype)
    for row, name in enumerate(names):
        expected = h[row] if name == BASE else layer.adapters[name](h[row])
        torch.testing.assert_close(layer(h, adapter_names=names)[row], expected)


def test_autocast_rounds_as_for_one_adapter():
    model = many({"a": ("low_rank", {}), "b": ("silu", {})}, num_hidden_layers=1)
    (layer,) = layers_of(model)
    h = torch.randn(2, 3, HIDDEN_SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(h, adapter_names=["a", "b"])
        expected = torch.stack([layer.adapters[name](h[row]) for row, name in enumerate("ab")])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(found, layer(h, adapter_names=["a", "b"]), atol=1e-6)


def test_gradients_are_those_of_each_row_alone():
    model = many({"a": ("low_rank", {}), "b": ("silu", {"r": 2}), "c": ("vector", {})}).double()
    names, inputs = ["a", BASE, "b", "a", "c"], tiny_inputs(rows=5)
    model.requires_grad_(True)

    def gradients(adapter_names):
        model.zero_grad()
        for rows in adapter_names:
            rows_of = {key: tensor[rows[0] : rows[0] + len(rows[1])] for key, tensor in inputs.items()}
            model(**rows_of, adapter_names=rows[1]).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, apart = gradients([(0, names)]), gradients([(row, [name]) for row, name in enumerate(names)])
    assert together.keys() == apart.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, atol=1e-8, rtol=1e-8)
    context = model.base_model._enable_peft_forward_hooks(adapter_names=names)
    with context:  # two backward passes through the same weights
        for _ in range(2):
            model.get_base_model()(**inputs).logits.square().sum().backward()


@pytest.mark.slow
def test_compiled_model_steers_rows_by_their_own_adapters():
    torch._dynamo.reset()
    model = many({"a": ("low_rank", {}), "b": ("vector", {})}, num_hidden_layers=1)
    inputs, names = tiny_inputs(rows=3), ["b", BASE, "a"]
    expected = logits(model, inputs, adapter_names=names)
    model.get_base_model().compile(backend="eager")
    for order in (names, names[::-1], names):
        torch.testing.assert_close(
            logits(model, inputs, adapter_names=order), alone(model, inputs, order), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(logits(model, inputs, adapter_names=names), expected)
    torch._dynamo.reset()


# An adapter that changes between two calls


def train(model):
    model.set_adapter("a")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = tiny_inputs()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    model.eval()


def write_data(model):
    for adapter in adapters_of(model, "a"):
        for parameter in adapter.parameters():
            parameter.data.mul_(-2.0)


def replace_parameters(model):
    for adapter in adapters_of(model, "a"):
        adapter.up = nn.Parameter(torch.randn_like(adapter.up))


def delete_and_add(model):
    model.delete_adapter("a")
    steer(model, "silu", "a", seed=5, r=5)


def load_state(model):
    state = {key: 2 * tensor for key, tensor in model.state_dict().items() if ".a." in key}
    model.load_state_dict(state, strict=False)


def swap(model, folder):
    other = steer(tiny_model(), "low_rank", "default", seed=9)
    other.save_pretrained(folder)
    hotswap_adapter(model, folder, "a")


CHANGES = {
    "training step": train,
    "write to .data": write_data,
    "replaced parameters": replace_parameters,
    "deleted and added": delete_and_add,
    "loaded over": load_state,
    "scaling": lambda model: set_scaling(model, "a", -1.5),
    "dtype": lambda model: model.double(),
    "weights in place": lambda model: [adapter.up.detach().zero_() for adapter in adapters_of(model, "a")],
    "pruned": lambda model: [prune.random_unstructured(each, "up", 0.5) for each in adapters_of(model, "a")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_next_call_sees_a_changed_adapter(change):
    model = many({"a": ("low_rank", {}), "b": ("low_rank", {"r": 2})})
    assert_rows_are_as_alone(model)
    inputs = tiny_inputs()
    before = logits(model, inputs, adapter_names=["a", "b"])
    with torch.enable_grad():
        CHANGES[change](model)
    after = logits(model, inputs, adapter_names=["a", "b"])
    assert change == "dtype" or not torch.allclose(after[0], before[0], atol=1e-3)
    torch.testing.assert_close(after[1], before[1].to(after.dtype), atol=1e-4, rtol=1e-4)
    assert_rows_are_as_alone(model)


def test_next_call_sees_a_swapped_adapter_and_an_open_context(tmp_path):
    model = many({"a": ("low_rank", {}), "b": ("low_rank", {"r": 2})})
    assert_rows_are_as_alone(model)
    swap(model, tmp_path)
    assert_rows_are_as_alone(model)
    with adapter_scaling(model, "a", -2.0):
        assert_rows_are_as_alone(model)
    assert_rows_are_as_alone(model)


def test_adapter_with_hooks_of_others_is_called():
    """As accelerate's offloading, pruning and per-sample gradients need it."""
    model = many({name: ("low_rank", {}) for name in "ab"})
    seen = []
    for adapter in adapters_of(model, "a"):
        adapter.register_forward_hook(lambda adapter, args, output: seen.append(adapter))
    assert_rows_are_as_alone(model)
    seen.clear()
    logits(model, tiny_inputs(rows=3), adapter_names=["a", "b", "a"])
    assert seen == adapters_of(model, "a")


def test_adapter_in_training_mode_keeps_its_dropout():
    model = many({"a": ("low_rank", {"dropout": 0.5}), "b": ("low_rank", {})}, num_hidden_layers=1)
    (layer,) = layers_of(model)
    h, names = torch.randn(2, 3, HIDDEN_SIZE), ["a", "b"]
    first, second = layer(h, adapter_names=names), layer(h, adapter_names=names)
    assert torch.equal(first, second)
    layer.train()
    first, second = layer(h, adapter_names=names), layer(h, adapter_names=names)
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_weights_that_are_not_there_are_an_error():
    model = many({"a": ("low_rank", {}), "b": ("vector", {})}, num_hidden_layers=1)
    adapters_of(model, "a")[0].to("meta")
    with pytest.raises(RuntimeError, match="meta device"):
        logits(model, tiny_inputs(), adapter_names=["a", "b"])


# What a call keeps, and what it costs


@pytest.fixture
def stacked(monkeypatch):
    """The adapters of each stack that is built."""
    built, original = [], LowRankAdapter.batch_update

    def count(adapters, scalings):
        built.append(adapters)
        return original(adapters, scalings)

    monkeypatch.setattr(LowRankAdapter, "batch_update", staticmethod(count))
    return built


def test_generate_stacks_the_weights_that_are_named_in_its_first_passes_only(stacked):
    model = many({f"adapter{index}": ("low_rank", {}) for index in range(12)})
    names = ["adapter3", "adapter7", BASE, "adapter3"]
    model.generate(**tiny_inputs(rows=4), max_new_tokens=6, min_new_tokens=6, adapter_names=names)
    for layer, adapters in zip(layers_of(model) * 2, stacked, strict=True):
        assert {*adapters} == {layer.adapters["adapter3"], layer.adapters["adapter7"]}


def test_nothing_is_kept_after_a_call(monkeypatch):
    calls = []
    original = BatchRows.__init__

    def count(self, *args):
        original(self, *args)
        calls.append(weakref.ref(self))

    monkeypatch.setattr(BatchRows, "__init__", count)
    model = many({"a": ("low_rank", {}), "b": ("silu", {})})
    keys = model.state_dict().keys()
    model.generate(**tiny_inputs(), max_new_tokens=2)
    size = len(pickle.dumps(model))
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    model.generate(**tiny_inputs(), max_new_tokens=2, adapter_names=["a", "b"])
    gc.collect()
    assert [call() for call in calls] == [None]  # which held the stacked weights
    assert model.state_dict().keys() == keys
    assert len(pickle.dumps(model)) == size
    assert {name: sorted(vars(module)) for name, module in copy.deepcopy(model).named_modules()} == attributes


@settings(max_examples=60, deadline=None)
@given(owners=st.lists(st.integers(-1, 6), max_size=40))
def test_tiles_hold_every_item_once_and_are_at_most_two_for_each_adapter(owners):
    tiles = Tiles.of(torch.tensor(owners, dtype=torch.long), torch.device("cpu"))
    items = [item for item, owner in enumerate(owners) if owner >= 0]
    index = list(range(len(owners))) if tiles.index is None else tiles.index.tolist()
    assert [index[place] for place in tiles.places] == items
    assert len(index) <= 2 * len(items)
    assert len(tiles.owners) <= 2 * len({owners[item] for item in items})
    for item, place in zip(items, tiles.places.tolist(), strict=True):
        assert tiles.owners[place * len(tiles.owners) // len(index)] == owners[item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_stacked_update_is_that_of_each_adapter(dtype, factors):
    generator = torch.Generator().manual_seed(0)
    ranks, scalings = (3, 1, 4), [1.0, -2.0, 0.5]
    h = torch.randn(3, 5, 16, generator=generator).to(dtype)
    down = [torch.randn(r, 16, generator=generator).to(factors) for r in ranks]
    up = [torch.randn(16, r, generator=generator).to(factors) for r in ranks]
    found = stacked_low_rank_update(h, *stack_factors(down, up, scalings), torch.sigmoid)
    assert found.dtype == dtype
    for entry in range(3):
        expected = low_rank_update(
            h[entry].double(), down[entry].double(), up[entry].double(), scalings[entry], torch.sigmoid
        )
        tolerance = 1e-5 if torch.promote_types(dtype, factors) == dtype == torch.float32 else 5e-2
        torch.testing.assert_close(found[entry].double(), expected, atol=tolerance, rtol=tolerance)
