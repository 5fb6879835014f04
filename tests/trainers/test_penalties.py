"""`PenaltyCallback`: what the optimizer sees is the clipped gradient of the task and the whole one of the penalty."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import get_peft_model
from processes import run_in_world
from tiny_chat import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl_cases import assert_only_adapter_changed, make_trainer, snapshot

from trl_steer import JolaConfig, LofitConfig, PenaltyCallback, PostBlockSteeringConfig
from trl_steer.tuners.steering import adapter_penalty

CONFIGS = {
    "lofit": lambda: LofitConfig(phase="scale", penalty_weight=0.3, task_type="CAUSAL_LM"),
    "jola": lambda: JolaConfig(penalty_schedule="linear", penalty_weight=1.0, task_type="CAUSAL_LM"),
}
STEPS = 3


class Recorder(TrainerCallback):
    """What the optimizer sees at each step, and the gradient of the penalty there."""

    def __init__(self):
        self.seen, self.of_penalty = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append({name: p.grad.clone() for name, p in parameters.items()})
        penalty = adapter_penalty(model, state.global_step, STEPS)
        gradients = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
        self.of_penalty.append(
            {
                n: torch.zeros_like(parameters[n]) if g is None else g
                for n, g in zip(parameters, gradients, strict=True)
            }
        )


class Undo(TrainerCallback):
    """Leaves weights as they are, so that runs with and without a penalty see the same gradients of the task."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, tensor in self.before.items():
            model.get_parameter(name).data.copy_(tensor)


def recorded(kind, folder, callbacks=(), **arguments) -> Recorder:
    recorder = Recorder()
    torch.manual_seed(0)
    trainer = make_trainer(
        *("sft", folder, None, CONFIGS[kind]()),
        extra={"callbacks": [*callbacks, recorder, Undo()]},
        **{"max_steps": STEPS, "per_device_train_batch_size": 2, "bf16": False, **arguments},
    )
    trainer.train()
    return recorder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_grad_norm": 0.0},
        pytest.param({"max_grad_norm": 1e-3}, marks=pytest.mark.slow),
        {"max_grad_norm": 1e-3, "gradient_accumulation_steps": 3},
        pytest.param({"max_grad_norm": 0.0, "gradient_accumulation_steps": 3}, marks=pytest.mark.slow),
        {"max_grad_norm": 1e-3, "bf16": True, "gradient_accumulation_steps": 2},
    ],
    ids=["no clipping", "clipping", "clipping, accumulation", "accumulation", "bf16"],
)
def test_the_whole_gradient_of_the_penalty_is_added_once_to_the_clipped_one_of_the_task(kind, arguments, tmp_path):
    task = recorded(kind, tmp_path, **arguments)
    both = recorded(kind, tmp_path, [PenaltyCallback()], **arguments)
    assert len(task.seen) == len(both.seen) == STEPS
    for step, (alone, seen, penalty) in enumerate(zip(task.seen, both.seen, both.of_penalty, strict=True)):
        norm = torch.stack([gradient.norm() for gradient in alone.values()]).norm()
        assert norm <= 1.01e-3 or arguments["max_grad_norm"] == 0
        for name, gradient in seen.items():
            torch.testing.assert_close(gradient, alone[name] + penalty[name], rtol=1e-5, atol=1e-7, msg=name)
        assert any(gradient.abs().sum() > 0 for gradient in penalty.values())
        if kind == "jola":  # linear: nothing on the gates of offsets at first, then more and more
            gates = sum(float(g.abs().sum()) for name, g in penalty.items() if name.endswith("offset_log_gate"))
            assert (gates > 0) == (step > 0)


def test_schedules_count_optimizer_steps_also_in_a_resumed_run(tmp_path, monkeypatch):
    asked = []

    def spy(model, step=0, max_steps=1):
        asked.append((step, max_steps))
        return adapter_penalty(model, step, max_steps)

    monkeypatch.setattr("trl_steer.trainers.callbacks.adapter_penalty", spy)
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "bf16": False}
    for resume in (None, True):
        asked.clear()
        trainer = make_trainer(
            *("sft", tmp_path, None, CONFIGS["jola"]()),
            extra={"callbacks": [PenaltyCallback()]},
            **{**arguments, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None},
        )
        if resume:
            resume = str(tmp_path / "checkpoint-3")
        trainer.train(resume_from_checkpoint=resume)
        steps = asked[1:]  # the first question is whether there is a penalty
        assert steps == [(step, 4) for step in ((3,) if resume else range(4))]


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_with_a_penalty_moves_the_adapter_and_nothing_else(kind, tmp_path):
    trainer = make_trainer("sft", tmp_path, None, CONFIGS[kind](), extra={"callbacks": [PenaltyCallback()]})
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)


