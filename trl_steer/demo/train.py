"""Trains the demo's adapter with TRL, from the newest finished checkpoint where there is one."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_steer.demo.settings import Settings
from trl_steer.demo.task import TRAIN
from trl_steer.files import new_folder, read_json, read_jsonl, write_json
from trl_steer.trainers.callbacks import DivergenceCallback

PROGRESS = "progress.json"
STATISTICS = "training.json"


def peft_config(settings: Settings) -> PeftConfig:
    if settings.method == "lora":
        return LoraConfig(r=settings.r, target_modules="all-linear", task_type="CAUSAL_LM")
    from trl_steer import JointSteeringConfig, PostBlockSteeringConfig

    if settings.method.startswith("joint"):
        steering = {"r": settings.r, "init_scale": settings.recipe.init_scale}
        return JointSteeringConfig(r=settings.r, steering=steering, task_type="CAUSAL_LM")
    return PostBlockSteeringConfig(
        task_type="CAUSAL_LM",
        steering_type="vector" if settings.method == "vector" else "low_rank",
        r=settings.r,
        init_scale=settings.recipe.init_scale,
    )


def train(settings: Settings, model: str, task_folder: Path, checkpoints: Path, adapter: Path) -> None:
    """Trains and saves the folder `adapter`, with the statistics of training beside the weights.

    Args:
        model (`str`): Checkpoint folder or Hub id of the base model.
        task_folder (`Path`): Holds `train.jsonl`.
        checkpoints (`Path`): Where training resumes from; removed once the adapter is saved.
        adapter (`Path`): Exists only when training has ended.
    """
    torch.manual_seed(settings.seed)
    progress = _Progress()
    trainer_class, config = _trainer(settings, checkpoints)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(read_jsonl(task_folder / TRAIN)),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft_config(settings),
        callbacks=[progress, DivergenceCallback()],
    )
    trainer.train(resume_from_checkpoint=newest_finished_checkpoint(checkpoints))
    with new_folder(adapter) as partial:
        trainer.save_model(str(partial))
        write_json(partial / STATISTICS, _statistics(trainer, progress))
    shutil.rmtree(checkpoints, ignore_errors=True)


def newest_finished_checkpoint(checkpoints: Path) -> str | None:
    """The checkpoint to resume from. One that a killed run left half-written lacks the file written last."""
    finished = [path.parent for path in checkpoints.glob(f"checkpoint-*/{PROGRESS}")]
    return str(max(finished, key=lambda path: int(path.name.split("-")[1]))) if finished else None


def _trainer(settings: Settings, checkpoints: Path) -> tuple[type[SFTTrainer], SFTConfig]:
    arguments = _training_arguments(settings, checkpoints)
    if not settings.method.startswith("joint"):
        return SFTTrainer, SFTConfig(**arguments)
    from trl_steer import JointOrthSFTConfig, JointOrthSFTTrainer

    return JointOrthSFTTrainer, JointOrthSFTConfig(
        **arguments,
        orthogonal=settings.method == "joint_orth",
        steering_learning_rate=settings.recipe.steering_learning_rate,
    )


def _training_arguments(settings: Settings, checkpoints: Path) -> dict[str, Any]:
    return {
        "output_dir": str(checkpoints),
        "seed": settings.seed,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": settings.recipe.epochs,
        "learning_rate": settings.recipe.learning_rate,
        "lr_scheduler_type": settings.recipe.scheduler,
        "warmup_steps": settings.recipe.warmup,
        # What TRL does to save memory costs time, and this model is small.
        "gradient_checkpointing": False,
        "bf16": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "max_length": None,
        "logging_steps": 5,
        "save_steps": 15,
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
    }


def _statistics(trainer: SFTTrainer, progress: "_Progress") -> dict:
    parameters = list(trainer.model_wrapped.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    base = sum(parameter.numel() for parameter in parameters) - trainable
    tokens = trainer.state.num_input_tokens_seen
    return {
        "trainable_parameters": trainable,
        "trainable_share": trainable / base,
        "steps": trainer.state.global_step,
        "seconds": progress.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / progress.seconds,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
    }


class _Progress(TrainerCallback):
    """Counts the seconds spent on training over all the runs it took, and marks each checkpoint as finished."""

    def __init__(self):
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        resumed = Path(args.output_dir, f"checkpoint-{state.global_step}", PROGRESS)
        self._before = read_json(resumed)["seconds"] if state.global_step else 0.0
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = self._before + time.perf_counter() - self._start

    def on_save(self, args, state, control, **kwargs):
        # Called after everything else in the checkpoint has been written.
        write_json(Path(args.output_dir, f"checkpoint-{state.global_step}", PROGRESS), {"seconds": self.seconds})
