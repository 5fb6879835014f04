"""Joint adaptation as a script: `trl-steer joint`, or under a launcher

    accelerate launch -m trl_steer.integrations.trl.joint --config recipe.yaml

The arguments are those of `trl-steer sft`, with TRL's own `--lora_*` arguments for the LoRA half, `--steering*` for
the steering half, and those of [`JointOrthSFTConfig`].
"""

import sys
from collections.abc import Sequence
from typing import Any

from trl import SFTConfig, TrlParser, get_peft_config
from trl.scripts import sft as trl_sft

from trl_steer.integrations.trl import launching
from trl_steer.integrations.trl.sft import (
    DEFAULTS,
    SteeringArguments,
    TrainerSetupError,
    peft_config,
    run,
    steering_of,
)
from trl_steer.integrations.trl.task_arguments import TaskError, with_task
from trl_steer.trainers import JointOrthSFTConfig, JointOrthSFTTrainer
from trl_steer.trainers.callbacks import TrainingDivergedError
from trl_steer.tuners.joint_steering import JointSteeringConfig

MODULE = "trl_steer.integrations.trl.joint"

# LoRA's rate is that of the demo, measured on SmolLM2-135M; the steering half has the one it has alone.
LORA_LEARNING_RATE = 1e-3


def make_parser(prog: str | None = None) -> TrlParser:
    """TRL's parser of `sft` with `--task`, our training arguments in the place of TRL's, and a group for steering."""
    theirs = trl_sft.make_parser(prog=prog)
    types: list[Any] = [JointOrthSFTConfig if kind is SFTConfig else kind for kind in theirs.dataclass_types]
    return TrlParser([*with_task(types), SteeringArguments], prog=prog)


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple:
    """TRL's own argument objects, in TRL's order, and then [`SteeringArguments`]. Options of the launcher are ignored.

    Raises:
        ValueError: if one of the halves is not to be, or an argument or a key of the config file is unknown or has a
            value that it cannot have.
    """
    return _parse(sys.argv[1:] if argv is None else argv, prog)[0]


def _parse(argv: Sequence[str], prog: str | None) -> tuple[tuple, list[str]]:
    steering = steering_of(make_parser(prog), argv)
    if steering == "none":
        raise ValueError("joint adaptation has a steering half; with --steering none, run `trl-steer sft --use_peft`.")
    parser = make_parser(prog)
    parser.set_defaults(
        use_peft=True,
        learning_rate=LORA_LEARNING_RATE,
        steering_learning_rate=DEFAULTS[steering]["learning_rate"],
    )
    parsed, launch_options = launching.parse(parser, argv)
    if not parsed[2].use_peft:
        raise ValueError("joint adaptation has a LoRA half; without it (--use_peft false), run `trl-steer sft`.")
    return parsed, launch_options


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs the command and returns its exit status; wrong arguments and divergence are said in one line."""
    name = prog or MODULE
    argv = sys.argv[1:] if argv is None else argv
    try:
        (*trl_arguments, arguments), launch_options = _parse(argv, prog)
        lora: Any = get_peft_config(trl_arguments[2])
        adapter = JointSteeringConfig.from_parts(lora, peft_config(arguments))
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    status = launching.launched(MODULE, launch_options, argv)
    if status is not None:
        return status
    try:
        run(trl_arguments, adapter, trainer_class=JointOrthSFTTrainer)
    except (TrainingDivergedError, FloatingPointError, TrainerSetupError, TaskError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
