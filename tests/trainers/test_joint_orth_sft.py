"""Joint adaptation as a trainer: what it trains, logs, refuses and takes for granted."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from joint_cases import BOUND, joint_trainer, overlap, trained
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer
from trl import SFTConfig
from trl_cases import dataset_for, make_trainer

from trl_steer import JointOrthSFTTrainer, JointSteeringConfig, PostBlockSteeringConfig


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


@pytest.mark.parametrize("orthogonal_every", [1, 3])
def test_each_log_has_the_effect_of_the_projection(orthogonal_every, tmp_path):
    trainer = joint_trainer(tmp_path, max_steps=3, orthogonal_every=orthogonal_every)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert {"steering_overlap", "steering_norm_kept", "lora_norm", "steering_norm"} <= row.keys()
        assert 0 <= row["steering_overlap"] <= 1
        assert 0 <= row["steering_norm_kept"] <= 1
    assert all(row["steering_overlap"] > 1e-3 for row in rows[1:])


def test_a_checkpoint_leaves_no_trace_in_the_log(tmp_path):
    logged = []
    for strategy in ("no", "steps"):
        arguments = {"save_strategy": strategy, "save_steps": 2, "orthogonal_every": 3, "max_steps": 7}
        trainer = joint_trainer(tmp_path / strategy, **arguments)
        trainer.train()
        logged.append([row["steering_overlap"] for row in trainer.state.log_history if "loss" in row])
    # A step before the first checkpoint is the same; the steps after it have less to remove, but always something.
    assert logged[0][:2] == logged[1][:2]
    assert all(overlap > 1e-3 for overlap in logged[1][1:])


def test_logged_norms_are_those_of_the_halves_alone(tmp_path):
    config = JointSteeringConfig(r=4, steering={"r": 2}, modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    trainer = joint_trainer(tmp_path, config, max_steps=2)
    trainer.train()
    parameters = {name: p.detach() for name, p in trained(trainer).named_parameters() if p.requires_grad}
    lora = [p.norm() for name, p in parameters.items() if ".lora_A." in name or ".lora_B." in name]
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert row["lora_norm"] == pytest.approx(float(torch.stack(lora).norm()), rel=1e-5)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")])
def test_a_missing_half_has_its_defaults(peft_config, tmp_path):
    trainer = joint_trainer(tmp_path, peft_config)
    config = trained(trainer).peft_config["default"]
    assert config.steering == JointSteeringConfig(steering={"base_model_type": "llama"}).steering
    assert config.r == (8 if peft_config is None else 2)


@pytest.mark.parametrize(
    ("peft_config", "arguments", "error", "message"),
    [
        (PostBlockSteeringConfig(), {}, TypeError, "from_parts"),
        (JointSteeringConfig(target_modules=["q_proj"]), {}, ValueError, "nothing to be orthogonal to"),
        (JointSteeringConfig(r=30, steering={"r": 4}), {}, ValueError, "exceeds the hidden size"),
        ("joint", {"orthogonal_modules": ["nothing"]}, ValueError, "nothing"),
        (
            JointSteeringConfig(steering={"steering_type": "vector"}),
            {"orthogonal_side": "input"},
            ValueError,
            "W_down",
        ),
        ("joint", {"orthogonal_side": "left"}, ValueError, "'left'"),
        ("joint", {"orthogonal_every": 0}, ValueError, "at least 1"),
        ("joint", {"orthogonal_every": 2.5}, ValueError, "integer"),
        ("joint", {"orthogonal_every": True}, ValueError, "integer"),
        ("joint", {"lora_learning_rate": "1e-3"}, ValueError, "must be a finite number"),
        ("joint", {"orthogonal_modules": "down_proj"}, ValueError, "list of names"),
        ("joint", {"orthogonal_modules": ["down_proj", "o_prj"]}, ValueError, "o_prj"),
        ("joint", {"lora_learning_rate": float("nan")}, ValueError, "finite"),
        ("joint", {"steering_weight_decay": -1.0}, ValueError, "at least 0"),
    ],
)
def test_invalid_constraint_is_refused_before_training(peft_config, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        joint_trainer(tmp_path, peft_config, **arguments)


def two_adapters():
    model = get_peft_model(tiny_model(), JointSteeringConfig(r=2, steering={"r": 2}, task_type="CAUSAL_LM"))
    model.add_adapter("other", JointSteeringConfig(r=2, steering={"r": 2}, task_type="CAUSAL_LM"))
    return model


def test_the_adapter_to_train_must_be_one_trainable_joint_adapter(tmp_path):
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\] are active"):
        joint_trainer(tmp_path, None, model)
    two_adapters().save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(ValueError, match="is_trainable=True"):
        joint_trainer(tmp_path, None, PeftModel.from_pretrained(tiny_model(), tmp_path))
    with pytest.raises(TypeError, match="has a LoraConfig"):
        joint_trainer(tmp_path, None, get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")))


def test_another_adapter_than_the_constrained_one_is_not_trained_without_it(tmp_path):
    model = two_adapters()
    trainer = joint_trainer(tmp_path, None, model, max_steps=1)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="active adapter is 'other'"):
        trainer.train()
    model.set_adapter("default")
    trainer.train()
    assert overlap(model, "default") <= BOUND


def test_rates_that_a_ready_made_optimizer_would_ignore_are_refused(tmp_path):
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lora_learning_rate would have no effect"):
        make_trainer("joint", tmp_path, extra={"optimizers": (optimizer, None)}, bf16=False, lora_learning_rate=1e-3)


def test_training_arguments_of_another_trainer_are_refused():
    with pytest.raises(TypeError, match="JointOrthSFTConfig, got SFTConfig"):
        JointOrthSFTTrainer(tiny_model(), SFTConfig(use_cpu=True, bf16=False))


def test_diverged_joint_training_raises_and_advises_lower_rates(tmp_path):
    trainer = joint_trainer(tmp_path, max_steps=6, learning_rate=1e10)
    with pytest.raises(FloatingPointError, match="Use lower learning rates"):
        trainer.train()


def test_the_rate_of_a_chosen_optimizer_class_counts_where_a_half_has_none_of_its_own(tmp_path):
    chosen = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}
    trainer = make_trainer("joint", tmp_path, extra=chosen, bf16=False, steering_learning_rate=0.25)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {0.5, 0.25}


@pytest.fixture
def accelerator_state():
    """accelerate has one state a process, and keeps the precision of whichever trainer came first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True).state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("version", "refused"), [(1, True), (2, False)])
