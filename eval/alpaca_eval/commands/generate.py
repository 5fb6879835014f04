"""`trl-steer alpaca-eval generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import generation, judges, prompts, reference
from ..local_model import LocalModel, Sampling
from ..served_model import ServedModel
from . import options

LOCK = ".lock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="checkpoint or adapter folder, Hub id, or the model's name at --endpoint"
    )
    parser.add_argument("--adapter", help="PEFT adapter on top of --model")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where model_outputs.json goes")
    parser.add_argument("--name", help="the model's name in all results (default: the name of --output)")
    parser.add_argument(
        "--prompt",
        choices=prompts.FORMS,
        default=prompts.AUTO,
        help="the model's chat template or the Alpaca prompt (default: chat if the tokenizer has a template)",
    )
    parser.add_argument("--max-new-tokens", type=options.positive_int, default=2048)
    parser.add_argument("--temperature", type=options.not_negative, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=options.positive_int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", help="default: the accelerator, if there is one")
    options.add_limit(parser)
    options.add_reference(parser)
    options.add_endpoint(parser, "base URL of an OpenAI-compatible server that runs the model")


def run(arguments: argparse.Namespace) -> int:
    known = reference.load(arguments.reference, with_gamed=False)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    rows = range(len(known.rows))[: arguments.limit]
    model, batch_size, in_flight = _model(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = arguments.name or arguments.output.resolve().name
    try:
        with FileLock(arguments.output / LOCK, timeout=0):
            generation.prepare(arguments.output, _settings(arguments, name, model, known))
            path = generation.generate(
                arguments.output,
                known.rows,
                rows,
                name,
                lambda batch: model.answer([known.rows[row]["instruction"] for row in batch], sampling),
                batch_size,
                in_flight,
            )
    except Timeout as error:
        raise RuntimeError(f"another process is writing to {arguments.output}; wait for it to end") from error
    print(f"Written: {path} ({len(rows)} rows, {model.form} prompt)")
    return 0


def _model(arguments: argparse.Namespace) -> tuple[LocalModel | ServedModel, int, int | None]:
    """The model, the size of a batch, and the number of requests at a time, None for a model of this process."""
    if arguments.endpoint is None:
        local = LocalModel(arguments.model, arguments.adapter, arguments.prompt, arguments.dtype, arguments.device)
        return local, arguments.batch_size, None
    if arguments.adapter is not None:
        raise ValueError("--adapter was given with --endpoint; the server has to load the adapter.")
    endpoint = judges.check_endpoint(arguments.endpoint)
    key = next(iter(judges.keys(endpoint, arguments.api_key_env)), None)
    served = ServedModel(arguments.model, endpoint, key, arguments.prompt, options.settings(arguments))
    return served, 1, arguments.in_flight


def _settings(
    arguments: argparse.Namespace, name: str, model: LocalModel | ServedModel, known: reference.Reference
) -> dict[str, Any]:
    """All that an output depends on, and what the report shows."""
    return {
        "name": name,
        **model.source,
        "weights": model.weights,
        "endpoint": arguments.endpoint,
        "prompt": model.form,
        "prompt_text": model.prompt_text,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size if arguments.endpoint is None else None,
        "dtype": arguments.dtype,
        "parameters": model.parameters,
        "baseline_sha256": known.sha256[reference.BASELINE],
    }
