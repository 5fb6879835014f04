"""Stock TRL trainers train adapters that edit some tokens of the prompt, and say so where they cannot."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl_cases import assert_only_adapter_changed, make_trainer, snapshot

from trl_steer import LoReftConfig, SublayerSteeringConfig
from trl_steer.tuners.steering.prompts import current_prompt

CONFIGS = {
    "loreft": lambda: LoReftConfig(task_type="CAUSAL_LM", r=4, positions="last_prompt"),
    "loreft-separate": lambda: LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f3+l3", share_weights=False),
    "post_mlp": lambda: SublayerSteeringConfig(task_type="CAUSAL_LM", r=4, init_weights=False, positions="f2+l2"),
}


def prompts_and_completions() -> Dataset:
    rows = [{"prompt": f"{i} plus {i} is " * (1 + i % 3), "completion": str(2 * i)} for i in range(16)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("kind", CONFIGS)
def test_sft_on_prompts_and_completions_edits_the_prompt(kind, tmp_path):
    trainer = make_trainer("sft", tmp_path, peft_config=CONFIGS[kind](), train_dataset=prompts_and_completions())
    assert trainer.args.gradient_checkpointing
    seen = []
    labels = []
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("_adapter.default"))
    layer.register_forward_pre_hook(lambda module, args: seen.append(current_prompt()))
    trainer.model.register_forward_pre_hook(lambda m, a, kw: labels.append(kw["labels"]), with_kwargs=True)
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)
    first = next(prompt for prompt in seen if prompt is not None)
    assert torch.equal(first.mask.sum(-1).cpu(), (labels[0] != -100).float().argmax(-1).cpu())


@pytest.mark.parametrize("trainer_name", ["dpo", "kto", "grpo", "rloo"])
def test_other_trainers_find_the_prompt_from_labels(trainer_name, tmp_path):
    trainer = make_trainer(trainer_name, tmp_path, peft_config=CONFIGS["loreft"]())
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (None, {}, "has a completion but no prompt"),
        (prompts_and_completions, {"packing": True, "max_length": 32}, "packing=False"),
    ],
)
def test_training_without_a_known_prompt_raises(dataset, arguments, message, tmp_path):
    data = {"train_dataset": dataset()} if dataset else {}
    trainer = make_trainer("sft", tmp_path, peft_config=CONFIGS["loreft"](), **data, **arguments)
    with pytest.raises(ValueError, match=message):
        trainer.train()
