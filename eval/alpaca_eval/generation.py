"""Writing a model's outputs, row by row on the disk, and together in canonical order when all are there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trl_steer.files import read_json, write_json

from .completions import GIVE_UP_AFTER
from .journal import Journal
from .rows import OUTPUTS

SETTINGS = "generation.json"
PROGRESS = "progress.jsonl"

# Takes the canonical rows of a batch and gives their outputs.
Answer = Callable[[Sequence[int]], Sequence[str]]


class GenerationError(RuntimeError):
    """Some rows have no output."""


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes down how the outputs in `folder` come about.

    Raises:
        ValueError: if the folder holds outputs that came about in another way.
    """
    path = folder / SETTINGS
    if path.is_file() and Journal(folder / PROGRESS).read():  # settings that gave no output may be corrected
        before = read_json(path)
        changed = [
            f"{name} {before.get(name)!r}, now {settings.get(name)!r}"
            for name in dict.fromkeys([*before, *settings])
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds outputs of other settings ({'; '.join(changed)}). Name another --output."
            )
    write_json(path, dict(settings))


def batches(rows: Sequence[int], lengths: Mapping[int, int], size: int) -> list[list[int]]:
    """Rows of about equal length together, the longest first, so that a lack of memory shows itself at once."""
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def generate(
    folder: Path,
    reference_rows: Sequence[Mapping[str, str]],
    rows: Sequence[int],
    name: str,
    answer: Answer,
    batch_size: int = 1,
    in_flight: int | None = None,
) -> Path:
    """Asks for what is not there yet, and writes `model_outputs.json` once every row has an output.

    Args:
        folder (`Path`): Holds, after each batch, all that is finished.
        reference_rows (`Sequence[Mapping]`): The reference set in canonical order.
        rows (`Sequence[int]`): Which of it to answer.
        name (`str`): The model's name, column `generator` of the outputs.
        answer (`Callable`): Gives the outputs for a batch of canonical rows.
        batch_size (`int`): Rows in a batch.
        in_flight (`int`, *optional*): Batches at a time, of which one that fails does not end the others. None for a
            model in this process: whatever goes wrong with it is raised at once.

    Raises:
        GenerationError: if rows are left without an output. What is finished stays.
    """
    from tqdm import tqdm

    journal = Journal(folder / PROGRESS)
    done = {record["row"]: record["output"] for record in journal.read()}
    lengths = {row: len(reference_rows[row]["instruction"]) for row in rows}
    # Batches do not depend on what is finished, except that finished rows are left out of them.
    pending = [[row for row in batch if row not in done] for batch in batches(rows, lengths, batch_size)]
    pending = [batch for batch in pending if batch]
    lock = threading.Lock()
    errors: list[str] = []
    in_a_row = 0
    count = sum(map(len, pending))
    with tqdm(total=len(rows), initial=len(rows) - count, desc="generating", unit="row", disable=None) as bar:

        def work(batch: list[int]) -> None:
            nonlocal in_a_row
            if in_a_row >= GIVE_UP_AFTER:
                return
            try:
                outputs = answer(batch)
            except (OSError, RuntimeError, ValueError) as error:
                if in_flight is None:
                    raise
                with lock:
                    errors.append(str(error))
                    in_a_row += 1
                return
            records = ({"row": row, "output": output} for row, output in zip(batch, outputs, strict=True))
            kept = journal.append(*records)
            with lock:
                in_a_row = 0
                done.update((record["row"], record["output"]) for record in kept)
                bar.update(len(batch))

        if in_flight is None:
            for batch in pending:
                work(batch)
        else:
            with ThreadPoolExecutor(in_flight) as pool:
                list(pool.map(work, pending))
    if errors:
        raise GenerationError(
            f"{len(rows) - sum(row in done for row in rows)} of {len(rows)} rows have no output; the last error: "
            f"{errors[-1]}. The same command asks for them, and for nothing else, again."
        )
    outputs = [
        {
            "dataset": reference_rows[row]["dataset"],
            "instruction": reference_rows[row]["instruction"],
            "output": done[row],
            "generator": name,
        }
        for row in sorted(rows)
    ]
    write_json(folder / OUTPUTS, outputs)
    return folder / OUTPUTS
