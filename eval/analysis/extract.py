"""Steering vectors from contrast pairs: texts with and without a property, such as answers in two styles."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from trl_steer.choices import ExtractionMethod
from trl_steer.files import new_folders

from ..console import Report as Progress
from . import arguments, figures, inputs
from .report import Report, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument(
        "--pairs",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .jsonl file, each row with `positive` and `negative`: two texts, or two lists of chat messages",
    )
    parser.add_argument(
        "--method",
        choices=get_args(ExtractionMethod),
        default="mean",
        help="mean: difference of means; pca: first principal component of the differences, repeng's pca_diff; "
        "pca_center: repeng's method of this name; logistic: weights of a logistic regression (default: mean)",
    )
    parser.add_argument(
        "--position", type=int, default=-1, help="token of each text: 0 is the first, -1 the last one (default: -1)"
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=0.1,
        help="norm of each vector, as a share of the mean norm of the states in its block (default: 0.1)",
    )
    parser.add_argument("--max_length", type=arguments.positive, default=512, help="tokens of a text (default: 512)")
    parser.add_argument("--batch_size", type=arguments.positive, default=8, help="texts run together (default: 8)")
    arguments.add_blocks(parser, "all")
    arguments.add_save(parser, "adapter")


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from trl_steer.analysis import extract

    pairs = read_pairs(args.pairs)
    with new_folders(args.save) as (partial,):
        model, tokenizer = inputs.load_model(args, progress)
        positive, negative = (
            _batches([pair[side] for pair in pairs], args, tokenizer) for side in ("positive", "negative")
        )
        progress.step("Running the model")
        made = extract(
            model,
            positive,
            negative,
            method=args.method,
            position=args.position,
            strength=args.strength,
            blocks=args.blocks,
            progress=progress.progress,
        )
        progress.end("done")
        made.model.save_pretrained(str(partial))
    results = {"pairs": len(pairs), "blocks": made.report}
    return Report("Steering vectors from contrast pairs", results, _summary(args, results), _figure(made.report))


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of pairs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no pairs, or a row has another format. The message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: invalid JSON: {error}.") from error
        sides = [row.get(side) for side in ("positive", "negative")] if isinstance(row, dict) else [None]
        if not (all(_is_text(side) for side in sides) or all(_is_chat(side) for side in sides)):
            raise ValueError(
                f"{path}, line {number}: expected `positive` and `negative`, two texts or two lists of messages with "
                "`role` and `content`."
            )
        pairs.append(row)
    if not pairs:
        raise ValueError(f"{path} has no pairs. Give at least two.")
    return pairs


def _is_text(side: Any) -> bool:
    return isinstance(side, str) and bool(side)


def _is_chat(side: Any) -> bool:
    return (
        isinstance(side, list)
        and bool(side)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in side)
    )


def _batches(texts: list[Any], args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of texts, or of chats in the chat template."""
    from trl_steer.analysis import token_batches

    from .texts import chat_text

    rows = []
    for text in texts:
        is_chat = not isinstance(text, str)
        text = chat_text(text, tokenizer) if is_chat else text
        ids = tokenizer(text, add_special_tokens=not is_chat, truncation=True, max_length=args.max_length)
        rows.append(ids["input_ids"])
    return token_batches(rows, args.batch_size, tokenizer.pad_token_id or 0)


def _summary(args: argparse.Namespace, results: dict[str, Any]) -> str:
    rows = results["blocks"]
    return (
        f"Method `{args.method}` on {results['pairs']} pairs, at token {args.position} of each text. The vector of a "
        f"block has {args.strength:g} times the mean norm of its states. Below are this norm, the difference of means "
        "relative to it, the share of pairs whose positive text is further along the vector than its negative one "
        "(on the pairs themselves), and the cosine between the vector and the difference of means.\n\n"
        + table(
            ("block", "norm of states", "difference", "pairs separated", "cosine"),
            [[row[name] for name in ("block", "norm", "difference", "separated", "cosine")] for row in rows],
        )
    )


def _figure(rows: list[dict[str, Any]]) -> Any:
    figure, axes = figures.new_figure()
    figures.draw(axes, [row["block"] for row in rows], [row["difference"] for row in rows], 0)
    figures.over_blocks(axes, "difference of means / mean norm of states")
    axes.set_ylim(bottom=0)
    return figure
