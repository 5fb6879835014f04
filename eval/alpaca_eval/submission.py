"""What a submission to the leaderboard consists of, read back with the package's own code before it counts as done.

models_configs/<name>/configs.yaml, prompt.txt      how the outputs came about
results/<name>/model_outputs.json                   dataset, instruction, output, generator
results/<name>/<judge>/annotations.json             the judgements
leaderboard_row.csv, glm_weights_row.csv            one row each for the package's tables
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from trl_steer.files import new_folder, read_json, write_json, write_text

from . import judging, metrics, package
from .generation import SETTINGS
from .judges import LEADERBOARD
from .redaction import Redactor
from .reference import Reference
from .rows import Outputs

ROW, WEIGHTS_ROW = "leaderboard_row.csv", "glm_weights_row.csv"
MODE = "community"
TOLERANCE = 1e-6


class SubmissionError(ValueError):
    """There is nothing that could be submitted."""


def write(
    folder: Path,
    judged: Path,
    outputs: Outputs,
    reference: Reference,
    pretty_name: str | None = None,
    link: str | None = None,
    anyway: bool = False,
) -> Path:
    """Writes the submission of one judged model.

    Args:
        folder (`Path`): Is made; nothing may be there yet.
        judged (`Path`): What `judge` wrote.
        outputs (`Outputs`): The model's outputs.
        reference (`Reference`): The reference set, with the table for length control.
        pretty_name (`str`, *optional*), link (`str`, *optional*): For the leaderboard's page.
        anyway (`bool`, *optional*, defaults to `False`): Also if the result is not comparable with the leaderboard.

    Raises:
        SubmissionError: if the result is not comparable, the name is taken, or the package reads something else back.
    """
    result = read_json(judged / judging.RESULT)
    _refuse(folder, result, outputs, anyway)
    if not judging.is_about(judged, outputs):
        raise SubmissionError("the outputs have changed since they were judged; run `judge` again.")
    settings_file = judged.parent / SETTINGS
    settings = read_json(settings_file) if settings_file.is_file() else {}
    with package.quiet(Redactor()), new_folder(folder) as partial:
        _write_config(partial, result, settings, pretty_name, link)
        _write_results(partial, judged, result, outputs, reference)
        _write_rows(partial, judged, result)
        write_text(partial / "README.md", _readme(result))
        check(partial, result, outputs, reference)
    return folder


def _refuse(folder: Path, result: dict[str, Any], outputs: Outputs, anyway: bool) -> None:
    name = result["name"]
    if folder.exists():
        raise SubmissionError(f"{folder} exists; name a new --output.")
    if name != outputs.generator:
        raise SubmissionError(f"the result is of {name!r} and the outputs are of {outputs.generator!r}.")
    if "/" in name or name.startswith("."):
        raise SubmissionError(f"{name!r} names folders in a submission, and cannot; generate with another --name.")
    if name in _leaderboard().index:
        raise SubmissionError(
            f"{name!r} is on the leaderboard already, which would silently skip it; generate with another --name."
        )
    lacking = [name for name in metrics.NUMBERS if result[name] is None]
    if lacking:
        raise SubmissionError(f"the result has no number for {', '.join(lacking)}.")
    if not result["comparable"] and not anyway:
        raise SubmissionError(
            f"the result is not comparable with the leaderboard: {'; '.join(result['not_comparable_because'])}. "
            "To write the folder all the same, pass --not-comparable."
        )


def _leaderboard() -> Any:
    import pandas

    path = package.folder() / "leaderboards" / "data_AlpacaEval_2" / f"{LEADERBOARD}_leaderboard.csv"
    return pandas.read_csv(path, index_col=0)


def _write_config(
    folder: Path, result: dict[str, Any], settings: dict[str, Any], pretty_name: str | None, link: str | None
) -> None:
    """The package's description of a model. It is for people: the package merges adapters, which steering cannot."""
    import yaml

    name = result["name"]
    keywords = {
        "model_name": settings.get("model"),
        "adapters_name": settings.get("adapter"),
        "max_new_tokens": settings.get("max_new_tokens"),
        "temperature": settings.get("temperature"),
        "top_p": settings.get("top_p"),
        "do_sample": bool(settings.get("temperature")),
    }
    config = {
        "prompt_template": f"{name}/prompt.txt",
        "fn_completions": "huggingface_local_completions",
        "completions_kwargs": {key: value for key, value in keywords.items() if value is not None},
        "pretty_name": pretty_name or name,
        **({"link": link} if link else {}),
    }
    write_text(folder / "models_configs" / name / "configs.yaml", yaml.safe_dump({name: config}, sort_keys=False))
    write_text(folder / "models_configs" / name / "prompt.txt", settings.get("prompt_text") or "{instruction}")


