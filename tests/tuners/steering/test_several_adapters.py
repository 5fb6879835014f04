"""Several adapters in one model: active ones, deleted ones, sums of them, and different blocks for each."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import HIDDEN_SIZE, tiny_inputs, tiny_model
from peft import PeftModel, get_layer_status, get_model_status
from steering_cases import adapters_of, layers_of, logits, over_kinds, steer, steering_config, update_of
from transformers import GenerationConfig

H = torch.randn(2, 4, HIDDEN_SIZE, generator=torch.Generator().manual_seed(7))


def sum_of_updates(model, names, weights, block: int) -> torch.Tensor:
    layer = layers_of(model)[block]
    total = torch.zeros_like(H, dtype=torch.float64)
    for name, weight in zip(names, weights, strict=True):
        if name in layer.adapters:
            total += weight * update_of(copy.deepcopy(layer.adapters[name]).double(), H.double())
    return total


# Adding, activating, deleting


def test_adapters_of_every_kind_live_in_one_model():
    model = steer(tiny_model(), "low_rank", "a", seed=1)
    steer(model, "silu", "b", seed=2, layers_to_transform=[1])
    steer(model, "vector", "c", seed=3, layers_to_transform=[1, 2])
    model.base_model.set_adapter(["a", "b", "c"])
    for block, layer in enumerate(layers_of(model)):
        names = [name for name in "abc" if name in layer.adapters]
        expected = H + sum_of_updates(model, names, [1] * len(names), block).float()
        torch.testing.assert_close(layer(H), expected, atol=1e-5, rtol=1e-5)
    assert [sorted(layer.adapters) for layer in layers_of(model)] == [["a"], ["a", "b", "c"], ["a", "c"]]


@over_kinds
def test_only_active_adapters_are_trained(kind):
    model = steer(steer(tiny_model(), kind, "a"), kind, "b", layers_to_transform=[0])
    steer(model, kind, "c", layers_to_transform=[2])

    def trainable():
        return {name for name in "abc" for a in adapters_of(model, name) for p in a.parameters() if p.requires_grad}

    assert trainable() == {"a"}
    model.set_adapter("c")
    assert trainable() == {"c"}
    model.base_model.set_adapter(["b", "c"])
    assert trainable() == {"b", "c"}
    with model.disable_adapter():
        assert trainable() == set()
    assert trainable() == {"b", "c"}


def test_deleting_the_active_adapter_activates_the_same_one_on_all_blocks():
    model = steer(tiny_model(), "vector", "all", seed=1)
    steer(model, "vector", "last", seed=2, layers_to_transform=[2])
    steer(model, "vector", "first", seed=3, layers_to_transform=[0])
    model.set_adapter("first")
    expected = logits(model)
    model.set_adapter("all")
    model.delete_adapter("all")
    assert model.active_adapters == ["first"]
    assert {tuple(layer.active_adapters) for layer in layers_of(model)} == {("first",)}
    assert torch.equal(logits(model), expected)
    assert get_model_status(model).active_adapters == ["first"]


@over_kinds
def test_deleted_adapters_leave_nothing_and_the_last_leaves_the_base_model(kind):
    base = tiny_model()
    unsteered = logits(base)
    model = steer(steer(base, kind, "a", seed=1), kind, "b", seed=2, layers_to_transform=[1])
    expected = logits(model)
    model.delete_adapter("b")
    assert not any(".b." in key for key in model.state_dict())
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), expected)
    model.delete_adapter("a")
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model), unsteered)
    assert not any("steering_adapter" in key for key in model.state_dict())


def test_one_of_several_active_adapters_can_be_deleted():
    model = steer(steer(tiny_model(), "vector", "a", seed=1), "silu", "b", seed=2)
    steer(model, "low_rank", "c", seed=3)
    model.base_model.set_adapter(["a", "c"])
    expected = logits(model)
    model.base_model.set_adapter(["a", "b", "c"])
    model.delete_adapter("b")
    assert model.active_adapters == ["a", "c"]
    assert torch.equal(logits(model), expected)


def test_unknown_adapters_are_named():
    model = steer(tiny_model())
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")
    with pytest.raises(ValueError, match="nobody"):
        model(**tiny_inputs(), adapter_names=["nobody", "default"])
    with pytest.raises(ValueError, match="already exists"):
        steer(model)


def test_status_of_model_and_layers_says_what_is_there():
    model = steer(steer(tiny_model(), "low_rank", "a"), "vector", "b", layers_to_transform=[1])
    status = get_model_status(model)
    assert status.peft_types == {"a": "POST_BLOCK_STEERING", "b": "POST_BLOCK_STEERING"}
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (3, True, ["a"])
    assert status.requires_grad == {"a": True, "b": False}
    assert status.devices == {"a": ["cpu"], "b": ["cpu"]}
    assert [layer.available_adapters for layer in get_layer_status(model)] == [["a"], ["a", "b"], ["a"]]
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    assert model.get_nb_trainable_parameters()[0] == 3 * 2 * 3 * HIDDEN_SIZE


def test_life_of_a_model_with_many_adapters(tmp_path):
    """Train, save, add, delete, reload, in an order that nobody planned for."""
    model = steer(tiny_model(), "silu", "a", seed=1).train()
    inputs = tiny_inputs()
    optimizer = torch.optim.SGD(list(model.get_submodule("base_model").parameters()), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "1")
    trained = logits(model)
    steer(model, "vector", "b", seed=2)
    model.set_adapter("b")
    model.delete_adapter("a")
    model.load_adapter(tmp_path / "1" / "a", "a")
    assert model.active_adapters == ["b"]
    model.set_adapter("a")
    assert torch.equal(logits(model), trained)
    clone = copy.deepcopy(model)
    clone.load_adapter(tmp_path / "1" / "a", "again", is_trainable=True)
    clone.set_adapter("again")
    assert torch.equal(logits(clone), trained)
    assert "again" not in model.peft_config
    assert torch.equal(logits(model.unload()), logits(tiny_model()))


@over_kinds
def test_model_moved_to_another_dtype_keeps_working(kind):
    model = steer(tiny_model(), kind).to(torch.bfloat16)
    steer(model, kind, "added later", seed=2)
    for name in ("default", "added later"):
        model.set_adapter(name)
        result = logits(model)
        assert result.dtype == torch.bfloat16
        assert result.isfinite().all()
    model.generate(**tiny_inputs(), max_new_tokens=2)


# A batch with an adapter for each row


@over_kinds
@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {}], ids=str)
@pytest.mark.parametrize("given_by", ["argument", "the model's generation config", "config", "position", "both"])
def test_generation_steers_every_row_by_its_own_adapter(kind, arguments, given_by):
    base = tiny_model()
    model = steer(steer(base, kind, "a", seed=1, scaling=3.0), kind, "b", seed=2, scaling=3.0)
    inputs = tiny_inputs(rows=3)
    args, kwargs = [], {"max_new_tokens": 5, "min_new_tokens": 5}
    if given_by == "argument":
        kwargs |= {"do_sample": False, **arguments}
    elif given_by == "the model's generation config":
        base.generation_config.update(**arguments)
    elif given_by == "config":
        kwargs = {"generation_config": GenerationConfig(**kwargs, **arguments)}
    elif given_by == "position":
        args, kwargs = [inputs.pop("input_ids"), GenerationConfig(**kwargs, **arguments)], {}
    else:  # what the given one leaves open, `generate` takes from the model's own
        base.generation_config.update(**arguments)
        kwargs = {"generation_config": GenerationConfig(**kwargs)}
    expected = {}
    with model.disable_adapter():
        expected["__base__"] = model.generate(*args, **inputs, **kwargs)
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = model.generate(*args, **inputs, **kwargs)
    mixed = model.generate(*args, **inputs, **kwargs, adapter_names=["b", "__base__", "a"])
    each = len(mixed) // 3
    for row, name in enumerate(["b", "__base__", "a"]):
        rows = slice(row * each, (row + 1) * each)
        assert torch.equal(mixed[rows], expected[name][rows])


def test_names_for_rows_are_refused_where_they_make_no_sense():
    model = steer(tiny_model("gpt2"), "vector")
    with pytest.raises(ValueError, match="1 and 2"):
        model(**tiny_inputs(), adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**tiny_inputs(), adapter_names=["default", "default"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model(**tiny_inputs(), adapter_names=["default", "default"])


# Sums

adapters_and_weights = st.lists(
    st.tuples(
        st.integers(1, 4),  # rank
        st.floats(-3, 3, width=32),  # weight
        st.floats(-2, 2, width=32),  # scaling
        st.none() | st.lists(st.integers(0, 1), min_size=1, unique=True),  # blocks
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("kind", ["low_rank", "silu", "vector"])
@settings(max_examples=20, deadline=None)
@given(drawn=adapters_and_weights)
def test_weighted_sum_is_exact_for_any_ranks_weights_scalings_and_blocks(kind, drawn):
    model = None
    for index, (r, _, scaling, blocks) in enumerate(drawn):
        fields = {"scaling": scaling, "layers_to_transform": blocks, **({} if kind == "vector" else {"r": r})}
        model = steer(model or tiny_model(num_hidden_layers=2), kind, f"adapter{index}", seed=index, **fields)
    names = [f"adapter{index}" for index in range(len(drawn))]
    weights = [weight for _, weight, _, _ in drawn]
    active = model.active_adapters
    model.add_weighted_adapter(names, weights, "sum")
    assert model.active_adapters == active
    model.set_adapter("sum")
    for block, layer in enumerate(layers_of(model)):
        assert ("sum" in layer.adapters) == any(name in layer.adapters for name in names)
        expected = sum_of_updates(model, names, weights, block)
        torch.testing.assert_close((layer(H) - H).double(), expected, atol=1e-4, rtol=1e-4)


@over_kinds
def test_weighted_sum_can_be_saved_trained_on_and_does_not_share_weights(kind, tmp_path):
    model = steer(steer(tiny_model(), kind, "a", seed=1), kind, "b", seed=2, layers_to_transform=[1])
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "sum")), expected)
    for adapter in adapters_of(model, "a"):
        for parameter in adapter.parameters():
            parameter.data.zero_()
    assert torch.equal(logits(model), expected)
    assert {p.requires_grad for adapter in adapters_of(model, "sum") for p in adapter.parameters()} == {True}


@pytest.mark.parametrize(
    ("adapters", "weights", "kwargs", "message"),
    [
        (["low_rank", "silu"], [1, 1], {}, "Use adapters with the same activation, or activate them together"),
        (["low_rank", "vector"], [1, 1], {}, "steering_type"),
        (["low_rank"], [1, 2], {}, "1 adapters, 2 weights"),
        ([], [], {}, "0 adapters"),
        (["low_rank", "nobody"], [1, 1], {}, r"no adapter 'nobody'; the model has \['low_rank', "),
        (["low_rank"], [1], {"adapter_name": "silu"}, "already an adapter 'silu'. Choose another name, or delete it"),
        (["low_rank"], [1], {"combination_type": "svd"}, "svd"),
        (["with head"], [1], {}, "modules_to_save"),
        (["low_rank"], [float("nan")], {}, r"weights\[0\] must be finite"),
        (["low_rank"], ["1"], {}, r"weights\[0\] must be a number, got '1'"),
        (["low_rank", "silu"], [1, True], {}, r"weights\[1\] must be a number, got True"),
    ],
)
def test_sums_that_are_not_exact_are_refused_and_add_nothing(adapters, weights, kwargs, message):
    model = steer(tiny_model(), "low_rank", "low_rank")
    steer(model, "silu", "silu")
    steer(model, "vector", "vector")
    steer(model, "vector", "with head", modules_to_save=["lm_head"])
    keys = model.state_dict().keys()
    with pytest.raises((ValueError, TypeError), match=message):
        model.add_weighted_adapter(adapters, weights, **{"adapter_name": "sum", **kwargs})
    assert model.state_dict().keys() == keys
    assert "sum" not in model.peft_config


# Merging


def test_vectors_of_several_adapters_merge_and_come_apart_again():
    base = tiny_model("gpt2")
    biases = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = steer(steer(base, "vector", "a", seed=1), "vector", "b", seed=2, layers_to_transform=[0])
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model)
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("a")
    model.unmerge_adapter()
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in biases.items())
    assert torch.equal(logits(model), expected)


def test_model_with_few_positions_merges():
    model = steer(tiny_model("gpt2", n_positions=8), "vector")
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_disabling_a_merged_adapter_gives_the_base_model():
    model = steer(tiny_model("gpt2"), "vector")
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model("gpt2")))


def test_unmerging_after_a_move_to_another_dtype_keeps_the_dtype():
    model = steer(tiny_model("gpt2"), "vector")
    model.merge_adapter()
    model.to(torch.bfloat16).unmerge_adapter()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_broken_vectors_do_not_merge_safely():
    model = steer(tiny_model("gpt2"), "vector")
    adapters_of(model)[1].vector.data[0] = float("nan")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "bias" in key}
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_low_rank_adapter_among_vectors_is_not_merged():
    model = steer(steer(tiny_model("gpt2"), "vector", "a"), "low_rank", "b")
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="'b' cannot be merged"):
        model.merge_and_unload()
    assert not any(layer.merged for layer in layers_of(model))


def test_config_is_not_changed_by_being_used():
    config = steering_config("vector")
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):
        steer(tiny_model(), "vector")
    assert config.to_dict() == before


def test_the_tuner_itself_honours_the_names_of_adapters():
    model = steer(tiny_model())
    inputs = tiny_inputs()
    expected = logits(model, inputs, adapter_names=["__base__", "default"])
    assert not torch.equal(expected, logits(model, inputs))
    assert torch.equal(logits(model.base_model, inputs, adapter_names=["__base__", "default"]), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_merging_rounds_no_more_than_the_base_model_does(family):
    model = steer(tiny_model(family, dtype=torch.float64), "vector")
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected, atol=1e-12, rtol=1e-12)
