"""What a `with` block sets holds for the thread or task that runs it, and for nothing else."""

from __future__ import annotations

import copy
import io
import itertools
import sys
import threading

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from steering_cases import logits, over_kinds, steer

from trl_steer import JointSteeringConfig, adapter_scaling, steering_operator


@pytest.fixture
def impatient_threads():
    """They take turns as often as Python can, so that what can go wrong between two lines does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    """Runs each in a thread of its own, and raises the first error."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_one_operator_object_serves_two_threads_at_once():
    with steering_operator("plain") as plain:
        pass
    default, seen = steering_operator.current(), {}
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with plain:
            first_is_in.set()
            second_is_in.wait(10)
        seen["first, outside"] = steering_operator.current()
        first_is_out.set()

    def second():
        first_is_in.wait(10)
        with plain:
            second_is_in.set()
            first_is_out.wait(10)
            seen["second, inside"] = steering_operator.current()
        seen["second, outside"] = steering_operator.current()

    in_threads(first, second)
    assert default != "plain"
    assert seen == {"first, outside": default, "second, inside": "plain", "second, outside": default}


def test_thousands_of_blocks_in_eight_threads_leave_the_defaults_alone(impatient_threads):
    model = steer(tiny_model(num_hidden_layers=1))
    expected, default = logits(model), steering_operator.current()

    def work():
        for _ in range(1000):
            with steering_operator("plain"), adapter_scaling(model, "default", 0.5):
                pass

    in_threads(*[work] * 8)
    assert steering_operator.current() == default
    assert torch.equal(logits(model), expected)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@over_kinds
@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
def test_copy_made_in_a_block_has_the_adapters_own_scaling_and_compiles(make_copy, kind):
    model = steer(tiny_model(num_hidden_layers=1), kind)
    expected = logits(model)
    with adapter_scaling(model, "default", 0.0):
        clone = make_copy(model)
        assert torch.equal(logits(clone), expected)
    torch._dynamo.reset()
    compiled = torch.compile(clone.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-5)
    with adapter_scaling(clone, "default", 0.0):
        assert torch.equal(logits(clone), logits(tiny_model(num_hidden_layers=1)))


@pytest.mark.parametrize("method", ["steering", "joint"])
def test_threads_name_adapters_for_their_own_rows(method, impatient_threads):
    joint = JointSteeringConfig(init_lora_weights=False, steering={"init_weights": False})
    if method == "joint":
        model = get_peft_model(tiny_model(num_hidden_layers=1), joint)
        model.add_adapter("other", joint)
        model.eval()
    else:
        model = steer(steer(tiny_model(num_hidden_layers=1)), adapter_name="other", seed=1)
    inputs = tiny_inputs(rows=3, length=4)
    choices = [["default", "other", "__base__"], ["other"] * 3, ["__base__"] * 3, None]
    expected = [logits(model, inputs, adapter_names=names) for names in choices]
    for one, another in itertools.pairwise(expected):
        assert not torch.allclose(one, another, atol=1e-3)

    def work(index):
        for _ in range(60):
            torch.testing.assert_close(logits(model, inputs, adapter_names=choices[index]), expected[index])

    in_threads(*[lambda index=index: work(index) for index in range(4)])


@over_kinds
def test_peft_may_switch_off_casts_of_the_input(kind):
    model = steer(tiny_model(), kind)
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)


def test_merging_uses_the_current_scaling():
    model = steer(tiny_model("gpt2"), "vector").double()
    with adapter_scaling(model, "default", 0.5):
        expected = logits(model)
        model.merge_adapter()
        assert torch.allclose(logits(model), expected, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    assert not torch.allclose(logits(model), expected, atol=1e-3)
