"""The LoRA adapter that explains a steering adapter best, on the last linear layer of each block's MLP, for engines
that know only LoRA. It is only as good as the reported error: steering also acts on what passes by the MLP."""

from __future__ import annotations

import argparse

from trl_steer.files import new_folders

from ..console import Report as Progress
from . import arguments, distill, inputs
from .report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, adapter="required")
    arguments.add_text(parser, split="train", rows=500)
    arguments.add_relative(parser, "steered")
    arguments.add_save(parser, "LoRA adapter")
    parser.add_argument("--r", type=arguments.positive, default=8, help="rank of LoRA (default: 8)")


def run(args: argparse.Namespace, progress: Progress) -> Report:
    from peft import LoraConfig

    from trl_steer.analysis import distill as fit

    with new_folders(args.save) as (partial,):
        base, tuned, tokenizer = inputs.load_separate_pair(args, progress, args.adapter)
        split = inputs.load_split(args, tokenizer)
        progress.step("Fitting")
        config = LoraConfig(r=args.r, task_type="CAUSAL_LM")
        made = fit(base, tuned, split, config, relative=args.relative, progress=progress.progress)
        progress.end("done")
        made.model.save_pretrained(str(partial))
    tokens = inputs.count_tokens_of_parts(split)
    return Report(
        "A LoRA adapter that explains a steering adapter",
        {"tokens": tokens, "blocks": made.report},
        distill.summary(f"The LoRA adapter of rank {args.r}", "the steered model", made.report, tokens),
        distill.figure(made.report),
    )