def test_without_a_penalty_nothing_changes(tmp_path):
    weights = []
    for callbacks in ([], [PenaltyCallback()]):
        torch.manual_seed(0)
        config = PostBlockSteeringConfig(r=2, task_type="CAUSAL_LM")
        trainer = make_trainer("sft", tmp_path, None, config, extra={"callbacks": callbacks})
        trainer.train()
        weights.append(snapshot(trainer.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# fp16, whose gradients are multiplied by a loss scale until they are clipped or the optimizer steps


@pytest.mark.parametrize("clipped", [False, True])
def test_the_penalty_is_added_to_gradients_at_their_own_scale(clipped):
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    model = get_peft_model(tiny_model(), CONFIGS["lofit"]())
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(parameters, lr=1.0), device_placement=False, scaler=scaler)
    task = [torch.randn_like(p) for p in parameters]
    loss = sum((p * g).sum() for p, g in zip(parameters, task, strict=True))
    scaler.scale(loss).backward()
    torch.testing.assert_close(parameters[0].grad, 1024 * task[0])
    if clipped:
        scaler.unscale_(optimizer.optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        norm = torch.stack([g.norm() for g in task]).norm()
        task = [g * 0.5 / norm for g in task]
    PenaltyCallback().on_pre_optimizer_step(
        None, TrainerState(max_steps=3), TrainerControl(), model=model, optimizer=optimizer
    )
    optimizer.step()
    for p, old, gradient in zip(parameters, before, task, strict=True):
        torch.testing.assert_close(old - p, gradient + 0.3 * old.sign(), rtol=1e-4, atol=1e-5)


# Several processes


def compare_with_one_process(rank: int) -> None:
    """Each process has a loss of its own; DDP averages their gradients."""
    model = get_peft_model(tiny_model(), JolaConfig(penalty_schedule="constant", penalty_weight=0.4)).double().eval()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    ids = torch.arange(40).view(2, 20)
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = [model(input_ids=ids[row : row + 1]).logits.square().mean() for row in range(2)]
    penalty = adapter_penalty(model)
    expected = torch.autograd.grad(sum(losses) / 2 + penalty, parameters)
    wrapped(input_ids=ids[rank : rank + 1]).logits.square().mean().backward()
    PenaltyCallback().on_pre_optimizer_step(None, TrainerState(max_steps=3), TrainerControl(), model=model)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_each_process_adds_the_same_penalty_gradient():
    run_in_world(compare_with_one_process, 2)


def compare_shards_with_the_whole(rank: int) -> None:
    for config in CONFIGS.values():
        model = get_peft_model(tiny_model(), config()).double()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(adapter_penalty(model, 1, 3), list(parameters.values()), allow_unused=True)
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
        PenaltyCallback().on_pre_optimizer_step(
            None, TrainerState(global_step=1, max_steps=3), TrainerControl(), model=model
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            found = model.get_parameter(name).grad
            assert (found is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(found.full_tensor(), gradient, rtol=1e-10, atol=1e-12)


def test_shards_of_fsdp2_get_the_gradient_of_the_whole():
    run_in_world(compare_shards_with_the_whole, 2)


@pytest.mark.parametrize("distributed_type", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_partitioned_gradients_stop_training_before_it_begins(distributed_type, monkeypatch):
    state = SimpleNamespace(distributed_type=distributed_type, fsdp_plugin=SimpleNamespace(fsdp_version=1))
    monkeypatch.setattr("trl_steer.trainers.callbacks.AcceleratorState", lambda: state)
    model = get_peft_model(tiny_model(), CONFIGS["jola"]())
    with pytest.raises(ValueError, match="DeepSpeed or FSDP version 1"):
        PenaltyCallback().on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    PenaltyCallback().on_train_begin(None, TrainerState(), TrainerControl(), model=tiny_model())
    state.fsdp_plugin.fsdp_version, state.distributed_type = 2, DistributedType.FSDP
    PenaltyCallback().on_train_begin(None, TrainerState(), TrainerControl(), model=model)
