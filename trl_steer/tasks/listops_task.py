"""The two ListOps benchmarks: the published dataset, and a generated one that does not need a download.

Train, validation (2000 rows) and test (2000 rows) are the published splits, as in the authors' code. Scores on the
generated dataset cannot be compared with published ones. See [`trl_steer.tasks.listops`] for the expressions, the
prompt and the extraction of answers.

>>> row = {"Source": "[MIN 2 9 [MAX 4 7 ] 0 ]", "Target": 0}
>>> print(prompt(row) + completion(row))
Evaluate the value of the following nested list expression.
Return only the final numeric result inside <answer>...</answer>.
<BLANKLINE>
Expression:
[MIN 2 9 [MAX 4 7 ] 0 ]
<answer>0</answer>
"""

from typing import TYPE_CHECKING

from trl_steer.tasks import listops
from trl_steer.tasks.base import Benchmark, Row
from trl_steer.tasks.splits import official

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = {"default": official, "steerling": official}


def prompt(row: Row) -> str:
    return listops.prompt(row["Source"])


def completion(row: Row) -> str:
    return listops.completion(row["Target"])


def answer(row: Row) -> str:
    return str(row["Target"])


def read_generated(
    seed: int, train: int, validation: int, test: int, min_tokens: int, max_tokens: int
) -> dict[str, "Dataset"]:
    """Splits of the given sizes, with the columns of the published dataset. The test and validation splits do not
    depend on the size of train."""
    import datasets

    sizes = {"test": test, "validation": validation, "train": train}
    expressions = listops.generate_splits(sizes, seed=seed, min_tokens=min_tokens, max_tokens=max_tokens)
    return {
        name: datasets.Dataset.from_dict({"Source": drawn, "Target": [listops.evaluate(text) for text in drawn]})
        for name, drawn in expressions.items()
    }


TASK = Benchmark(
    name="listops",
    source={"dataset_path": "fengyang0317/listops-64", "config": None},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=listops.strict,
    flexible=listops.flexible,
    steerling=listops.steerling,
    splits=SPLITS,
    key=("Source",),
)

# More than 16 and fewer than 64 tokens, the ratio of Long Range Arena's bounds, 500 and 2000.
SYNTHETIC = Benchmark(
    name="listops_synthetic",
    source={"seed": 42, "train": 8000, "validation": 2000, "test": 2000, "min_tokens": 17, "max_tokens": 63},
    prompt=prompt,
    completion=completion,
    answer=answer,
    strict=listops.strict,
    flexible=listops.flexible,
    steerling=listops.steerling,
    splits=SPLITS,
    key=("Source",),
    read=read_generated,
)
