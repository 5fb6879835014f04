"""`trl-steer export`: options, paths, what is written, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from saved_adapters import LOW_RANK, VECTOR, steer
from tiny_chat import tiny_model, tiny_tokenizer
from tiny_gguf import gguf_model, write_gguf

from trl_steer import cli
from trl_steer.integrations.export.cli import FORMATS
from trl_steer.integrations.llama_cpp.gguf_file import BaseFile


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a base model and adapters, which is the working directory."""
    model = gguf_model()
    write_gguf(model, tmp_path / "base.gguf")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    steer(model, VECTOR, tmp_path / "vector")
    steer(gguf_model(), LOW_RANK, tmp_path / "low_rank")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> int:
    try:
        return cli.main(["export", *line.split()])
    except SystemExit as end:
        return end.code


def test_gguf_is_written_and_said_in_one_line(folder, capsys):
    assert run("vector --format gguf --base base.gguf --output out/steered.gguf") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Wrote out/steered.gguf: architecture llama, ")
    assert "blk.2.ffn_down.bias" in BaseFile(folder / "out" / "steered.gguf").tensors
    assert [file.name for file in (folder / "out").iterdir()] == ["steered.gguf"]


def test_check_writes_nothing(folder, capsys):
    assert run("low_rank --format gguf --base base.gguf --output out.gguf") == 0
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert run("low_rank --format gguf --base base.gguf --check out.gguf") == 0
    assert capsys.readouterr().out.startswith("out.gguf is fine: the largest norm on ")
    assert sorted(folder.rglob("*")) == before
    (folder / "config").mkdir()
    settings = json.loads((folder / "low_rank" / "adapter_config.json").read_text())
    (folder / "low_rank" / "adapter_config.json").write_text(json.dumps({**settings, "scaling": 300.0}))
    assert run("low_rank --format gguf --base base.gguf --check out.gguf") == 1
    assert "times as large. Export the adapter again" in capsys.readouterr().err.splitlines()[-1]


def test_existing_output_is_kept_without_overwrite(folder, capsys):
    (folder / "out.gguf").write_text("mine")
    command = "vector --format gguf --base base.gguf --output out.gguf"
    assert run(command) == 1
    assert capsys.readouterr().err == (
        "trl-steer export: error: out.gguf exists. Choose another --output, or replace it with --overwrite.\n"
    )
    assert (folder / "out.gguf").read_text() == "mine"
    assert run(f"{command} --overwrite") == 0
    assert BaseFile(folder / "out.gguf").architecture == "llama"


def test_an_exported_folder_is_replaced_and_no_other_one(folder, capsys):
    (folder / "other").mkdir()
    (folder / "other" / "mine").touch()
    command = "low_rank --format lora --output"
    assert run(f"{command} lora") == 0
    (folder / "lora" / "stale").touch()
    assert run(f"{command} lora") == 1
    assert run(f"{command} lora --overwrite") == 0
    assert sorted(file.name for file in (folder / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert run(f"{command} other --overwrite") == 1
    assert "other is not a folder that was exported" in capsys.readouterr().err
    assert (folder / "other" / "mine").exists()
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]


def test_the_base_model_and_the_adapter_are_never_replaced(folder, capsys):
    before = (folder / "base.gguf").read_bytes()
    assert run("vector --format gguf --base base.gguf --output base.gguf --overwrite") == 1
    assert "base.gguf is the base model" in capsys.readouterr().err
    assert run("vector --format transformers --base base --output base --overwrite") == 1
    assert run("low_rank --format lora --output low_rank --overwrite") == 1
    assert "low_rank is the adapter" in capsys.readouterr().err
    assert (folder / "base.gguf").read_bytes() == before
    assert (folder / "base" / "config.json").exists()


INVALID = {
    "no format": ("vector --output out", 2, "--format"),
    "unknown format": ("vector --format onnx --output out", 2, "invalid choice: 'onnx'"),
    "no base": ("vector --format gguf --output out", 2, "--format gguf needs --base"),
    "no output": ("vector --format lora", 2, "pass --output"),
    "both": ("vector --format gguf --base base.gguf --output out --check out", 2, "pass --output or --check"),
    "an option of another format": ("vector --format lora --calibration a --output out", 2, "--calibration cannot"),
    "no adapter": ("./nothing --format lora --output out", 1, "There is no folder ./nothing"),
    "no file": ("vector --format gguf --base b.gguf --output out", 1, "There is no file b.gguf"),
    "a model": ("base --format lora --output out", 1, "base is not the folder of a saved adapter"),
    "a folder for a file": ("vector --format gguf --base base.gguf --output base", 1, "base is a folder"),
    "a file for a folder": ("low_rank --format lora --output base.gguf", 1, "base.gguf is a file"),
    "not linear": ("vector --format lora --output out", 1, "vector is a vector adapter"),
    "block 0": ("vector --format gguf-control-vector --output out", 1, "steers block 0"),
}


@pytest.mark.parametrize("case", INVALID)
def test_errors_are_one_line(case, folder, capsys):
    line, status, message = INVALID[case]
    assert run(line) == status
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("trl-steer export: error: ")
    assert message in said[-1]
    assert len([words for words in said if "error" in words]) == 1
    assert not (folder / "out").exists()


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="steers block 0"):
        run("vector --format gguf-control-vector --output out --debug")


def test_help_names_every_format(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in FORMATS)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_nothing(folder):
    code = """
import os, signal, sys
from trl_steer import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
def hook(event, args):
    if event == "open" and str(args[0]).endswith(".partial"):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
sys.exit(cli.main(sys.argv[1:]))
"""
    line = "export vector --format gguf --base base.gguf --output out.gguf"
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.splitlines()[-1] == "trl-steer export: stopped. Nothing was written."
    assert "Traceback" not in done.stderr
    assert not [path for path in folder.iterdir() if "out" in path.name]


def test_base_of_a_checkpoint_is_by_default_that_of_the_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    steer(type(model).from_pretrained("base"), LOW_RANK, tmp_path / "low_rank")
    assert run("low_rank --format transformers --output out") == 0
    assert capsys.readouterr().out.startswith("Wrote out, with its code in modeling_steered.py")
    assert (tmp_path / "out" / "config.json").exists()
    assert run("low_rank --format transformers --output base --overwrite") == 1
    assert "base is the base model" in capsys.readouterr().err
