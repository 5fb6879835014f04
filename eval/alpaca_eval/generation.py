"""Generates a model's outputs. Each batch is stored when it is finished, and the outputs are written at the end."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_steer.files import read_json, write_json, write_text

from .client import Client
from .journal import Journal
from .reference import OUTPUTS
from .thoughts import Output

SETTINGS = "generation.json"
PROGRESS = "progress.jsonl"


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Stores the settings of the outputs in `folder`.

    Raises:
        ValueError: It has outputs with other settings.
    """
    # Settings may change as long as there are no outputs.
    before = read_json(folder / SETTINGS) if Journal(folder / PROGRESS).read() else dict(settings)
    names = dict.fromkeys([*before, *settings])
    pairs = {name: (before.get(name), settings.get(name)) for name in names}
    changed = [f"{name} {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise ValueError(f"{folder} has outputs with other settings ({'; '.join(changed)}). Choose another --output.")
    write_json(folder / SETTINGS, dict(settings))


def generate(
    folder: Path,
    reference_rows: Sequence[Mapping[str, str]],
    rows: Sequence[int],
    name: str,
    answer: Callable[[list[str]], Sequence[Output]],
    batch_size: int = 1,
    client: Client | None = None,
) -> int:
    """Generates the missing outputs, and writes `model_outputs.json` when all rows have one.

    Args:
        folder (`Path`): The output folder. Finished batches, including thoughts, are stored in its journal.
        rows (`Sequence[int]`): Indices in the reference set.
        answer (`Callable`): Returns the outputs for a batch of instructions.
        client (`Client`, *optional*): For a served model, where other rows continue if one fails.

    Returns the number of empty outputs.

    Raises:
        RuntimeError: Outputs are missing. Finished ones are kept.
    """
    from tqdm import tqdm

    journal = Journal(folder / PROGRESS)
    # One record per batch, because the outputs of a row depend on the other rows of its batch.
    done = {each["row"]: each["output"] for record in journal.read() for each in record["outputs"]}
    # By length, the longest first, so that running out of memory happens at once.
    ordered = sorted(rows, key=lambda row: (-len(reference_rows[row]["instruction"]), row))
    # Batches do not depend on which rows are finished, except that these are left out.
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    pending = [left for batch in batches if (left := [row for row in batch if row not in done])]
    before = len(rows) - sum(map(len, pending))

    def work(batch: list[int]) -> int:
        found = answer([reference_rows[row]["instruction"] for row in batch])
        pairs = zip(batch, found, strict=True)
        outputs = [{"row": row, "output": output.text, "thought": output.thought} for row, output in pairs]
        journal.append({"outputs": outputs})
        done.update((each["row"], each["output"]) for each in outputs)
        return len(batch)

    if client is not None:
        failures = client.send_all(pending, work, before, len(rows))
        if failures:
            reasons = "; ".join(f"{count} times: {reason}" for reason, count in failures.most_common(2))
            raise RuntimeError(
                f"{sum(row not in done for row in rows)} of {len(rows)} rows have no output ({reasons}). Run the same "
                "command again to generate them."
            )
    else:
        with tqdm(total=len(rows), initial=before, unit="row", disable=None) as bar:
            for batch in pending:
                bar.update(work(batch))
    outputs = [{**reference_rows[row], "output": done[row], "generator": name} for row in sorted(rows)]
    # In ASCII, because outputs may contain unpaired surrogates.
    write_text(folder / OUTPUTS, json.dumps(outputs, indent=2) + "\n")
    return sum(not done[row] for row in rows)
