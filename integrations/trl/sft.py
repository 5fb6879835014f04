"""Fine-tuning with TRL's `SFTTrainer`: steering, LoRA, both together, or all parameters.

Run it with `trl-steer sft`, or with a launcher:

    accelerate launch -m trl_steer.integrations.trl.sft --config recipe.yaml

It takes all arguments of TRL's `sft` script. `--method` selects what is trained, `--preset` the values of settings
that are not given, and `--task` one of our tasks as the dataset.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Container, Sequence
from typing import Any

from trl_steer import presets
from trl_steer.integrations.trl.arguments import Request, SteeringArguments, read
from trl_steer.integrations.trl.checks import check_paths
from trl_steer.integrations.trl.source_arguments import ArgumentError
from trl_steer.presets import JOINT, METHODS

MODULE = "trl_steer.integrations.trl.sft"


def main(argv: Sequence[str] | None = None, prog: str | None = None, method: str | None = None) -> int:
    """Runs the command and returns its exit status: 0 for success, 1 for an error, 2 for invalid arguments, 130 for
    Ctrl-C. Errors are printed as one line, or with a traceback if `--debug` is given.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments. Default: `sys.argv[1:]`.
        prog (`str`, *optional*): Name of the command.
        method (`str`, *optional*): Default of `--method`.
    """
    name, argv = prog or MODULE, sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        from trl_steer.integrations.trl.help import help_text

        print(help_text(name, method))
        return 0
    try:
        request = read(argv, **({"method": method} if method else {}))
        if request.ours.dry_run:
            from trl_steer.integrations.trl.help import dry_run

            print(dry_run(request), end="")
            return 0
        check_paths(request.given)
    except ArgumentError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    try:
        status = _run(request, argv)
    except KeyboardInterrupt:
        folder = request.given.get("output_dir")
        print(
            f"\n{name}: stopped. To continue from the last checkpoint in {folder}, run the same command with "
            "--resume_from_checkpoint true.",
            file=sys.stderr,
        )
        status = 130
    except Exception as error:
        if request.shows_traceback:
            raise
        print(f"{name}: error: {_in_one_line(error)}", file=sys.stderr)
        status = 2 if isinstance(error, ArgumentError) else 1
    _leave_process_group()
    return status


def joint(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """`trl-steer joint`: short for `trl-steer sft --method joint_orth`."""
    return main(argv, prog, "joint_orth")


def _leave_process_group() -> None:
    """Leaves the group of the processes of distributed training, when the trainer no longer exists.

    `Trainer.end` would leave it earlier, and the process could hang: whoever drops the last reference to the group
    waits for gloo's threads, and these for the interpreter's lock, which DDP's reducer does not release.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def _run(request: Request, argv: Sequence[str]) -> int:
    from trl_steer.integrations.trl import launching

    parsed, launch_options = parse(request, argv)
    method = [] if "method" in request.given and "--method" in argv else ["--method", request.ours.method]
    status = launching.launch(MODULE, launch_options, [*argv, *method])
    if status is None:
        train(request, *parsed[:-1])
        status = 0
    return status


