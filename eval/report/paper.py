"""The numbers of the paper's tables, as they are printed (arXiv 2603.00425), and what follows from them.

Several differences to SFT do not follow from the accuracies. Both are in percent and rounded to one digit, so that a
difference can be 0.1 away from that of the rounded accuracies, but not more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Benchmarks of `trl_steer.tasks`, and what the paper's tables call them.
TASKS = {
    "boolq": "BoolQ",
    "winogrande": "WinoG",
    "arc_challenge": "ARC-C",
    "gsm8k": "GSM8K",
    "aqua": "AQuA",
    "listops": "ListOps",
}
MODELS = ("Llama-3.2-1B", "Gemma-3-1B", "Qwen3-4B", "Llama-3.1-8B")
SFT, LORA, REFT, OURS = "SFT", "LoRA", "ReFT", "Ours"
LOFIT, JOLA, VECTOR, RANK_1 = "LoFiT", "JoLA", "Ours (1-vec)", "Ours r=1"

# Tables 1 and 2: method, trainable share in percent, then accuracy and difference to SFT for each of `TASKS`, and the
# average of the differences. One block for each of `MODELS`.
_TABLE_1 = """
SFT   100   88.2   0.0  58.2   0.0  60.3   0.0  32.2   0.0  36.2   0.0  66.2   0.0    0.0
LoRA  0.45  84.7  -3.5  57.0  -1.2  61.6   1.3  31.8  -0.4  33.6  -2.9  60.0  -6.2   -2.2
ReFT  0.04  84.1  -4.1  49.3  -8.9  57.0  -2.7  31.6  -0.6  30.2  -6.0  49.3 -16.9   -6.5
Ours  0.04  86.2  -2.0  60.1   1.9  60.3   0.0  31.5  -0.7  36.5   0.3  65.4  -0.8   -0.2

SFT   100   83.3   0.0  51.4   0.0  48.2   0.0  23.4   0.0  32.7   0.0  65.8   0.0    0.0
LoRA  0.45  84.7   1.4  51.6   0.2  50.6   2.4  22.6  -0.8  31.6  -1.1  53.6 -12.2   -1.7
ReFT  0.04  76.2  -7.1  49.2  -2.2  27.8 -20.4  11.6 -11.8  24.6  -8.1  50.3 -15.5  -10.9
Ours  0.04  82.0  -1.3  50.8  -0.6  48.9   0.7  21.6  -1.8  32.1  -0.6  65.2  -0.6   -0.7

SFT   100   91.4   0.0  83.0   0.0  88.4   0.0  37.0   0.0  64.8   0.0  77.1   0.0    0.0
LoRA  0.41  91.0  -0.4  84.6   1.6  88.8   0.4  37.6   0.6  66.7   1.9  78.0   0.9    0.8
ReFT  0.04  90.5  -0.9  64.9 -18.1  84.7  -3.7  37.7   0.7  66.8   2.0  68.7  -8.4   -4.7
Ours  0.04  90.7  -0.7  80.6  -2.4  88.6   0.2  37.4   0.4  65.0   0.2  74.0  -3.1   -0.9

SFT   100   91.6   0.0  86.4   0.0  80.6   0.0  44.0   0.0  47.7   0.0  67.2   0.0    0.0
LoRA  0.26  92.3   0.7  88.8   2.4  80.4  -0.2  43.8  -0.2  45.4  -2.3  67.6   0.4    0.1
ReFT  0.02  91.3  -0.3  82.1  -4.5  77.9  -2.7  40.1  -3.9  45.4  -2.3  64.4  -2.8   -2.8
Ours  0.02  92.3   0.7  87.2   0.8  80.4  -0.2  43.4  -0.4  47.6   0.1  69.1   1.9    0.5
"""
_TABLE_2 = """
LoFiT         0.003  83.0  -5.2  49.2  -9.0  46.3 -20.0  28.2  -4.0  32.5  -3.7  64.1  -2.1  -7.3
JoLA          0.007  83.6  -4.6  48.7  -9.5  52.5  -7.8  28.0  -4.2  31.1  -5.1  62.2  -4.0  -5.9
Ours_(1-vec)  0.003  86.1  -2.1  57.6  -0.6  58.0  -1.7  28.6  -3.6  30.9  -6.3  64.6  -1.6  -2.6
Ours_r=1      0.005  86.2  -2.0  52.0  -6.2  58.8  -0.9  29.2  -3.0  33.6  -2.6  64.4  -1.8  -2.8

