"""Writing a model's outputs, batch by batch on the disk, and together in canonical order when all are there."""

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
    """Writes down how the outputs in `folder` come about. Raises `ValueError` if it holds others."""
    # Settings that gave no output may be corrected.
    before = read_json(folder / SETTINGS) if Journal(folder / PROGRESS).read() else dict(settings)
    names = dict.fromkeys([*before, *settings])
    pairs = {name: (before.get(name), settings.get(name)) for name in names}
    changed = [f"{name} {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise ValueError(f"{folder} holds outputs of other settings ({'; '.join(changed)}). Name another --output.")
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
    """Asks for what is not there yet, and writes `model_outputs.json` once every row has an output.

    Args:
        folder (`Path`): Holds, after each batch, all that is finished; thoughts only in its journal.
        rows (`Sequence[int]`): Which of the reference set to answer.
        answer (`Callable`): Gives the outputs for a batch of instructions.
        client (`Client`, *optional*): Of a served model, where a row that fails does not end the others.

    Returns the number of empty outputs. Raises `RuntimeError` if rows are left without one; what is finished stays.
    """
    from tqdm import tqdm

    journal = Journal(folder / PROGRESS)
    # One record for a batch: the rest of one would be answered with other neighbours, and differently.
    done = {each["row"]: each["output"] for record in journal.read() for each in record["outputs"]}
    # Rows of about equal length together, the longest first, so that a lack of memory shows itself at once.
    ordered = sorted(rows, key=lambda row: (-len(reference_rows[row]["instruction"]), row))
    # Batches do not depend on what is finished, except that finished rows are left out of them.
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
        failures = client.ask_all(pending, work, before, len(rows))
        if failures:
            reasons = "; ".join(f"{count} times: {reason}" for reason, count in failures.most_common(2))
            raise RuntimeError(
                f"{sum(row not in done for row in rows)} of {len(rows)} rows have no output ({reasons}). The same "
                "command asks for them, and for nothing else, again."
            )
    else:
        with tqdm(total=len(rows), initial=before, unit="row", disable=None) as bar:
            for batch in pending:
                bar.update(work(batch))
    outputs = [{**reference_rows[row], "output": done[row], "generator": name} for row in sorted(rows)]
    # In ASCII, which carries whatever the model wrote, half of a surrogate pair for example.
    write_text(folder / OUTPUTS, json.dumps(outputs, indent=2) + "\n")
    return sum(not done[row] for row in rows)
