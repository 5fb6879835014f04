"""`trl-steer analyze`: every measure runs on a saved model and writes its three files, and errors are one line."""

import importlib
import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig
from trl_steer.cli import main
from trl_steer.eval.analysis.cli import MEASURES

TEXTS = ["[MAX 1 2 [MIN 3 4 ] ]", "The quick brown fox.", "Hello!"]
CONFIGS = {
    "low_rank": PostBlockSteeringConfig(task_type="CAUSAL_LM", r=2, init_weights=False),
    "vector": PostBlockSteeringConfig(task_type="CAUSAL_LM", steering_type="vector", init_weights=False),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"], init_lora_weights=False),
    "joint": JointSteeringConfig(task_type="CAUSAL_LM", r=2, steering={"r": 2, "init_weights": False}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model, adapters, another model and texts."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in (("model", tiny_model()), ("other", tiny_model(num_hidden_layers=3))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tuned = tiny_model(seed=1)
    tuned.save_pretrained(folder / "tuned")
    tiny_tokenizer().save_pretrained(folder / "tuned")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter)
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        model.save_pretrained(folder / name)
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    rows = [{"prompt": text, "completion": " done"} for text in TEXTS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answer = {"role": "assistant", "content": "Yes."}
    chats = [{"messages": [{"role": "user", "content": text}, answer]} for text in TEXTS]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "empty.txt").write_text("\n")
    return folder


@pytest.fixture(autouse=True)
def _in_folder(saved, tmp_path, monkeypatch):
    """The working directory, with links to what is saved."""
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


COMMANDS = {
    "mlp-share": "--model model --text rows.jsonl --prompts_only",
    "subspace-alignment": "--model model --tuned tuned --text texts.txt --k 4 --target shift",
    "shift-similarity": "--adapter joint --text texts.txt",
    "adapter-norms": "low_rank joint lora vector",
    "inspect": "joint",
    "drift": "--adapter low_rank lora --text chats.jsonl --scaling 0 1",
    "first-order": "--adapter lora --text texts.txt --blocks 1",
    "theorem-3.1": "--model model --text texts.txt",
    "proposition-4.2": "--seeds 2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_measure_writes_numbers_a_summary_and_a_picture(name, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("trl_steer.analysis.proposition_4_2"), "STEPS", 10)
    argv = ["analyze", name, *COMMANDS[name].split(), "--output", "out"]
    assert main(argv) == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    stem = MEASURES[name][0]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{stem}.json", f"{stem}.md", f"{stem}.png"}
    results = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert results["command"] == "trl-steer " + " ".join(argv)
    summary = (tmp_path / "out" / f"{stem}.md").read_text()
    assert f"`{results['command']}`" in summary
    assert f"({stem}.png)" in summary
    assert (tmp_path / "out" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"\b(\d+) of \1\b", shown)
    assert str(tmp_path) not in json.dumps(results).replace(str(results.get("base_model")), "")


def test_an_adapter_is_compared_with_its_own_base(capsys, tmp_path):
    assert main(["analyze", "subspace-alignment", "--tuned", "low_rank", "--text", "texts.txt", "--k", "4"]) == 0
    found = json.loads((tmp_path / "analysis" / "subspace_alignment.json").read_text())
    assert [row["block"] for row in found["blocks"]] == [0, 1]


@pytest.mark.parametrize("adapter", ["low_rank", "lora"])
def test_an_adapter_on_a_model_that_it_does_not_name_is_noted(adapter, capfd):
    shutil.copytree("model", "copy")
    measure = ["analyze", "drift", "--adapter", adapter, "--text", "texts.txt", "--scaling", "1", "--model"]
    for model, is_noted in (("model", False), ("copy", True)):
        assert main([*measure, model]) == 0
        assert ("as its base model. It is loaded on" in capfd.readouterr().out) == is_noted


def test_the_same_command_gives_the_same_files(tmp_path):
    for _ in range(2):
        assert main(["analyze", "adapter-norms", "vector", "--output", "out"]) == 0
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == again


ERRORS = {
    "models of different shapes": (
        "subspace-alignment --model model --tuned other --text texts.txt",
        "The models have different shapes: the base model has blocks 2, hidden size 32, the fine-tuned one blocks 3",
    ),
    "a steering adapter of another base": (
        "drift --model other --adapter low_rank --text texts.txt",
        "low_rank is not an adapter of this base model",
    ),
    "a LoRA adapter of another base": (
        "drift --model other --adapter lora --text texts.txt",
        "lora is not an adapter of this base model",
    ),
    "no prompts": ("mlp-share --model model --text empty.txt", "empty.txt has no prompts"),
    "no file": ("mlp-share --model model --text none.txt", "There is no file none.txt"),
    "no model": ("mlp-share --text texts.txt", "Pass --model"),
    "a folder without an adapter": ("inspect model", "model is not the folder of a saved adapter"),
    "a block that does not exist": (
        "first-order --model model --text texts.txt --blocks 7",
        "There is no block 7: LlamaForCausalLM has blocks 0 to 1",
    ),
    "an adapter that is not joint": ("shift-similarity --adapter vector --text texts.txt", "Expected a joint adapter"),
    "too few tokens": ("theorem-3.1 --model model --text texts.txt --rows 1", "expected more than the hidden size 32"),
    "another kind of file": ("mlp-share --model model --text model/config.json", "Expected rows with one of the col"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_and_writes_nothing(case, capsys, tmp_path):
    command, said = ERRORS[case]
    before = sorted(tmp_path.iterdir())
    assert main(["analyze", *command.split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"trl-steer analyze {command.split()[0]}: error: ")
    assert said in line
    assert sorted(tmp_path.iterdir()) == before


def test_help_of_a_measure_imports_nothing_heavy(capsys):
    for name in MEASURES:
        with pytest.raises(SystemExit, match="0"):
            main(["analyze", name, "--help"])
        assert f"usage: trl-steer analyze {name}" in capsys.readouterr().out


def test_unknown_measures_name_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["analyze", "nothing"])
    assert "mlp-share" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_leaves_earlier_files(monkeypatch, tmp_path, capsys):
    assert main(["analyze", "adapter-norms", "vector", "--output", "out"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert main(["analyze", "adapter-norms", "low_rank", "--output", "out"]) == 1
    assert "disk full" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (KeyboardInterrupt(), 130, "trl-steer analyze inspect: stopped."),
        (AttributeError("'x' has no y"), 1, "error: 'x' has no y (--debug shows the traceback)"),
        (ValueError("pass\n another"), 1, "error: pass another"),
    ],
)
def test_interruptions_and_mistakes_of_the_program_are_one_line(error, status, printed, monkeypatch, capsys, tmp_path):
    def fail(*args):
        raise error

    monkeypatch.setattr("trl_steer.eval.analysis.inspection.run", fail)
    command = ["analyze", "inspect", "low_rank", "--output", "out"]
    assert main(command) == status
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(printed)
    assert not (tmp_path / "out").exists()
    with pytest.raises(type(error)) if status == 1 else nullcontext():
        main([*command, "--debug"])
