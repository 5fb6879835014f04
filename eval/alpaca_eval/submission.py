"""A submission to the leaderboard:

models_configs/<name>/configs.yaml, prompt.txt      settings of the generation
results/<name>/model_outputs.json                   dataset, instruction, output, generator
results/<name>/<judge>/annotations.json             the judgements
leaderboard_row.csv, glm_weights_row.csv            one row each for the package's tables
"""

import shutil
from pathlib import Path
from typing import Any

from trl_steer.files import new_folder, read_json, write_json, write_text

from . import judging, upstream
from .generation import SETTINGS
from .judges import LEADERBOARD
from .reference import OUTPUTS, Outputs, Reference

ROW, WEIGHTS_ROW = "leaderboard_row.csv", "glm_weights_row.csv"


def check(folder: Path, judged: Path, anyway: bool = False) -> dict[str, Any]:
    """The result in the folder `judged`.

    Raises:
        ValueError: It cannot be submitted, or `folder` exists.
    """
    if not (judged / judging.RESULT).is_file():
        raise ValueError(f"{judged} has no {judging.RESULT}. Pass a folder written by `judge`.")
    if folder.exists():
        raise ValueError(f"{folder} exists. Choose another --output.")
    result = read_json(judged / judging.RESULT)
    name = result["name"]
    if "/" in name or name.startswith(".") or name in _leaderboard().index:
        raise ValueError(
            f"{name!r} is already on the leaderboard, or is not a name of a folder. Generate with another --name."
        )
    if None in [result[name] for name in judging.NUMBERS]:
        raise ValueError(f"The result has NaN among {', '.join(judging.NUMBERS)}. Judge more rows.")
    if not result["comparable"] and not anyway:
        raise ValueError(
            f"The result is not comparable with the leaderboard: {'; '.join(result['not_comparable_because'])}. "
            "Pass --not-comparable to write it anyway."
        )
    return result


def write(folder: Path, judged: Path, result: dict[str, Any], outputs: Outputs, reference: Reference) -> None:
    """Writes a submission to a new folder.

    Raises:
        ValueError: The outputs have changed since they were judged.
    """
    import pandas

    name, judge = result["name"], result["judge"]
    if name != outputs.generator or not judging.is_about(judged, outputs):
        raise ValueError("The outputs have changed since they were judged. Run `judge` again.")
    settings = judged.resolve().parent / SETTINGS
    with new_folder(folder) as partial:
        _write_config(partial / "models_configs" / name, name, read_json(settings) if settings.is_file() else {})
        rows = [{**reference.rows[row], "output": output, "generator": name} for row, output in outputs.by_row.items()]
        write_json(partial / "results" / name / OUTPUTS, rows)
        annotations = partial / "results" / name / (judge["name"] if judge["shipped"] else judged.name)
        annotations.mkdir()
        shutil.copy(judged / judging.ANNOTATIONS, annotations)
        columns = _leaderboard().columns
        pandas.DataFrame([{**result, "mode": "community"}], index=[name], columns=columns).to_csv(partial / ROW)
        (weights,) = (judged / judging.WEIGHTS).glob("*/baseline_*.csv")
        shutil.copy(weights, partial / WEIGHTS_ROW)


def _leaderboard() -> Any:
    import pandas

    path = upstream.folder() / "leaderboards" / "data_AlpacaEval_2" / f"{LEADERBOARD}_leaderboard.csv"
    return pandas.read_csv(path, index_col=0)


def _write_config(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Writes the package's configuration of a model. The package cannot use it, since it would merge the adapter."""
    import yaml

    names = {"model": "model_name", "adapter": "adapters_name"}
    taken = ("model", "adapter", "max_new_tokens", "temperature", "top_p")
    config = {
        "prompt_template": f"{name}/prompt.txt",
        "fn_completions": "openai_completions" if settings.get("endpoint") else "huggingface_local_completions",
        "completions_kwargs": {names.get(key, key): settings[key] for key in taken if settings.get(key) is not None},
        "pretty_name": name,
    }
    write_text(folder / "configs.yaml", yaml.safe_dump({name: config}, sort_keys=False))
    # For a served chat model, the prompt is the instruction.
    write_text(folder / "prompt.txt", settings.get("prompt") or "{instruction}")
