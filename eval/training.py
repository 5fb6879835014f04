"""Trains the adapter of a run with TRL."""

import resource
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_steer import DivergenceCallback, JointOrthSFTConfig, JointOrthSFTTrainer, PenaltyCallback, presets
from trl_steer.files import read_json, write_json
from trl_steer.tasks import load_task

from .console import Report
from .runs import MARK, Settings


def peft_config(settings: Settings) -> PeftConfig | None:
    """The configuration of the adapter, `None` for full fine-tuning.

    Raises:
        ValueError: The method does not have one of the fields in `steering` or `lora`.
    """
    _check_fields(settings)
    if settings.method == "full":
        return None
    common: dict[str, Any] = {"r": settings.r, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(**{**common, "target_modules": "all-linear", **settings.lora})
    if settings.method in presets.JOINT:
        lora = LoraConfig(**{**common, **settings.lora})  # without modules, all linear layers of the blocks
    return presets.peft_config(settings.method, lora, **{**common, **settings.steering})


def _check_fields(settings: Settings) -> None:
    has_lora, steers = settings.method in ("lora", *presets.JOINT), settings.method not in ("lora", "full")
    of_steering = {part.name for part in fields(presets.steering_class(settings.method))} if steers else set()
    of_lora = {part.name for part in fields(LoraConfig)} if has_lora else set()
    for name, given, known in (("steering", settings.steering, of_steering), ("lora", settings.lora, of_lora)):
        wrong = next((key for key in given if key not in known), None)
        if wrong is not None:
            raise ValueError(f"{name} of the method {settings.method} has no {wrong!r}.")


def train(settings: Settings, model: str, checkpoints: Path, newest: Path | None, report: Report) -> None:
    """Trains an adapter or all parameters, and saves a checkpoint of the last step.

    Args:
        settings (`Settings`): Settings of the run.
        model (`str`): Checkpoint folder or Hub id of the base model.
        checkpoints (`Path`): Folder for checkpoints.
        newest (`Path`, *optional*): The checkpoint to resume from.
        report (`Report`): Receives the progress.

    Raises:
        TrainingDivergedError: Training diverged.
    """
    torch.manual_seed(settings.seed)
    trainer_class, config = _trainer(settings, checkpoints)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, settings.dtype)),
        args=config,
        train_dataset=load_task(settings.benchmark, **settings.source)["train"],
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft_config(settings),
        callbacks=[_Record(report), DivergenceCallback(), PenaltyCallback()],
    )
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def _trainer(settings: Settings, checkpoints: Path) -> tuple[type[SFTTrainer], SFTConfig]:
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "seed": settings.seed,
        # TRL's default saves memory, but takes more time.
        "activation_checkpointing": settings.training.get("gradient_checkpointing", False),
        "bf16": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "logging_steps": 5,
        "save_steps": 15,
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "disable_tqdm": True,
        # A checkpoint of all parameters takes long to write, so that there is one at the end only.
        **({"save_steps": 2**31, "save_only_model": True} if settings.method == "full" else {}),
        **settings.training,
    }
    if settings.method in presets.JOINT:
        return JointOrthSFTTrainer, JointOrthSFTConfig(**arguments, orthogonal=settings.method == "joint_orth")
    return SFTTrainer, SFTConfig(**arguments)


class _Record(TrainerCallback):
    """Reports the progress of training, and writes the statistics so far to each checkpoint, after its other files."""

    def __init__(self, report: Report):
        self.report = report

    def on_train_begin(self, args, state, control, **kwargs):
        resumed = Path(args.output_dir, f"checkpoint-{state.global_step}", MARK)
        before = read_json(resumed) if state.global_step else {"seconds": 0.0, "peak_memory_bytes": 0}
        self.memory = before["peak_memory_bytes"]
        self.start = time.perf_counter() - before["seconds"]
        if state.global_step:
            self.report.note(f"Resuming from step {state.global_step}.")

    def on_step_end(self, args, state, control, **kwargs):
        losses = _losses(state)
        note = f"loss {losses[-1]:.3f}" if losses else ""
        self.report.progress(state.global_step, state.max_steps, note)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.report.loss(state.global_step, float(logs["loss"]))

    def on_save(self, args, state, control, model=None, **kwargs):
        seconds = time.perf_counter() - self.start
        self.memory = max(self.memory, _peak_memory())
        parameters = list(model.parameters())
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        record = {
            "trainable_parameters": trainable,
            "trainable_share": trainable / _base_size(parameters),
            "steps": state.global_step,
            "seconds": seconds,
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": state.num_input_tokens_seen / seconds,
            "peak_memory_bytes": self.memory,
            "losses": _losses(state),
        }
        write_json(Path(args.output_dir, f"checkpoint-{state.global_step}", MARK), record)


def _base_size(parameters: list[torch.nn.Parameter]) -> int:
    """The number of parameters of the base model: those that are not trained, unless all are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, trained in sizes if not trained) or sum(size for size, _ in sizes)


def _losses(state) -> list[float]:
    return [row["loss"] for row in state.log_history if "loss" in row]


def _peak_memory() -> int:
    """Peak memory in bytes of the GPU, if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, otherwise KiB
