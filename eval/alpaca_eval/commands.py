"""The subcommands of `trl-steer alpaca-eval`. Each takes its parsed arguments and returns the exit status."""

import argparse
import re
import sys
from pathlib import Path

from trl_steer.files import locked, write_text

from . import generation, judges, judging, reference
from .client import Client


def generate(arguments: argparse.Namespace) -> int:
    """Generates a model's outputs."""
    from .local_model import LocalModel, Sampling
    from .served_model import ServedModel

    if arguments.endpoint is not None and arguments.adapter is not None:
        raise ValueError("--adapter cannot be used with --endpoint. Load the adapter in the server.")
    client, batch_size, pattern = None, arguments.batch_size, _pattern(arguments)
    if arguments.endpoint is not None:
        client, batch_size = _client(arguments, judges.check_endpoint(arguments.endpoint)), 1
    known = reference.load(arguments.reference, with_gamed=False)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    model: LocalModel | ServedModel
    if client is not None:
        model = ServedModel(arguments.model, client, arguments.prompt, sampling, pattern, arguments.allow_empty)
    else:
        how = (arguments.prompt, sampling, pattern, arguments.dtype, arguments.device)
        try:
            model = LocalModel(arguments.model, arguments.adapter, *how)
        except OSError as error:
            raise OSError(f"Can't load {arguments.model}. {error}") from error
    settings = {
        "name": arguments.name or arguments.output.resolve().name,
        **model.description,
        **vars(sampling),
        "endpoint": arguments.endpoint,
        "batch_size": batch_size,
        "dtype": arguments.dtype,
        "thoughts": pattern and pattern.pattern,
        "baseline_sha256": known.sha256[reference.BASELINE],
    }
    chosen = range(len(known.rows))[: arguments.limit]
    with locked(arguments.output):
        generation.prepare(arguments.output, settings)
        empty = generation.generate(
            arguments.output, known.rows, chosen, settings["name"], model.answer, batch_size, client
        )
    print(f"Wrote {arguments.output / reference.OUTPUTS} ({len(chosen)} rows{f', {empty} EMPTY' if empty else ''}).")
    return 0


def judge(arguments: argparse.Namespace) -> int:
    """Judges outputs. Returns 0 if every row has a judgement, else 1."""
    from huggingface_hub import constants

    # Cheap checks first, and before the first paid request everything that is needed after the last one.
    file = reference.find_outputs(arguments.outputs)
    settings = dict(arguments.judge_setting)
    chosen = judges.resolve(arguments.judge, arguments.judge_model, arguments.endpoint, settings)
    if chosen.key_variable and arguments.api_key_env and not arguments.endpoint:
        raise ValueError(f"{arguments.judge} has its own api_key_env. Pass --endpoint too to override it.")
    client = _client(arguments, chosen.endpoint, chosen.key_variable)
    known = reference.load(arguments.reference)
    given = reference.read_outputs(file, known)
    outputs = reference.Outputs(given.generator, dict(list(given.by_row.items())[: arguments.limit]))
    folder = arguments.output or file.parent / chosen.label
    cache = arguments.cache or Path(constants.HF_ASSETS_CACHE) / "trl_steer" / "alpaca_eval"
    with locked(folder):
        if not judging.is_about(folder, given):
            # If the judge fails now, a report must not show the result of earlier outputs.
            (folder / judging.RESULT).unlink(missing_ok=True)
        judged = judging.ask(
            outputs, known, chosen, client, cache, lambda cost: _confirm(cost, arguments.yes), _pattern(arguments)
        )
        result = judging.evaluate(*judged, outputs, known, chosen, folder)
    numbers = (f"{name} {'NaN' if result[name] is None else round(result[name], 2)}" for name in judging.NUMBERS)
    print(f"{result['name']}: {', '.join(numbers)}")
    print(f"Wrote {folder} ({result['n_total']} judgements of {chosen.name}, {chosen.model}).")
    warnings = [f"{count} rows failed: {reason}" for reason, count in result["failures"].items()]
    if missing := len(result["missing_rows"]):
        warnings.append(f"{missing} rows without a judgement are not counted. Run the same command again for them.")
    if reasons := "; ".join(result["not_comparable_because"]):
        warnings.append(f"NOT COMPARABLE with the leaderboard: {reasons}.")
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    return 0 if result["complete"] else 1


def report(arguments: argparse.Namespace) -> int:
    """Shows results side by side."""
    from . import report as reports

    found = [row for path in arguments.runs for row in reports.read(path)]
    found += reports.PAPER if arguments.paper else []
    if not found:
        raise ValueError("Nothing to report. Pass folders with judged outputs, or --paper.")
    table = reports.markdown(found)
    print(table, end="")
    if arguments.output:
        write_text(arguments.output, table)
        print(f"Wrote the table to {arguments.output}.")
    if arguments.plot:
        reports.plot(found, arguments.plot)
        print(f"Wrote the plot to {arguments.plot}.")
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Writes a submission."""
    from . import submission

    result = submission.check(arguments.output, arguments.judged, arguments.not_comparable)
    file = reference.find_outputs(arguments.outputs or arguments.judged.resolve().parent)
    known = reference.load(arguments.reference, with_gamed=False)
    submission.write(arguments.output, arguments.judged, result, reference.read_outputs(file, known), known)
    print(f"Wrote the submission to {arguments.output}.")
    return 0


def _client(arguments: argparse.Namespace, endpoint: str, variable: str | None = None) -> Client:
    key = judges.read_key(endpoint, arguments.api_key_env, variable)
    return Client(endpoint, key, arguments.in_flight, arguments.retries, arguments.timeout)


def _pattern(arguments: argparse.Namespace) -> re.Pattern[str] | None:
    return arguments.thought_pattern if arguments.strip_thoughts else None


def _confirm(cost: str, yes: bool) -> None:
    """Prints the cost and, without `yes`, asks for confirmation."""
    print(cost, flush=True)
    if not yes and not sys.stdin.isatty():
        raise RuntimeError("Nothing was sent. Pass --yes to confirm the cost.")
    try:
        answer = "y" if yes else input("Continue? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise RuntimeError("Nothing was sent.")