def _write_results(folder: Path, judged: Path, result: dict[str, Any], outputs: Outputs, reference: Reference) -> None:
    results = folder / "results" / result["name"]
    write_json(
        results / "model_outputs.json",
        [
            {
                "dataset": reference.rows[row]["dataset"],
                "instruction": reference.rows[row]["instruction"],
                "output": output,
                "generator": outputs.generator,
            }
            for row, output in outputs.by_row.items()
        ],
    )
    target = results / _judge_folder(result)
    target.mkdir(parents=True)
    shutil.copy(judged / judging.ANNOTATIONS, target / judging.ANNOTATIONS)


def _judge_folder(result: dict[str, Any]) -> str:
    judge = result["judge"]
    return judge["name"] if judge["shipped"] else f"{judge['name']}--{judge['fingerprint']}"


def _write_rows(folder: Path, judged: Path, result: dict[str, Any]) -> None:
    import pandas

    columns = list(_leaderboard().columns)
    row = {name: {**result, "mode": MODE}[name] for name in columns}
    pandas.DataFrame([row], index=[result["name"]], columns=columns).to_csv(folder / ROW)
    (weights,) = (judged / judging.WEIGHTS).glob("*/baseline_*.csv")
    shutil.copy(weights, folder / WEIGHTS_ROW)


def check(folder: Path, result: dict[str, Any], outputs: Outputs, reference: Reference) -> None:
    """Reads a submission back as the package would.

    Raises:
        SubmissionError: if it reads something else than was written, or other numbers come out.
    """
    utils, name = package.load().utils, result["name"]
    configs = folder / "models_configs"
    config = utils.load_configs(configs / name)[name]
    template = utils.read_or_return(config["prompt_template"], relative_to=configs)
    read = utils.load_or_convert_to_dataframe(folder / "results" / name / "model_outputs.json", dtype=False)
    prompts, _ = utils.make_prompts(read, template)
    annotations = utils.load_or_convert_to_dataframe(
        folder / "results" / name / _judge_folder(result) / judging.ANNOTATIONS, dtype=False
    )
    board, _ = utils.get_precomputed_leaderboard(folder / ROW, None, None)
    weights = utils.load_or_convert_to_dataframe(folder / WEIGHTS_ROW)
    agreed = {
        "name of the outputs": utils.get_generator_name(None, read) == name,
        "outputs": read["output"].tolist() == list(outputs.by_row.values()),
        "prompt": all(text in prompt for text, prompt in zip(read["instruction"], prompts, strict=True)),
        "leaderboard row": board.keys() == {name},
        "GLM weights": list(weights.index) == [name],
        **_recomputed(annotations, result, board.get(name, {}), reference),
    }
    wrong = [what for what, agrees in agreed.items() if not agrees]
    if wrong:
        raise SubmissionError(f"the package reads something else back: {', '.join(wrong)}. Nothing was written.")


def _recomputed(
    annotations: Any, result: dict[str, Any], row: dict[str, Any], reference: Reference
) -> dict[str, bool]:
    assert reference.gamed is not None
    with tempfile.TemporaryDirectory() as scratch:
        again = metrics.compute(annotations.set_index("row").rename_axis(None), reference.gamed, Path(scratch))
    return {
        name: math.isclose(again[name], result[name], abs_tol=TOLERANCE)
        and math.isclose(again[name], row.get(name, math.nan), abs_tol=TOLERANCE)
        for name in (*metrics.NUMBERS, *metrics.COUNTS, "avg_length")
    }


def _readme(result: dict[str, Any]) -> str:
    judge = result["judge"]["name"]
    baseline = f"metrics/weights/{judge}/length_controlled_v1/baseline_{result['baseline']}.csv"
    lines = [
        f"# {result['name']} on AlpacaEval 2.0",
        "",
        "For a pull request to tatsu-lab/alpaca_eval: `results/` goes to its `results/`, `models_configs/` to",
        f"`src/alpaca_eval/models_configs/`. The row of `{ROW}` joins",
        f"`src/alpaca_eval/leaderboards/data_AlpacaEval_2/{judge}_leaderboard.csv`, the row of `{WEIGHTS_ROW}`",
        f"`src/alpaca_eval/{baseline}`.",
        "",
        "```json",
        json.dumps({name: result[name] for name in (*metrics.NUMBERS, "n_total", "avg_length", "judge")}, indent=2),
        "```",
    ]
    if not result["comparable"]:
        lines += ["", "**Not comparable with the leaderboard:**", ""]
        lines += [f"- {reason}" for reason in result["not_comparable_because"]]
    return "\n".join(lines) + "\n"
