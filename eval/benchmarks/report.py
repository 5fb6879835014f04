"""The report of the benchmarks, as JSON and as a Markdown table, with machine and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from trl_steer.files import write_json, write_text

from .harness import Result, current_clock

PACKAGES = ("trl-steer", "torch", "transformers", "peft", "trl", "accelerate")


def machine(device: str) -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none used",
        "clock": "gpu" if device == "cuda" else current_clock(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed, "torch": str(torch.__version__)}  # with its build


def write(results: list[Result], folder: Path, device: str, command: str) -> list[Path]:
    """Writes `benchmarks_<device>.json` and `.md`. Returns their paths."""
    where, what = machine(device), versions()
    document = {
        "command": command,
        "machine": where,
        "versions": what,
        "results": [result.as_dict() for result in results],
    }
    as_json, as_markdown = (folder / f"benchmarks_{device}.{ending}" for ending in ("json", "md"))
    write_json(as_json, document)
    write_text(as_markdown, _markdown(results, where, what, command))
    return [as_json, as_markdown]


def table(results: list[Result]) -> str:
    lines = [
        "| benchmark | ratio | median | quartiles | measured | bound | holds |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for result in results:
        holds = {None: "", True: "yes", False: "no"}[result.holds]
        lines.append(
            f"| {result.case} | {result.numerator} / {result.denominator} | {result.ratio:.3f} "
            f"| {result.low:.3f} to {result.high:.3f} | {_measured(result)} | {result.bound or ''} | {holds} |"
        )
    return "\n".join(lines)


def line(result: Result) -> str:
    """One line for the terminal."""
    verdict = "" if result.bound is None else f"  {result.bound}: {'holds' if result.holds else 'DOES NOT HOLD'}"
    spread = f"({result.low:.3f} to {result.high:.3f})"
    return f"{result.case}: {result.numerator} / {result.denominator} = {result.ratio:.3f} {spread}{verdict}"


def _measured(result: Result) -> str:
    above, below = result.values
    if result.unit == "s":
        return f"{1000 * above:.1f} / {1000 * below:.1f} ms"
    return f"{above:.1f} / {below:.1f} {result.unit}"


def _markdown(results: list[Result], where: dict, what: dict, command: str) -> str:
    return "\n".join(
        [
            f"# The cost of steering: {where['gpu'] if where['gpu'] != 'none used' else where['cpu']}",
            "",
            f"    {command}",
            "",
            "- Machine: " + ", ".join(f"{name} {value}" for name, value in where.items()),
            "- Versions: " + ", ".join(f"{name} {value}" for name, value in what.items()),
            "",
            "Each ratio is the median over rounds of the ratio in each round. Both sides run alternately in one",
            "process, with the same base weights. Saved bytes are deterministic.",
            "",
            table(results),
            "",
        ]
    )


def _cpu_model() -> str:
    try:
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