def test_fsdp_is_refused_in_version_1_only(version, refused, tmp_path, monkeypatch, accelerator_state):
    # accelerate does not give its state a plugin on the CPU, so it is put there, and kept by the training arguments.
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin sets
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    monkeypatch.setitem(accelerator_state.__dict__, "fsdp_plugin", plugin)
    keep = {"accelerator_config": {"use_configured_state": True}}
    with pytest.raises(ValueError, match="fsdp_version: 2") if refused else nullcontext():
        joint_trainer(tmp_path, **keep)
    joint_trainer(tmp_path, **keep, orthogonal=False)


def test_joint_command_trains_both_halves_from_a_recipe(tmp_path):
    from trl_steer.integrations.trl import sft

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
    assert sft.joint(["--config", str(recipe)]) == 0
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    assert type(loaded.peft_config["default"]) is JointSteeringConfig
    assert loaded.peft_config["default"].r == 4
    assert overlap(loaded) <= BOUND


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--use_peft", "false"], 2, "which trains LoRA"),
        (["--lora_r", "40"], 1, "exceeds the hidden size"),
        (["--orthogonal_modules", "nothing"], 1, "nothing"),
    ],
)
def test_joint_command_refuses_invalid_arguments_in_one_line(more, status, said, tmp_path, capsys):
    from trl_steer.integrations.trl import sft

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in dataset_for("sft")))
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    argv += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    assert sft.joint([*argv, *more]) == status
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
