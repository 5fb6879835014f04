"""Every stock TRL trainer takes a configuration of ours as `peft_config`, with TRL's own default settings."""

import pytest
import torch
from peft import PeftModel
from tiny_chat import tiny_model
from trl_cases import STEERING, assert_only_adapter_changed, dataset_for, logged, make_trainer, snapshot
from tuner_cases import ROWS

from trl_steer import PostBlockSteeringConfig

# Trainers ask PEFT for what is the same in all rows of a tuner, so one of each is enough, and a vector.
FIRST_OF_EACH_TUNER = {row.config_cls: name for name, row in reversed(ROWS.items())}
ROWS_TO_TRAIN = sorted({"vector", *FIRST_OF_EACH_TUNER.values()})


@pytest.mark.parametrize("row", ROWS_TO_TRAIN)
@pytest.mark.parametrize("trainer_name", ["sft", "dpo", "grpo", "kto", "reward", "rloo"])
def test_two_steps_change_every_adapter_parameter_and_no_base_parameter(trainer_name, row, tmp_path):
    task_type = "SEQ_CLS" if trainer_name == "reward" else "CAUSAL_LM"
    config = ROWS[row].config(fresh=True, task_type=task_type)
    trainer = make_trainer(trainer_name, tmp_path, peft_config=config)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.args.gradient_checkpointing
    before = snapshot(trainer.model)

    trainer.train()

    assert trainer.state.global_step == 2
    assert_only_adapter_changed(trainer.model, before)
    base = tiny_model("reward" if trainer_name == "reward" else "llama").state_dict()
    # PEFT's sequence classification always trains the head, in a copy beside the original; LoRA wraps linear layers
    after = {
        key.replace(".original_module.", ".").replace(".base_layer.", "."): tensor
        for key, tensor in trainer.model.state_dict().items()
    }
    for name, tensor in base.items():
        assert torch.equal(after[f"base_model.model.{name}"], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_modes_train_alike(use_reentrant, family, tmp_path):
    def train(**arguments):
        torch.manual_seed(0)
        config = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=4)
        trainer = make_trainer("sft", tmp_path, tiny_model(family), config, bf16=False, **arguments)
        trainer.train()
        return snapshot(trainer.model), logged(trainer, "loss")

    expected, expected_losses = train(activation_checkpointing=False)
    actual, losses = train(
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_reward_model_trains_and_restores_its_score_head(tmp_path):
    config = PostBlockSteeringConfig(task_type="SEQ_CLS", r=4, modules_to_save=["score"])
    trainer = make_trainer("reward", tmp_path, peft_config=config, bf16=False)
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)
    assert any(
        "score.modules_to_save.default" in name for name, p in trainer.model.named_parameters() if p.requires_grad
    )

    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(tiny_model("reward"), str(tmp_path / "adapter"))
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(reloaded(input_ids=ids).logits, expected)
        assert not torch.equal(tiny_model("reward")(input_ids=ids).logits, expected)


@pytest.mark.parametrize("steering_type", STEERING)
def test_evaluation_during_training_uses_the_steered_model(steering_type, tmp_path):
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type])
    trainer = make_trainer("sft", tmp_path, peft_config=config, max_steps=8)
    trainer.eval_dataset = trainer.train_dataset
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.01
    with trainer.model.disable_adapter():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(before, abs=1e-4)


def test_training_a_model_that_is_steered_already_goes_on_from_its_adapter(tmp_path):
    first = make_trainer("sft", tmp_path, peft_config=PostBlockSteeringConfig(task_type="CAUSAL_LM", r=4))
    first.train()
    second = make_trainer("sft", tmp_path, model=first.model, train_dataset=dataset_for("sft", 24))
    before = snapshot(second.model)
    second.train()
    assert_only_adapter_changed(second.model, before)
