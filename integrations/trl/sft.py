"""TRL's `sft` script with a steering adapter: `trl-steer sft`, or under a launcher

    accelerate launch -m trl_steer.integrations.trl.sft --config recipe.yaml

All of TRL's arguments and its `--config` file work as in `trl sft`, options of the launcher among them;
`--steering*` arguments come on top, and `--task` names one of our benchmarks as the data set. With `--steering none`
this is TRL's script, LoRA included.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import trl
from peft import PeftConfig
from trl import TrlParser
from trl.scripts import sft as trl_sft

from trl_steer import PostBlockSteeringConfig
from trl_steer.integrations.trl import launching
from trl_steer.integrations.trl.task_arguments import TaskError, task_as_dataset, with_task
from trl_steer.trainers.callbacks import DivergenceCallback, TrainingDivergedError

MODULE = "trl_steer.integrations.trl.sft"

# What takes the place of TRL's defaults, which suit other methods, where the user gives nothing. The paper trains
# steering at a constant rate, without warm-up or decay; the rates are those of the demo, measured on SmolLM2-135M.
DEFAULTS: dict[str, dict[str, Any]] = {
    "low_rank": {"learning_rate": 2e-3, "lr_scheduler_type": "constant"},
    "vector": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    "none": {},
}


class TrainerSetupError(ValueError):
    """The trainer refuses what it was given, before training."""


@dataclass
class SteeringArguments:
    """Arguments of the steering adapter; see [`PostBlockSteeringConfig`] for what each one means.

    Where `--learning_rate` or `--lr_scheduler_type` is not given, on the command line or in the config file, the
    default depends on `steering` (`DEFAULTS`).
    """

    _argument_group_name = "post-block steering"

    steering: Literal["low_rank", "vector", "none"] = field(
        default="low_rank",
        metadata={
            "help": "Kind of post-block steering. Also sets the defaults of --learning_rate (low_rank "
            f"{DEFAULTS['low_rank']['learning_rate']:g}, vector {DEFAULTS['vector']['learning_rate']:g}) and of "
            "--lr_scheduler_type (constant). 'none' leaves everything to TRL.",
        },
    )
    steering_r: int = field(default=8, metadata={"help": "Rank of low-rank steering."})
    steering_activation: str | None = field(
        default=None, metadata={"help": "Activation inside low-rank steering, such as 'silu'; linear by default."}
    )
    steering_scaling: float = field(default=1.0, metadata={"help": "Factor on the steering update."})
    steering_dropout: float = field(default=0.0, metadata={"help": "Dropout inside low-rank steering."})
    steering_init_scale: float = field(
        default=1.0, metadata={"help": "Factor on the initial down projection of low-rank steering."}
    )
    steering_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks to steer, such as 0 1 2; all by default."}
    )


def peft_config(arguments: SteeringArguments) -> PostBlockSteeringConfig | None:
    """The adapter configuration that the arguments ask for; None for `steering="none"`."""
    if arguments.steering == "none":
        return None
    return PostBlockSteeringConfig(
        task_type="CAUSAL_LM",
        steering_type=arguments.steering,
        r=arguments.steering_r,
        activation=arguments.steering_activation,
        scaling=arguments.steering_scaling,
        dropout=arguments.steering_dropout,
        init_scale=arguments.steering_init_scale,
        layers_to_transform=arguments.steering_layers,
    )


def make_parser(prog: str | None = None) -> TrlParser:
    """TRL's parser of `sft` with `--task` and one more group of arguments."""
    theirs = trl_sft.make_parser(prog=prog)
    types: list[Any] = [*with_task(theirs.dataclass_types), SteeringArguments]
    return TrlParser(types, prog=prog)


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple:
    """TRL's own argument objects, in TRL's order, and then [`SteeringArguments`]. Options of the launcher are ignored.

    Raises:
        ValueError: if both steering and TRL's LoRA are asked for, or an argument or a key of the config file is
            unknown or has a value that it cannot have.
    """
    return _parse(sys.argv[1:] if argv is None else argv, prog)[0]


def _parse(argv: Sequence[str], prog: str | None) -> tuple[tuple, list[str]]:
    parser = make_parser(prog)
    parser.set_defaults(**DEFAULTS[steering_of(make_parser(prog), argv)])
    parsed, launch_options = launching.parse(parser, argv)
    if parsed[-1].steering != "none" and parsed[2].use_peft:
        raise ValueError(
            f"both --steering {parsed[-1].steering} and --use_peft (TRL's LoRA) were given, but one run trains one "
            "adapter. Leave out --use_peft, or pass --steering none for LoRA alone."
        )
    return parsed, launch_options


def steering_of(parser: TrlParser, argv: Sequence[str]) -> str:
    """Which steering the arguments ask for. Found out first, since the defaults of other arguments depend on it.

    What the command line or the config file says about these then goes before our defaults, as it goes before TRL's.
    """
    steering = launching.parse(parser, argv)[0][-1].steering
    if steering not in DEFAULTS:  # argparse does not check what comes from a config file
        raise ValueError(f"steering: {steering!r} is unknown; use one of {', '.join(DEFAULTS)}.")
    return steering


def run(trl_arguments: Sequence[Any], adapter: PeftConfig | None, trainer_class: type | None = None) -> None:
    """Runs TRL's script, by default with TRL's trainer; the adapter is saved to `--output_dir`, as TRL does.

    Raises:
        TrainerSetupError: if the trainer refuses what it is given.
        TaskError: if `--task` cannot be trained on.
        TrainingDivergedError: if training diverges.
    """
    sft_trainer = trl.SFTTrainer

    def make_trainer(**kwargs):
        kwargs["peft_config"] = adapter or kwargs["peft_config"]
        try:
            return (trainer_class or sft_trainer)(**kwargs, callbacks=[DivergenceCallback()])
        except ValueError as error:
            raise TrainerSetupError(str(error)) from error

    # The script has no argument for an adapter or for callbacks, and looks `SFTTrainer` up in `trl` when it runs.
    trl.SFTTrainer = make_trainer  # type: ignore[misc, assignment]
    try:
        with task_as_dataset(trl_arguments) as arguments:
            trl_sft.main(*arguments)
    finally:
        trl.SFTTrainer = sft_trainer  # type: ignore[misc]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs the command and returns its exit status; wrong arguments and divergence are said in one line."""
    name = prog or MODULE
    argv = sys.argv[1:] if argv is None else argv
    try:
        (*trl_arguments, arguments), launch_options = _parse(argv, prog)
        steering = peft_config(arguments)
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    status = launching.launched(MODULE, launch_options, argv)
    if status is not None:
        return status
    try:
        run(trl_arguments, steering)
    except (TrainingDivergedError, TrainerSetupError, TaskError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
