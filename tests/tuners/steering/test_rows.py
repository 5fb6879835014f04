"""`adapter_names` of calls that run at the same time, each in a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from steering_cases import logits, parameters_of, steer

ROUNDS = 12
NAMES = [["a", "b", "__base__"], ["b", "a", "a"], ["__base__", "b", "b"], None]
CASES = [
    ("low_rank", {}),
    ("pre_mlp-vector", {}),
    ("joint-low_rank", {}),
    ("low_rank", {"modules_to_save": ["lm_head"]}),
    ("joint-low_rank", {"modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    ("row", "fields"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_every_thread_gets_the_adapters_that_it_has_asked_for(row, fields, family):
    model = steer(steer(tiny_model(family), row, "a", seed=1, **fields), row, "b", seed=2, **fields)
    for name in ("a", "b"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ord(name))
            for key, parameter in parameters_of(model, name).items():
                if "modules_to_save" in key:
                    parameter.data.add_(torch.randn_like(parameter))
    inputs = tiny_inputs(rows=3)
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = logits(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = logits(model, inputs)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    barrier = threading.Barrier(len(NAMES), timeout=60)

    def run(names):
        results = []
        for _ in range(ROUNDS):
            barrier.wait()
            results.append(logits(model, inputs, **({} if names is None else {"adapter_names": names})))
        return results

    with ThreadPoolExecutor(len(NAMES)) as pool:
        answers = list(pool.map(run, NAMES))
    for names, results in zip(NAMES, answers, strict=True):
        # the thread that asks for nothing gets the active adapter, which is the last
        expected = torch.stack([alone[name][row] for row, name in enumerate(names or ["b"] * 3)])
        for result in results:
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, inputs), alone["b"])
