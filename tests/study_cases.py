"""Small studies, and folders as finished cells leave them."""

from pathlib import Path

from trl_steer.eval.reproduce import results
from trl_steer.eval.reproduce.study import Cell, Study, from_dict
from trl_steer.eval.runs import Run
from trl_steer.files import write_json


def grid(model: str = "some/model", rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3), **changed) -> Study:
    """24 cells: four rows, three rates on validation and three seeds on test."""
    rows = [
        {"name": "Ours r=2", "method": "low_rank", "r": 2},
        {"name": "Ours (1-vec)", "method": "vector"},
        {"name": "LoRA r=2", "method": "lora", "r": 2},
        {"name": "SFT", "method": "full"},
    ]
    return from_dict(
        {
            "name": "grid",
            "title": "A grid of 24 cells",
            "models": [{"name": model, "label": "tiny"}],
            "tasks": [
                {
                    "name": "listops_synthetic",
                    "source": {"train": 8, "validation": 4, "test": 4, "min_tokens": 4, "max_tokens": 6},
                    "scoring": {"batch_size": 4, "gen_kwargs": {"max_gen_toks": 4}},
                }
            ],
            "seeds": [0, 1, 2],
            "rows": [{**row, "rates": rates} for row in rows],
            **changed,
        }
    )


def finish(folder: Path, cell: Cell, accuracy: float, seconds: float = 1.0) -> Run:
    """Leaves a folder as a finished cell does."""
    run = Run(folder / results.CELLS / cell.key)
    write_json(run.folder / "settings.json", cell.settings.to_dict())
    write_json(run.folder / "training.json", {"seconds": seconds})
    run.adapter.mkdir(exist_ok=True)
    write_json(run.scores_file(str(cell.settings.task)), {"accuracy": accuracy, "seconds": seconds, "examples": []})
    return run


def fail(folder: Path, cell: Cell, diverged: bool = False) -> None:
    """Leaves the record of a cell that failed."""
    write_json(
        folder / results.FAILED / f"{cell.key}.json", {"reason": "No memory.", "attempts": 3, "diverged": diverged}
    )
