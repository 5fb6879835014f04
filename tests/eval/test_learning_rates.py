"""The comparison of ways to train low-rank steering: each does what its name says, and the whole of it runs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import save_checkpoint
from torch import nn

from trl_steer.eval.experiments import learning_rates
from trl_steer.eval.experiments.learning_rates import VARIANTS, Variant
from trl_steer.files import write_json

LISTS, SOLUTIONS = learning_rates.TASKS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small(monkeypatch):
    """A task for the tiny model."""
    source = {**LISTS.source, "train": 8, "test": 4}
    small = LISTS._replace(source=source, train=8, held_out=4, score="tokens")
    monkeypatch.setattr(learning_rates, "TASKS", (small,))
    monkeypatch.setattr(learning_rates, "VARIANTS", {name: VARIANTS[name] for name in ("default", "rms")})
    return small


def adapters_with_gradients() -> list[nn.ParameterDict]:
    made = [
        nn.ParameterDict({"down": nn.Parameter(torch.randn(2, 6)), "up": nn.Parameter(torch.randn(6, 2))})
        for _ in range(4)
    ]
    for index, adapter in enumerate(made):
        for parameter in adapter.values():
            parameter.grad = torch.randn_like(parameter) * 10 ** (index - 2)
    return made


def change(variant: Variant, adapters) -> None:
    callback = learning_rates._Gradients(variant, adapters)
    callback.on_pre_optimizer_step(None, None, None)


def test_by_default_gradients_stay_as_they_are():
    adapters = adapters_with_gradients()
    before = [parameter.grad.clone() for adapter in adapters for parameter in adapter.values()]
    change(VARIANTS["default"], adapters)
    after = [parameter.grad for adapter in adapters for parameter in adapter.values()]
    assert all(map(torch.equal, before, after))


def test_the_gradient_of_each_block_is_clipped_by_itself():
    adapters = adapters_with_gradients()
    before = [torch.cat([parameter.grad.flatten() for parameter in adapter.values()]) for adapter in adapters]
    change(VARIANTS["clip"], adapters)
    for gradient, adapter in zip(before, adapters, strict=True):
        after = torch.cat([parameter.grad.flatten() for parameter in adapter.values()])
        torch.testing.assert_close(after, gradient * min(1.0, 0.5 / gradient.norm().item()), rtol=1e-4, atol=1e-6)


def test_decay_adds_the_gradient_of_the_squared_norm_of_the_product():
    adapters = adapters_with_gradients()
    before = [parameter.grad.clone() for adapter in adapters for parameter in adapter.values()]
    change(Variant("", decay=0.3), adapters)
    parameters = [parameter for adapter in adapters for parameter in adapter.values()]
    added = torch.autograd.grad(
        0.3 * sum((adapter["up"] @ adapter["down"]).square().sum() for adapter in adapters), parameters
    )
    for parameter, gradient, expected in zip(parameters, before, added, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + expected)


def test_a_factor_on_the_update_is_a_factor_on_adams_rate_of_up():
    """`factor * up` moves as `up` at `factor` times the rate, and `down` at the same rate."""
    h, target, factor = torch.randn(16, 6), torch.randn(16, 6), 4.0
    start = torch.randn(2, 6)

    def train(scaling: float, rate_of_up: float) -> list[torch.Tensor]:
        down, up = start.clone().requires_grad_(), torch.zeros(6, 2, requires_grad=True)
        groups = [{"params": [down]}, {"params": [up], "lr": rate_of_up}]
        optimizer = torch.optim.Adam(groups, lr=1e-3, eps=0)
        for _ in range(5):
            optimizer.zero_grad()
            (scaling * (h @ down.T) @ up.T - target).square().mean().backward()
            if not up.any():
                down.grad = None  # exactly zero, which Adam without eps cannot divide by
            optimizer.step()
        return [down.detach(), scaling * up.detach()]

    for found, expected in zip(train(factor, 1e-3), train(1.0, factor * 1e-3), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("by", "expected"), [("answers", 0.5), ("tokens", 4 / 5)])
def test_the_score_counts_what_greedy_decoding_would_choose(by, expected):
    labels = torch.tensor([[-100, -100, 3, 1, -100], [-100, 2, 2, 0, -100]])
    chosen = torch.tensor([[0, 3, 1, 0, 0], [2, 2, 5, 0, 0]])
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}

    def forward(input_ids, attention_mask):
        return SimpleNamespace(logits=nn.functional.one_hot(chosen, 6).float())

    trainer = SimpleNamespace(
        model=type("Model", (), {"__call__": staticmethod(forward), "eval": lambda self: self})(),
        get_eval_dataloader=lambda: [batch],
    )
    assert learning_rates.score(trainer, by) == pytest.approx(expected)


def test_plateaus_are_rates_within_noise_of_the_best(tmp_path):
    rates = [1e-4, 1e-3, 1e-2]
    means = dict.fromkeys(VARIANTS, (0.2, 0.3, 0.1)) | {"decay": (0.29, 0.3, 0.29), "rms": (0.3,) * 3}
    for name, of_variant in means.items():
        for rate, mean in zip(rates, of_variant, strict=True):
            for seed, deviation in enumerate((-0.02, 0.02)):
                path = learning_rates._path(tmp_path, name, LISTS, rate, seed)
                write_json(path / learning_rates.RESULT, {"score": mean + deviation})
    found = learning_rates.summarize(tmp_path, rates, [0, 1], [LISTS])["tasks"][LISTS.name]
    assert found["deviation"] == pytest.approx(math.sqrt(0.0008))
    assert found["plateaus"]["default"] == pytest.approx(
        {"rate": 1e-3, "score": 0.3, "low": 1e-3, "high": 1e-3, "decades": 0}
    )
    assert found["plateaus"]["decay"] == pytest.approx(
        {"rate": 1e-3, "score": 0.3, "low": 1e-4, "high": 1e-2, "decades": 2}
    )
    assert found["plateaus"]["rms"]["decades"] == pytest.approx(2)


def test_a_variant_counts_with_the_seeds_that_all_its_rates_have(tmp_path):
    rates = [1e-3, 1e-2]
    made = {"default": {1e-3: (0.3, 0.5), 1e-2: (0.2, 0.6)}, "rms": {1e-3: (0.3,), 1e-2: (0.29, 0.9)}}
    for name, scores in {**made, "clip": {1e-3: (0.5,)}}.items():
        for rate, of_seeds in scores.items():
            for seed, score in enumerate(of_seeds):
                path = learning_rates._path(tmp_path, name, LISTS, rate, seed)
                write_json(path / learning_rates.RESULT, {"score": score})
    summary = learning_rates.summarize(tmp_path, rates, [0, 1], [LISTS])
    found = summary["tasks"][LISTS.name]
    assert found["scores"] == {
        "default": {"0.001": [0.3, 0.5], "0.01": [0.2, 0.6]},
        "rms": {"0.001": [0.3], "0.01": [0.29]},
    }
    assert found["deviation"] == pytest.approx(math.sqrt((0.02 + 0.08) / 2))
    assert found["plateaus"]["rms"]["decades"] == pytest.approx(1)
    assert f"| {VARIANTS['rms'].title} | 1 | 0.300 |" in learning_rates.report(summary).summary


def test_the_command_makes_each_run_once_and_reports(model, small, tmp_path, capsys):
    arguments = ["--rates", "1e-3", "1e-1", "--seeds", "0", "1", "--model", model]
    arguments += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    assert learning_rates.main([*arguments, "--tasks", small.name]) == 0
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 8
    before = [path.stat().st_mtime_ns for path in results]
    assert learning_rates.main([*arguments, "--tasks", small.name]) == 0
    assert [path.stat().st_mtime_ns for path in results] == before
    written = json.loads((tmp_path / "out" / "learning_rates.json").read_text())
    assert written["command"].endswith(f"--tasks {small.name} --rates 0.001 0.1 --seeds 0 1")
    for name in ("default", "rms"):
        for rate, scores in written["tasks"][small.name]["scores"][name].items():
            for seed, score in zip((0, 1), scores, strict=True):
                path = learning_rates._path(tmp_path / "runs", name, small, float(rate), seed)
                assert score == json.loads((path / "result.json").read_text())["score"]
    text = (tmp_path / "out" / "learning_rates.md").read_text()
    assert VARIANTS["default"].title in text
    assert VARIANTS["rms"].title in text
    assert (tmp_path / "out" / "learning_rates.png").stat().st_size > 10_000
