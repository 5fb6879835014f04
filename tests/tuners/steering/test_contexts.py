"""`with` blocks that set a scaling or an operator: what runs inside them is affected, and nothing else, in whatever
order they end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from model_zoo import tiny_model
from peft import PeftModel
from steering_cases import adapters_of, logits, steer

from trl_steer import adapter_scaling, hotswap_adapter, set_scaling, steering_operator
from trl_steer.tuners.steering.ops.switch import OPERATORS


@contextmanager
def in_threads():
    """Runs functions in a thread each, and raises what they raise."""
    errors, threads = [], []

    def start(function):
        def run():
            try:
                function()
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class Scalings:
    """A steered model that reports the scaling that it runs with."""

    def __init__(self):
        self.model = steer(tiny_model(num_hidden_layers=1), "vector", scaling=0.5)
        self.adapter = adapters_of(self.model)[0]
        self.vector = self.adapter.vector.detach().clone()

    def block(self, value):
        return adapter_scaling(self.model, "default", value)

    def current(self) -> float:
        h = torch.zeros(1, 1, len(self.vector))
        seen = []
        layer = self.model.get_base_model().model.layers[0].post_block_steering
        with torch.no_grad():
            seen.append(layer(h))
        return round((seen[0].flatten() @ self.vector / self.vector.square().sum()).item(), 4)

    values = (2.0, -3.0, 0.0, 7.0)
    default = 0.5


class Operators:
    """The same for the operator of low-rank updates."""

    values = (OPERATORS[1], OPERATORS[0], OPERATORS[1], OPERATORS[0])
    default = OPERATORS[0]

    def block(self, value):
        return steering_operator(value)

    def current(self) -> str:
        return steering_operator.current()


@pytest.fixture(params=[Scalings, Operators])
def switch(request):
    """What is switched. Every test starts with the default operator, whatever one before has left."""
    steering_operator(OPERATORS[0])
    return request.param()


# Orders


def scope(switch, value):
    with switch.block(value):
        yield switch.current()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_blocks_of_generators_may_end_in_any_order(switch, order):
    values = switch.values[:3]
    generators = [scope(switch, value) for value in values]
    assert [next(generator) for generator in generators] == list(values)
    still_open = list(range(3))
    for index in order:
        generators[index].close()
        still_open.remove(index)
        assert switch.current() == (values[still_open[-1]] if still_open else switch.default)


def test_a_block_around_a_generator_goes_on_inside_and_after_it(switch):
    outer, inner = switch.values[:2]
    with switch.block(outer):
        generator = scope(switch, inner)
        assert next(generator) == inner
        assert switch.current() == inner  # a generator runs in the context of whoever calls it
        generator.close()
        assert switch.current() == outer
    assert switch.current() == switch.default


def test_a_generator_may_be_closed_in_another_context_than_it_ran_in(switch):
    elsewhere = contextvars.copy_context()
    generator = scope(switch, switch.values[0])
    next(generator)
    elsewhere.run(generator.close)
    assert switch.current() == switch.default

    generator = scope(switch, switch.values[0])
    elsewhere.run(next, generator)
    assert switch.current() == switch.default
    generator.close()
    assert elsewhere.run(switch.current) == switch.default


# Tasks


def test_tasks_do_not_see_the_blocks_of_each_other(switch):
    async def task(value, gate):
        with switch.block(value):
            for _ in range(3):
                await gate.wait()
                assert switch.current() == value
                await asyncio.sleep(0)
        assert switch.current() == switch.default

    async def main():
        gate = asyncio.Event()
        tasks = [asyncio.create_task(task(value, gate)) for value in switch.values]
        await asyncio.sleep(0)
        assert switch.current() == switch.default
        gate.set()
        await asyncio.gather(*tasks)
        assert switch.current() == switch.default

    asyncio.run(main())


def test_a_task_inherits_the_block_that_it_is_made_in_for_as_long_as_that_lasts(switch):
    value = switch.values[0]

    async def task(ended):
        seen = [switch.current()]
        await ended.wait()
        return [*seen, switch.current()]

    async def main():
        ended = asyncio.Event()
        with switch.block(value):
            inside = asyncio.create_task(task(ended))
            await asyncio.sleep(0)
        ended.set()
        return await inside

    assert asyncio.run(main()) == [value, switch.default]


# Threads


def test_threads_do_not_see_the_blocks_of_each_other(switch):
    barrier = threading.Barrier(len(switch.values), timeout=60)

    def run(value):
        for _ in range(5):
            with switch.block(value):
                barrier.wait()
                assert switch.current() == value
                barrier.wait()
            assert switch.current() == switch.default

    with switch.block(switch.values[0]):
        with in_threads() as start:
            for value in switch.values:
                start(lambda value=value: run(value))
        assert switch.current() == switch.values[0]
    assert switch.current() == switch.default


# What is left behind


def test_a_model_is_not_kept_alive_by_blocks_that_have_ended():
    model = steer(tiny_model(), "vector")
    generators = [scope_of(model, value) for value in (2.0, 3.0)]
    for generator in generators:
        next(generator)
    elsewhere = contextvars.copy_context()
    generators[0].close()
    elsewhere.run(generators[1].close)  # the context here is not told
    dead = weakref.ref(adapters_of(model)[0])
    del model, generators, generator
    gc.collect()
    assert dead() is None


def scope_of(model, value):
    with adapter_scaling(model, "default", value):
        yield


def test_an_error_inside_a_block_ends_it(switch):
    with pytest.raises(KeyError), switch.block(switch.values[0]):
        raise KeyError
    assert switch.current() == switch.default


# What may happen inside a block


def test_saving_inside_a_block_saves_the_adapters_own_scaling(tmp_path):
    model = steer(tiny_model(), scaling=0.5)
    expected = logits(model)
    with adapter_scaling(model, "default", 3.0):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.peft_config["default"].scaling == 0.5
    assert torch.equal(logits(loaded), expected)


def test_hot_swap_inside_a_block_brings_weights_now_and_scaling_when_the_block_ends(tmp_path):
    other = steer(tiny_model(), seed=5, scaling=0.25)
    other.save_pretrained(tmp_path)
    expected = logits(other)
    set_scaling(other, "default", 3.0)
    model = steer(tiny_model(), seed=1)
    with adapter_scaling(model, "default", 3.0):
        hotswap_adapter(model, tmp_path)
        assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].scaling == 0.25


def test_scaling_set_inside_a_block_counts_when_the_block_ends():
    model = steer(tiny_model())
    expected = {}
    for value in (2.0, -1.0):
        set_scaling(model, "default", value)
        expected[value] = logits(model)
    with adapter_scaling(model, "default", 2.0):
        set_scaling(model, "default", -1.0)
        assert torch.equal(logits(model), expected[2.0])
    assert torch.equal(logits(model), expected[-1.0])


def test_an_adapter_deleted_inside_its_block_is_gone_and_takes_no_other_along():
    model = steer(steer(tiny_model(), "low_rank", "a", seed=1), "vector", "b", seed=2)
    model.set_adapter("b")
    only_b = logits(model)
    model.set_adapter("a")
    with adapter_scaling(model, "a", 4.0):
        model.delete_adapter("a")
        assert torch.equal(logits(model), only_b)
        # one of the same name is another adapter, and no block is about it
        steer(model, "low_rank", "a", seed=3)
        model.set_adapter("a")
        inside = logits(model)
    assert torch.equal(logits(model), inside)
    model.set_adapter("b")
    assert torch.equal(logits(model), only_b)