LoFiT         0.003  75.8  -7.5  49.6  -1.8  46.7  -1.5  15.1  -8.3  28.4  -4.3  62.3  -3.5  -4.5
JoLA          0.007  75.1  -8.2  51.2  -0.2  46.4  -1.8  14.7  -8.7  26.5  -6.3  57.8  -8.0  -5.5
Ours_(1-vec)  0.003  74.2  -9.1  51.4   0.0  44.5  -3.7  18.0  -5.4  26.8  -5.9  61.9  -3.9  -4.7
Ours_r=1      0.005  83.1  -0.2  51.8   0.4  49.0   0.8  19.0  -4.4  27.4  -5.3  65.2  -0.6  -1.5

LoFiT         0.003  90.2  -1.2  77.8  -5.2  87.6  -0.8  39.1   2.1  67.8   3.0  65.3 -11.8  -2.3
JoLA          0.007  89.6  -1.8  75.7  -7.3  88.1  -0.3  38.9   1.9  64.0  -0.8  64.5 -12.6  -3.5
Ours_(1-vec)  0.003  90.4  -1.0  79.0  -4.0  86.3  -2.1  37.1   0.1  63.4  -1.4  65.3 -11.8  -3.4
Ours_r=1      0.005  90.0  -1.4  80.2  -2.8  88.4   0.0  39.1   2.1  65.9   1.1  63.6 -13.5  -2.4

LoFiT         0.001  89.9  -1.7  48.7 -39.1  73.8  -6.8  39.8  -4.2  47.0  -0.7  64.8  -2.4  -9.2
JoLA          0.003  90.5  -1.1  50.3 -37.5  76.9  -3.7  37.7  -6.3  46.2  -1.5  63.8  -3.4  -8.9
Ours_(1-vec)  0.001  91.7   0.1  86.6   0.2  80.0  -0.6  39.7  -4.3  44.9  -2.8  66.4  -2.8  -1.7
Ours_r=1      0.003  91.3  -0.6  85.9  -0.5  80.3  -0.3  40.7  -3.3  45.6  -2.1  68.5   1.3  -0.9
"""
# Table 3, Llama-3.1-8B on Alpaca-Cleaned: method, trainable share in percent, LC win rate and its standard error.
TABLE_3 = (
    ("Full SFT", 100, 11.49, 0.51),
    ("Post-block steering, nonlinear, r=16", 0.05, 11.34, 0.48),
    ("Post-block steering, linear, r=16", 0.05, 11.00, 0.53),
    ("LoRA, r=16", 0.52, 9.59, 0.40),
    ("LoRA, r=8", 0.26, 10.52, 0.48),
    ("ReFT, all layers", 0.05, 10.96, 0.43),
    ("ReFT, 4 layers", 0.004, 9.50, 0.49),
)
# Table 4: accuracies. The adapter's rank is chosen for about as many parameters as LoRA has.
LORA_16, LORA_8, ADAPTER, JOINT, JOINT_ORTH = "LoRA r=16", "LoRA r=8", "Adapter", "Joint", "Joint-Orth"
TABLE_4_METHODS = (SFT, LORA_16, LORA_8, ADAPTER, JOINT, JOINT_ORTH)
TABLE_4 = {
    ("Llama-3.2-1B", "gsm8k"): (32.2, 31.2, 31.8, 31.3, 31.1, 31.1),
    ("Llama-3.2-1B", "boolq"): (88.2, 88.4, 84.7, 86.2, 88.4, 88.5),
    ("Llama-3.2-1B", "winogrande"): (58.2, 64.3, 57.0, 52.4, 56.9, 59.3),
    ("Gemma-3-1B", "gsm8k"): (23.4, 23.8, 22.6, 21.6, 22.8, 24.4),
    ("Gemma-3-1B", "boolq"): (83.3, 84.8, 84.7, 81.4, 84.5, 84.8),
    ("Gemma-3-1B", "winogrande"): (51.4, 51.8, 51.4, 50.8, 51.3, 50.9),
    ("Qwen3-4B", "gsm8k"): (37.0, 38.3, 37.6, 37.3, 37.9, 38.8),
    ("Qwen3-4B", "boolq"): (91.4, 91.0, 91.0, 90.3, 90.7, 91.4),
    ("Qwen3-4B", "winogrande"): (83.0, 83.0, 84.6, 82.5, 82.7, 83.5),
}


class Published(NamedTuple):
    """
    An accuracy of Table 1, 2 or 4, in percent.

    Attributes:
        accuracy (`float`): As printed.
        delta (`float`): The difference to SFT in points, as printed. Table 4 has none: the recomputed one.
        recomputed (`float`): The difference of the printed accuracies.
    """

    accuracy: float
    delta: float
    recomputed: float

    @property
    def wrong(self) -> bool:
        """Whether rounding cannot explain the printed difference."""
        return round(abs(self.delta - self.recomputed), 1) > 0.1


class PublishedRow(NamedTuple):
    """
    A row of Table 1 or 2.

    Attributes:
        share (`float`): The trainable share in percent, as printed.
        scores (`dict[str, Published]`): By the name of the benchmark.
        average (`float`): The average difference, as printed.
    """

    share: float
    scores: dict[str, Published]
    average: float

    def recomputed(self, tasks: Sequence[str] = tuple(TASKS)) -> float:
        """The average of the recomputed differences over some of the benchmarks."""
        return sum(self.scores[task].recomputed for task in tasks) / len(tasks)

    @property
    def wrong(self) -> bool:
        """Whether rounding cannot explain the printed average.

        The differences of the printed accuracies are at most 0.1 off, and the printed average at most 0.05.
        """
        return abs(self.average - self.recomputed()) > 0.15 + 1e-9


Table = dict[str, dict[str, PublishedRow]]


def title(task: str) -> str:
    """What the paper's tables call a benchmark. Others keep their names."""
    return TASKS.get(task, task)


