"""TRL's trainers, and ours, on tiny models: data, arguments and what must hold after training."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer
from torch import nn
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from trl_steer import JointOrthSFTConfig, JointOrthSFTTrainer, PostBlockSteeringConfig

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "joint": (JointOrthSFTTrainer, JointOrthSFTConfig),
}

STEERING = {
    "low_rank": {"steering_type": "low_rank", "r": 4},
    "vector": {"steering_type": "vector"},
}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def dataset_for(trainer: str, rows: int = 16) -> Dataset:
    prompts = [user(f"{i} + {i}?") for i in range(rows)]
    right = [assistant(str(2 * i)) for i in range(rows)]
    wrong = [assistant(f"no {i}") for i in range(rows)]
    if trainer in ("sft", "joint"):
        return Dataset.from_dict({"messages": [p + c for p, c in zip(prompts, right, strict=True)]})
    if trainer in ("grpo", "rloo"):
        return Dataset.from_dict({"prompt": prompts})
    if trainer == "kto":
        labels = [i % 2 == 0 for i in range(rows)]
        completions = [r if label else w for r, w, label in zip(right, wrong, labels, strict=True)]
        return Dataset.from_dict({"prompt": prompts, "completion": completions, "label": labels})
    return Dataset.from_dict({"prompt": prompts, "chosen": right, "rejected": wrong})


def mean_byte(completions, **kwargs) -> list[float]:
    """A reward that differs between completions, whatever an untrained model writes."""
    texts = [completion[0]["content"].encode() for completion in completions]
    return [sum(text) / (128 * max(len(text), 1)) for text in texts]


def make_trainer(
    trainer: str, output_dir: Path, model=None, peft_config=None, train_dataset=None, extra=None, **arguments
):
    """A trainer with TRL's own settings, except for size, logging and a learning rate that shows in two steps."""
    trainer_cls, config_cls = TRAINERS[trainer]
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    extra = dict(extra or {})
    if trainer in ("grpo", "rloo"):
        settings |= {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
        extra["reward_funcs"] = mean_byte
    model = tiny_model("reward" if trainer == "reward" else "llama") if model is None else model
    return trainer_cls(
        model=model,
        args=config_cls(**(settings | arguments)),
        train_dataset=dataset_for(trainer) if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        **extra,
    )


TRAINABLE = ("steering_adapter.", ".lora_A.", ".lora_B.", "modules_to_save.", "trainable_tokens_delta")


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_only_adapter_changed(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Trainable parameters are those of adapters and copies of saved modules. All moved, nothing else did."""
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    trainable = {name for name, parameter in after.items() if parameter.requires_grad}
    assert any("steering_adapter." in name for name in trainable)
    for name, parameter in after.items():
        if name in trainable:
            assert any(part in name for part in TRAINABLE), name
            assert torch.isfinite(parameter).all(), name
            assert not torch.equal(parameter, before[name]), f"{name} did not train"
        else:
            assert torch.equal(parameter, before[name]), f"{name} is frozen and changed"


def trained_peft_model(steering_type: str, family: str = "llama", **fields) -> PeftModel:
    """A model with an adapter that is far from the identity."""
    model = get_peft_model(
        tiny_model(family), PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type], **fields)
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