def parse(request: Request, argv: Sequence[str]) -> tuple[tuple, list[str]]:
    """TRL's argument objects, in TRL's order, followed by [`SteeringArguments`]; and the options of the launcher.

    Raises:
        ArgumentError: A value is invalid.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    from trl_steer.integrations.trl import launching

    config_class: type[SFTConfig] = SFTConfig
    if request.ours.method in JOINT:
        from trl_steer.trainers import JointOrthSFTConfig

        config_class = JointOrthSFTConfig
    types: list[Any] = [ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig, SteeringArguments]

    class Parser(TrlParser):
        def error(self, message: str):
            raise ArgumentError(message)  # argparse would print hundreds of lines of usage

    parser = Parser(types)
    parser.set_defaults(**{**request.settings().values, **_device(request)})
    if request.ours.task and "dataset_test_split" not in request.given:
        parser.set_defaults(dataset_test_split="validation")
    if request.shows_traceback:
        argv = [word for word in argv if word != "--debug"]
    try:
        return launching.parse(parser, argv)
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from error


def _device(request: Request) -> dict[str, Any]:
    """Arguments for the device and the precision, if neither was given: bf16 if it is supported, else float32."""
    import torch

    if request.given.keys() & {"bf16", "fp16", "use_cpu", "accelerate_config", "config_file", "mixed_precision"}:
        return {}
    if not torch.accelerator.is_available():
        print("Training on the CPU in float32.", flush=True)
        checkpointing = {} if "gradient_checkpointing" in request.given else {"activation_checkpointing": False}
        return {"use_cpu": True, "bf16": False, **checkpointing}
    device = torch.accelerator.current_accelerator()
    wanted = request.settings().values.get("bf16", True)
    bf16 = bool(wanted) and device is not None and (device.type != "cuda" or torch.cuda.is_bf16_supported())
    print(f"Training on {device} in {'bf16' if bf16 else 'float32'}.", flush=True)
    return {"bf16": bf16}


def train(request: Request, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> Any:
    """Trains and saves to `--output_dir`, as TRL's script does. Returns the trainer.

    Raises:
        ArgumentError: The dataset cannot be loaded.
        ValueError: The adapter does not match the model, or the distributed setup is not supported.
        TrainingDivergedError: Training diverged.
    """
    from trl import SFTTrainer, get_quantization_config

    from trl_steer.checkpoints import is_finished, newest_complete_checkpoint
    from trl_steer.integrations.trl.data import load_dataset
    from trl_steer.trainers import DivergenceCallback, JointOrthSFTTrainer, PenaltyCallback

    init = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**init, **(training_args.model_init_kwargs or {})}
    if request.ours.method in JOINT:
        training_args.orthogonal = request.ours.method == "joint_orth"
    dataset = load_dataset(request.ours, script_args, training_args, dataset_args, model_args.model_name_or_path)
    adapter = peft_config(request, model_args)
    checkpoint = training_args.resume_from_checkpoint
    if str(checkpoint).lower() in ("false", "0", "no"):
        checkpoint = None
    elif str(checkpoint).lower() in ("true", "1", "yes"):
        newest = newest_complete_checkpoint(training_args.output_dir)
        checkpoint = newest and str(newest)
    finished = checkpoint is not None and is_finished(checkpoint, training_args)
    trainer_class = JointOrthSFTTrainer if request.ours.method in JOINT else SFTTrainer
    trainer = trainer_class(
        model=str(checkpoint) if finished and adapter is None else model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=adapter,
        callbacks=[DivergenceCallback(), PenaltyCallback()],
    )
    trainable, total = _parameters(trainer.model)
    trainer.accelerator.print(f"{METHODS[request.ours.method]}: training {trainable:,} of {total:,} parameters.")
    if not finished:
        trainer.train(resume_from_checkpoint=checkpoint)
    elif adapter is not None:
        model: Any = trainer.model
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return trainer


def peft_config(request: Request, model_args: Any) -> Any:
    """The configuration of the adapter, `None` for full fine-tuning."""
    from trl import get_peft_config

    ours = request.ours
    if ours.method == "full":
        return None
    lora: Any = None
    if ours.method in ("lora", *JOINT):
        model_args.use_peft = True
        lora = get_peft_config(model_args)
    fields = {
        "steering_type": ours.steering_type,
        "dropout": ours.steering_dropout,
        "init_scale": ours.steering_init_scale,
        "init_from": ours.init_from,
        **{name: getattr(ours, argument) for name, argument in _STRUCTURE.items()},
    }
    if ours.init_from is not None:
        fields |= _structure_of(ours.init_from, given=request.given)
    return presets.peft_config(ours.method, lora, task_type="CAUSAL_LM", **fields)


# Fields of a steering configuration that a new adapter has in common with the one that it starts from, and their
# arguments.
_STRUCTURE = {
    "site": "site",
    "positions": "positions",
    "activation": "steering_activation",
    "scaling": "steering_scaling",
    "layers_to_transform": "steering_layers",
    "r": "steering_r",
}


def _structure_of(folder: str, given: Container[str]) -> dict[str, Any]:
    """The structure of the adapter in a folder, but for what is given as an argument."""
    from trl_steer.tuners.steering import AdapterFolder

    config = AdapterFolder.open(folder).config
    names = [name for name, argument in _STRUCTURE.items() if argument not in given]
    names += ["rank_pattern", "target_modules", "exclude_modules"]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _parameters(model: Any) -> tuple[int, int]:
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) < 600 else f"{text[:600]} ... (use --debug for the full message)"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
