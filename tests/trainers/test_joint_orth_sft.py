"""Joint adaptation: the constraint holds in memory, in every checkpoint and in what is saved."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_chat import tiny_model, tiny_tokenizer
from trl_cases import dataset_for

from trl_steer import JointOrthSFTConfig, JointOrthSFTTrainer, JointSteeringConfig, PostBlockSteeringConfig
from trl_steer.tuners.joint_steering import find_pairs

BOUND = 1e-5


def overlap(model, name="default", side="output"):
    """The largest `max |Q^T W| / ||W||` over the blocks, by a float64 SVD."""
    worst = 0.0
    for pair in find_pairs(model, name):
        B = torch.cat([matrix.double() for matrix in pair.output_matrices(name)], dim=1)
        U, S, _ = torch.linalg.svd(B, full_matrices=False)
        W = pair.steering_matrix(name, side).detach().double()
        W = W.mT if side == "input" else W.reshape(len(B), -1)
        if S[0] > 0 and W.norm() > 0:
            worst = max(worst, float((U[:, 1e-7 * S[0] < S].T @ W).abs().max() / W.norm()))
    return worst


def joint_trainer(folder, peft_config="joint", model=None, **arguments):
    if peft_config == "joint":
        peft_config = JointSteeringConfig(r=4, steering={"r": 2}, task_type="CAUSAL_LM")
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return JointOrthSFTTrainer(
        model=tiny_model() if model is None else model,
        args=JointOrthSFTConfig(**{**settings, **arguments}),
        train_dataset=dataset_for("sft"),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def trained(trainer):
    return trainer.accelerator.unwrap_model(trainer.model)


@pytest.mark.parametrize(
    ("lora_r", "steering"), [(1, {"r": 1}), (8, {"r": 8}), (16, {"r": 2}), (4, {"steering_type": "vector"})]
)
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 1},
        {"max_steps": 7},
        {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0},
        {"max_steps": 3, "weight_decay": 0.1, "steering_weight_decay": 0.1},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_constraint_holds_in_memory_and_after_saving_and_reloading(lora_r, steering, arguments, tmp_path):
    config = JointSteeringConfig(r=lora_r, steering=steering, task_type="CAUSAL_LM")
    trainer = joint_trainer(tmp_path, config, **arguments)
    trainer.train()
    assert overlap(trained(trainer)) <= BOUND
    trainer.save_model(str(tmp_path / "saved"))
    assert overlap(PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")) <= BOUND


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


def test_without_the_constraint_the_halves_overlap(tmp_path):
    trainer = joint_trainer(tmp_path, max_steps=4, orthogonal=False)
    trainer.train()
    assert overlap(trained(trainer)) > 1e-2


def test_the_input_side_constrains_w_down_instead(tmp_path):
    trainer = joint_trainer(tmp_path, max_steps=4, orthogonal_side="input")
    trainer.train()
    assert overlap(trained(trainer), side="input") <= BOUND
    assert overlap(trained(trainer), side="output") > 1e-2


def test_both_halves_learn_and_the_base_model_does_not(tmp_path):
    model = tiny_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = joint_trainer(tmp_path, model=model, max_steps=3)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {".lora_A.", ".lora_B.", ".lora_steering_adapter."} == {
        part for part in (".lora_A.", ".lora_B.", ".lora_steering_adapter.") if any(part in name for name in start)
    }
    for name, parameter in trainer.model.named_parameters():
        if name in start:
            assert not torch.equal(parameter, start[name]), name
    after = {name.replace(".base_layer", ""): tensor for name, tensor in trained(trainer).state_dict().items()}
    for name, tensor in base.items():
        assert torch.equal(after[f"base_model.model.{name}"], tensor), name


def test_the_halves_have_learning_rates_and_decay_of_their_own(tmp_path):
    trainer = joint_trainer(
        tmp_path, lora_learning_rate=1e-3, steering_learning_rate=2e-3, weight_decay=0.1, steering_weight_decay=0.2
    )
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            steering = ".post_block_steering." in names[id(parameter)]
            assert (group["lr"], group["weight_decay"]) == ((2e-3, 0.2) if steering else (1e-3, 0.1))
            seen.add(id(parameter))
    assert seen == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_logs_say_what_the_projection_did(tmp_path):
    trainer = joint_trainer(tmp_path, max_steps=3)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert {"steering_overlap", "steering_norm_kept", "lora_norm", "steering_norm"} <= row.keys()
        assert 0 <= row["steering_overlap"] <= 1
        assert 0 <= row["steering_norm_kept"] <= 1
    assert any(row["steering_overlap"] > 1e-3 for row in rows)


def test_resuming_equals_the_uninterrupted_run(tmp_path):
    whole = joint_trainer(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = joint_trainer(tmp_path / "resumed", max_steps=4, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = trained(whole).state_dict(), trained(resumed).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")])
def test_a_missing_half_has_its_defaults(peft_config, tmp_path):
    trainer = joint_trainer(tmp_path, peft_config)
    config = trained(trainer).peft_config["default"]
    assert config.steering == JointSteeringConfig().steering
    assert config.r == (8 if peft_config is None else 2)


@pytest.mark.parametrize(
    ("peft_config", "arguments", "error", "message"),
    [
        (PostBlockSteeringConfig(), {}, TypeError, "from_parts"),
        (JointSteeringConfig(target_modules=["q_proj"]), {}, ValueError, "constraint would be empty"),
        (JointSteeringConfig(r=30, steering={"r": 4}), {}, ValueError, "exceed the hidden size"),
        ("joint", {"orthogonal_modules": ["nothing"]}, ValueError, "nothing"),
        (
            JointSteeringConfig(steering={"steering_type": "vector"}),
            {"orthogonal_side": "input"},
            ValueError,
            "W_down",
        ),
        ("joint", {"orthogonal_side": "left"}, ValueError, "'left'"),
        ("joint", {"orthogonal_every": 0}, ValueError, "at least 1"),
    ],
)
def test_what_cannot_be_constrained_is_refused_before_training(peft_config, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        joint_trainer(tmp_path, peft_config, **arguments)


def test_the_command_trains_both_halves_from_a_recipe(tmp_path):
    from trl_steer.integrations.trl import joint

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps(row) for row in dataset_for("sft")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset_name: {tmp_path / 'data'}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "lora_r: 4\nsteering_r: 2\n"
    )
    assert joint.main(["--config", str(recipe)]) == 0
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    assert type(loaded.peft_config["default"]) is JointSteeringConfig
    assert loaded.peft_config["default"].r == 4
    assert overlap(loaded) <= BOUND
