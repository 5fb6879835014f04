"""`trl-steer serve`: vLLM's own server, with the options that the given adapters need."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from trl_steer.checkpoint_names import check_folder

# What `vllm serve` runs. The command itself does not start in the builds for CPUs, whose package has another name.
SERVER = "vllm.entrypoints.launchers.api_server.entry"
# Options of vLLM that follow from the adapters.
_OURS = ("--lora-modules", "--enable-lora")


class Needs(NamedTuple):
    """What a server has to have room for.

    Attributes:
        rank (`int`): The largest rank of the adapters.
        sites (`list[str]`), activations (`list[str]`): All sites and activations of the adapters.
    """

    rank: int
    sites: list[str]
    activations: list[str]


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer serve") -> int:
    """Becomes vLLM's server. Returns an exit status only after an error, which is printed as one line."""
    parsed, others = _parser(prog).parse_known_args(argv)
    try:
        command, variables = _prepare(parsed.model, _named(parsed.adapter), others)
        os.execve(sys.executable, command, {**variables, **os.environ})
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _prepare(model: str, adapters: dict[str, str], others: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line of the server, and variables of its environment."""
    for word in others:
        if word.partition("=")[0] in _OURS:
            raise ValueError(f"{word.partition('=')[0]} follows from --adapter NAME=FOLDER. Use that instead.")
    check_folder(model)
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed here. It needs an environment of its own, which integrations/vllm/README.md "
            "describes."
        )
    from .adapter import ACTIVATIONS_VARIABLE, SITES_VARIABLE

    needs = needs_of(adapters)
    command = [sys.executable, "-m", SERVER, "--model", model, *options(adapters, needs.rank), *others]
    found = {SITES_VARIABLE: needs.sites, ACTIVATIONS_VARIABLE: needs.activations}
    return command, {variable: " ".join(names) for variable, names in found.items() if names}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        allow_abbrev=False,
        description="Start vLLM's OpenAI-compatible server with adapters of steering, LoRA or both.",
        epilog="All other options are those of `vllm serve`, and come last: --port 8000 --dtype bfloat16 ...",
    )
    parser.add_argument("model", help="checkpoint folder or Hub id of the base model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="name of an adapter in requests, and its folder or Hub id; may be repeated (default: none)",
    )
    return parser


def _named(given: Sequence[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for word in given:
        name, _, folder = word.partition("=")
        if not name or not folder:
            raise ValueError(f"Expected --adapter NAME=FOLDER, got {word!r}.")
        if name in adapters:
            raise ValueError(f"There are two adapters of the name {name!r}: {adapters[name]} and {folder}.")
        check_folder(folder, "adapter_config.json")
        adapters[name] = folder
    return adapters


def needs_of(adapters: dict[str, str]) -> Needs:
    """Reads the configurations of adapters.

    Args:
        adapters (`dict[str, str]`): Folders or Hub ids by name.

    Raises:
        ValueError: An adapter cannot be read, or cannot be served.
    """
    from trl_steer.tuners.steering.folder import AdapterFolder

    from .adapter import OURS, check_config, check_type, ranks_of

    ranks, sites, activations = [1], set(), set()
    for name, folder in adapters.items():
        try:
            config: Any = AdapterFolder.open(folder).config
            check_type(config.peft_type.value)
            if config.peft_type.value in OURS:
                steering = check_config(config)
                sites.add(steering.site)
                activations |= {steering.activation} - {None}
            ranks += ranks_of(config)
        except ValueError as error:
            raise ValueError(f"The adapter {name!r} in {folder} cannot be served: {error}") from error
    return Needs(max(ranks), sorted(sites), sorted(activations))


def options(adapters: dict[str, str], rank: int) -> list[str]:
    """vLLM's options for adapters.

    Raises:
        ValueError: vLLM has no room for adapters of this rank.
    """
    from vllm.config.lora import MaxLoRARanks

    allowed = sorted(size for size in get_args(MaxLoRARanks) if size >= rank)
    if not allowed:
        raise ValueError(f"An adapter has rank {rank}, but vLLM serves ranks up to {max(get_args(MaxLoRARanks))}.")
    # One more slot than adapters, for one that is loaded later.
    sizes = ["--max-loras", str(len(adapters) + 1), "--max-lora-rank", str(allowed[0])]
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    return ["--enable-lora", *sizes, *(["--lora-modules", *modules] if modules else [])]
