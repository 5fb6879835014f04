"""The tables of `llama_cpp_export.py`."""

from __future__ import annotations

from typing import Any

from ..analysis.report import table


def to_markdown(document: dict[str, Any]) -> str:
    """The contents of `llama_cpp.json` as Markdown."""
    facts = [
        f"- {title}: " + ", ".join(f"{name} {value}" for name, value in document[key].items())
        for title, key in (("Machine", "machine"), ("Versions", "versions"))
    ]
    parts = [
        "# Adapters in llama.cpp",
        f"`{document['command']}`",
        "\n".join(facts),
        f"SmolLM2-135M-Instruct, and adapters that were trained on the demo's task. Measured on {document['prompts']} "
        f"held-out prompts with their completions, {document['tokens']:,} tokens. The reference is the same model in "
        "transformers with PEFT, in float32.",
        _float32(document),
        _quantized(document),
        _constants(document),
    ]
    return "\n\n".join(parts) + "\n"


def _float32(document: dict[str, Any]) -> str:
    rows: list[list[Any]] = []
    for name, result in {"base model": document["base"], **document["adapters"]}.items():
        full = result["float32"]
        greedy = ", ".join(str(number) for number in result["greedy"].values()) if "greedy" in result else ""
        rows.append([name, result.get("architecture", "llama"), full["tokens"], full["vocabulary"], greedy])
    header = [
        "",
        "architecture",
        "log-probability of the text",
        "of all tokens",
        "greedy: equal, near ties, different",
    ]
    return (
        "On a float32 file. Largest differences of log-probabilities, of the tokens of the text and of the whole "
        "vocabulary at each of them; and how many greedy answers are equal, or differ first where two candidates are "
        f"nearly tied:\n\n{table(header, rows)}"
    )


def _quantized(document: dict[str, Any]) -> str:
    base = document["base"]
    noise = base["quantized"]["kl"]
    cases = {"base model": base, **document["adapters"]}
    rows: list[list[Any]] = []
    for name, result in cases.items():
        kl, kept = result["quantized"]["kl"], result.get("kept")
        unchanged = "" if kept is None else f"{kept['tensors'] - len(kept['changed'])} of {kept['tensors']}"
        added = "" if kept is None else f"{(kl - noise) / noise:+.3f}"
        speed = document["speed"]["base" if kept is None else name]
        rates = [_rate(speed[kind], kept is None) for kind in ("prompt", "generation")]
        rows.append([name, kl, added, unchanged, f"{result['bytes'] / 1e6:.1f}", *rates])
    header = ["", "KL", "added, as a share of the base model's", "tensors unchanged", "MB", "prompt", "generation"]
    return (
        "On the quantized file (Q4_1), of which the float32 file is made. llama.cpp rounds the inputs of quantized "
        "matrices, so that even the base model differs from its reference: KL divergence in nats per token. `added` "
        "is what a row has more, as a share of that of the base model. Speed in tokens per second, medians of "
        "alternating rounds of one stream, in brackets the ratio to the base model in each round and its quartiles:"
        f"\n\n{table(header, rows)}"
    )


def _rate(speed: list[float], is_base: bool) -> str:
    rate, low, median, high = speed
    return f"{rate:.0f}" if is_base else f"{rate:.0f} ({median:.2f}, {low:.2f} to {high:.2f})"


def _constants(document: dict[str, Any]) -> str:
    lines = []
    for name, result in document["adapters"].items():
        found = {key.removeprefix("trl_steer."): value for key, value in result["metadata"].items()}
        if "constant" in found:
            lines.append(
                f"- {name}: largest norm {found['largest_norm']:.5g} on {found['calibration.tokens']:,} tokens, "
                f"constant {found['constant']:.5g}, {found['margin']:,.0f} times as large"
            )
    return "The norms of hidden states before the updates, and the constants:\n\n" + "\n".join(lines) if lines else ""
