"""Joint adaptation: the constraint holds in memory, in every checkpoint and in what is saved."""

from typing import NamedTuple

import pytest
import torch
from joint_cases import BOUND, joint_trainer, overlap, trained
from model_zoo import tiny_model as zoo_model
from peft import PeftModel, get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import JointSteeringConfig

FP32, BF16 = torch.float32, torch.bfloat16
BOUNDS = {FP32: BOUND, BF16: 1e-2}


class Run(NamedTuple):
    """One run: settings of the trainer and the adapter. At a learning rate of 0.3, B is badly conditioned."""

    steps: int
    lora_r: int
    r: int
    accumulation: int
    clip: float
    dtype: torch.dtype
    learning_rate: float


# Every two settings meet in some run.
RUNS = [
    Run(1, 1, 8, 1, 1.0, BF16, 0.01),
    Run(1, 8, 1, 4, 1.0, FP32, 0.01),
    Run(1, 64, 8, 1, 0.0, BF16, 0.3),
    Run(2, 1, 1, 4, 0.0, BF16, 0.3),
    Run(2, 8, 8, 1, 0.0, BF16, 0.01),
    Run(2, 64, 8, 1, 1.0, FP32, 0.01),
    Run(7, 1, 8, 1, 0.0, BF16, 0.3),
    Run(7, 8, 1, 1, 0.0, BF16, 0.01),
    Run(7, 64, 8, 4, 1.0, FP32, 0.3),
    Run(50, 1, 1, 1, 1.0, FP32, 0.01),
    Run(50, 8, 8, 4, 0.0, FP32, 0.3),
    Run(50, 64, 1, 1, 0.0, BF16, 0.01),
]


def base(dtype=FP32):
    return tiny_model(hidden_size=96, intermediate_size=64).to(dtype)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(value).removeprefix("torch.") for value in run))
def test_constraint_holds_in_memory_and_in_all_that_is_saved(run, tmp_path):
    config = JointSteeringConfig(r=run.lora_r, steering={"r": run.r}, task_type="CAUSAL_LM")
    model = get_peft_model(base(run.dtype), config, autocast_adapter_dtype=False)
    trainer = joint_trainer(
        tmp_path,
        None,
        model,
        max_steps=run.steps,
        gradient_accumulation_steps=run.accumulation,
        max_grad_norm=run.clip,
        learning_rate=run.learning_rate,
        save_strategy="steps",
        save_steps=max(run.steps // 2, 1),
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {run.dtype}
    trainer.train()
    trainer.save_model()
    assert overlap(trained(trainer)) <= BOUNDS[run.dtype]
    assert steering_norm(trained(trainer)) > 0
    folders = [*tmp_path.glob("checkpoint-*"), tmp_path]
    assert len(folders) >= min(run.steps, 2) + 1
    for folder in folders:
        loaded = PeftModel.from_pretrained(base(run.dtype), folder)
        assert overlap(loaded) <= BOUNDS[run.dtype]
        assert steering_norm(loaded) > 0


def steering_norm(model) -> float:
    return sum(float(p.detach().double().norm()) for name, p in model.named_parameters() if name.endswith(".up"))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_log_says_which_bound_applies(dtype, tmp_path, caplog):
    model = get_peft_model(tiny_model().to(dtype), JointSteeringConfig(r=2), autocast_adapter_dtype=False)
    with caplog.at_level("INFO", logger="trl_steer"):
        joint_trainer(tmp_path, None, model, max_steps=1).train()
    said = [record for record in caplog.records if "orthogonal to LoRA" in record.message]
    assert [f"<= {BOUNDS[dtype]:g} " in record.message for record in said] == [True]
    assert said[0].levelname == ("INFO" if dtype == FP32 else "WARNING")


@pytest.mark.parametrize(
    ("steering", "arguments"),
    [
        ({"steering_type": "vector"}, {}),
        ({"r": 2}, {"weight_decay": 0.1, "steering_weight_decay": 0.1}),
    ],
    ids=["vector", "decay"],
)
def test_constraint_holds_for_vectors_and_with_decay(steering, arguments, tmp_path):
    config = JointSteeringConfig(r=4, steering=steering, task_type="CAUSAL_LM")
    trainer = joint_trainer(tmp_path, config, max_steps=4, **arguments)
    trainer.train()
    assert overlap(trained(trainer)) <= BOUND
    trainer.save_model()
    assert overlap(PeftModel.from_pretrained(tiny_model(), tmp_path)) <= BOUND


def test_constraint_holds_in_every_checkpoint_however_seldom_it_is_enforced(tmp_path):
    trainer = joint_trainer(
        tmp_path, max_steps=5, orthogonal_every=3, save_strategy="steps", save_steps=1, save_total_limit=None
    )
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 5
    for folder in [*folders]:
        assert overlap(PeftModel.from_pretrained(tiny_model(), folder)) <= BOUND
    assert overlap(trained(trainer)) <= BOUND


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_constraint_holds_for_what_passes_a_norm_on_its_way_to_the_stream(family, steps, tmp_path):
    fields = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 96, "intermediate_size": 64}
    fields |= {"max_position_embeddings": 512, "initializer_range": 0.02}
    # The condition number of B is over a million after one step of AdamW, and the norm is another after two.
    norms = ["post_feedforward_layernorm"] if steps > 1 else None
    config = JointSteeringConfig(r=64, steering={"r": 8}, modules_to_save=norms, task_type="CAUSAL_LM")
    trainer = joint_trainer(tmp_path, config, zoo_model(family, **fields), max_steps=steps, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    for model in (trained(trainer), PeftModel.from_pretrained(zoo_model(family, **fields), tmp_path)):
        for block in model.get_base_model().model.layers:
            gain = block.post_feedforward_layernorm.weight.detach().double() + (0 if family == "olmo2" else 1)
            B = gain[:, None] * block.mlp.down_proj.lora_B["default"].weight.detach().double()
            U, S, _ = torch.linalg.svd(B, full_matrices=False)
            W = block.post_block_steering.adapters["default"].up.detach().double()
            assert (U[:, 1e-7 * S[0] < S].T @ W).abs().max() <= BOUND * W.norm()
            assert W.norm() > 0
