"""Trainers that compare with a reference copy a trained adapter to one called "ref", by the substring `.default.`."""

import pytest
import torch
from peft import PeftConfig, PeftModel
from tiny_chat import tiny_model, tiny_tokenizer
from trl_cases import STEERING, logged, make_trainer, trained_peft_model

from trl_steer import PostBlockSteeringConfig

# fp32, because the policy and its reference then agree to the last bit
ARGUMENTS = {
    "dpo": {"bf16": False},
    "kto": {"bf16": False},
    "grpo": {"bf16": False, "beta": 0.1},
    "rloo": {"bf16": False, "beta": 0.1},
}
DISTANCE = {"dpo": "rewards/margins", "kto": "rewards/chosen", "grpo": "kl", "rloo": "kl"}


def adapter_weights(model, adapter_name: str) -> dict[str, torch.Tensor]:
    return {
        name.replace(f".{adapter_name}.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f"steering_adapter.{adapter_name}." in name
    }


@pytest.mark.parametrize("steering_type", STEERING)
@pytest.mark.parametrize("trainer_name", ARGUMENTS)
def test_reference_starts_as_a_copy_and_stays_while_the_policy_moves(trainer_name, steering_type, tmp_path):
    model = trained_peft_model(steering_type)
    start = adapter_weights(model, "default")
    trainer = make_trainer(trainer_name, tmp_path, model=model, **ARGUMENTS[trainer_name])
    assert len(start) == (4 if steering_type == "low_rank" else 2)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    torch.testing.assert_close(adapter_weights(trainer.model, "ref"), start, rtol=0, atol=0)

    trainer.train()

    torch.testing.assert_close(adapter_weights(trainer.model, "ref"), start, rtol=0, atol=0)
    policy = adapter_weights(trainer.model, "default")
    assert all(not torch.equal(policy[name], start[name]) for name in start)
    first, second = logged(trainer, DISTANCE[trainer_name])
    assert first == 0.0
    assert abs(second) > 1e-6


@pytest.mark.parametrize("trainer_name", ARGUMENTS)
def test_fresh_adapter_is_compared_with_the_base_model(trainer_name, tmp_path):
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=4)
    trainer = make_trainer(trainer_name, tmp_path, peft_config=config, **ARGUMENTS[trainer_name])
    assert set(trainer.model.peft_config) == {"default"}
    trainer.train()
    first, second = logged(trainer, DISTANCE[trainer_name])
    assert first == 0.0
    assert abs(second) > 1e-6


def test_dpo_with_precomputed_reference_uses_the_trained_adapter(tmp_path):
    model = trained_peft_model("low_rank")
    trainer = make_trainer("dpo", tmp_path, model=model, bf16=False, precompute_ref_log_probs=True)
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert abs(margins[1]) > 1e-4


def test_scaling_set_before_training_holds_for_the_reference_too(tmp_path):
    model = trained_peft_model("low_rank")
    model.set_scaling("default", 0.5)
    trainer = make_trainer("dpo", tmp_path, model=model, bf16=False)
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0.0


def test_scaling_of_the_policy_can_be_changed_without_the_reference(tmp_path):
    trainer = make_trainer("dpo", tmp_path, model=trained_peft_model("low_rank"), bf16=False)
    trainer.model.set_scaling("default", 0.25)
    trainer.save_model(str(tmp_path / "adapter"))
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).scaling == 0.25
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter" / "ref")).scaling == 1.0


def test_saving_after_dpo_writes_policy_and_reference_that_both_load(tmp_path):
    trainer = make_trainer("dpo", tmp_path, model=trained_peft_model("low_rank"), bf16=False)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))

    ids = torch.tensor([tiny_tokenizer()("2 + 2?").input_ids])
    policy = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    reference = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter" / "ref"))
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, model(ids).logits)
        model.set_adapter("ref")
        assert torch.equal(reference(ids).logits, model(ids).logits)
        assert not torch.equal(reference(ids).logits, policy(ids).logits)


def test_reference_copies_saved_modules(tmp_path):
    model = trained_peft_model("low_rank", modules_to_save=["lm_head"])
    trainer = make_trainer("dpo", tmp_path, model=model, bf16=False)
    head = trainer.model.get_submodule("base_model.model.lm_head").modules_to_save
    assert torch.equal(head["ref"].weight, head["default"].weight)
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0.0
    assert not torch.equal(head["ref"].weight, head["default"].weight)