def _read(text: str, sft: Table | None = None) -> Table:
    """By model and method."""
    table: Table = {}
    for model, block in zip(MODELS, text.strip().split("\n\n"), strict=True):
        table[model] = {}
        for line in block.splitlines():
            name, *words = line.split()
            share, *numbers, average = map(float, words)
            pairs = dict(zip(TASKS, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
            base = (sft or table)[model].get(SFT)
            scores = {
                task: Published(accuracy, delta, round(accuracy - base.scores[task].accuracy, 1) if base else 0.0)
                for task, (accuracy, delta) in pairs.items()
            }
            table[model][name.replace("_", " ")] = PublishedRow(share, scores, average)
    return table


TABLE_1 = _read(_TABLE_1)
TABLE_2 = _read(_TABLE_2, TABLE_1)


def wrong_differences() -> Iterator[tuple[int, str, str, str, Published]]:
    """The differences that do not follow from the printed accuracies: table, model, method, benchmark, numbers."""
    for number, table in ((1, TABLE_1), (2, TABLE_2)):
        for model, rows in table.items():
            for method, row in rows.items():
                for task, score in row.scores.items():
                    if score.wrong:
                        yield number, model, method, task, score


def published(model: str, method: str, task: str) -> Published | None:
    """The numbers of Tables 1 and 2, or else those of Table 4."""
    row = (TABLE_1[model] | TABLE_2[model]).get(method)
    if row is not None:
        return row.scores[task]
    accuracies = dict(zip(TABLE_4_METHODS, TABLE_4.get((model, task), ()), strict=False))
    if method not in accuracies:
        return None
    delta = round(accuracies[method] - accuracies[SFT], 1)
    return Published(accuracies[method], delta, delta)


def contradicted(model: str, method: str, task: str) -> bool:
    """Whether Table 4 has another accuracy than Table 1 for the same method."""
    same = {SFT: SFT, LORA_8: LORA}.get(method)
    if same is None:
        return False
    here = TABLE_4[model, task][TABLE_4_METHODS.index(method)]
    return here != TABLE_1[model][same].scores[task].accuracy
