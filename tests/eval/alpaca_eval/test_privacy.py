"""Keys appear nowhere, and site-packages stays as it is."""

import hashlib
import json
import logging
import os
from pathlib import Path

import alpaca_judging
import pytest
from loopback_judge import LoopbackJudge

from trl_steer.eval.alpaca_eval import cli, upstream

KEY = "sk-loopback-5f0c2d1e9b7a4c3d"


@pytest.mark.parametrize("fault", [None, "rejected_key", "500"])
def test_the_key_is_sent_and_never_written_or_shown(outputs, reference_folder, fault, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    with LoopbackJudge(lambda number, instruction: fault if number >= 2 else None) as server:
        alpaca_judging.judge(outputs, reference_folder, server.url, "--in-flight", "1", "--retries", "1")
        assert server.keys == {KEY}
    shown = capfd.readouterr()
    said = [shown.out, shown.err, caplog.text, *(str(vars(record)) for record in caplog.records)]
    assert not [text for text in said if KEY in text]
    files = [path for path in outputs.parent.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("fault", [None, "rejected_key"])
def test_generation_does_not_write_or_show_the_key_either(reference_folder, tmp_path, fault, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    with LoopbackJudge(lambda number, instruction: fault) as server:
        arguments = ["--model", "m", "--reference", str(reference_folder), "--output", str(tmp_path / "run")]
        cli.main(["generate", *arguments, "--endpoint", server.url, "--in-flight", "1", "--limit", "3"])
        assert server.keys == {KEY}
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err + caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_key_in_a_yaml_file_is_refused(outputs, reference_folder, judge, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(f"mine:\n  completions_kwargs:\n    model_name: m\n    client_kwargs:\n      api_key: {KEY}\n")
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, "--judge", str(config)) == 2
    shown = capsys.readouterr().err
    assert "environment variable" in shown
    assert KEY not in shown


@pytest.mark.parametrize(
    "settings",
    [
        "client_kwargs: {default_headers: {Authorization: Bearer KEY}}",
        "client_kwargs: {default_query: {code: KEY}}",
        "extra_headers: {x: KEY}",
        "apikey: KEY",
        "api-key: KEY",
        "auth_token: KEY",
        "several: [{api_key: KEY}]",
        "client_kwargs: {base_url: 'http://user:KEY@localhost/v1'}",
        'api_key: "KEY',
        "api_key: KEY: x",
    ],
)
def test_wherever_a_yaml_file_holds_a_key_it_is_refused_and_not_shown(
    settings, outputs, reference_folder, judge, tmp_path, capsys
):
    config = tmp_path / "mine.yaml"
    config.write_text(f"mine:\n  completions_kwargs:\n    model_name: m\n    {settings.replace('KEY', KEY)}\n")
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, "--judge", str(config)) == 2
    assert KEY not in capsys.readouterr().err
    assert not (outputs.parent / "cache").exists()
    assert judge.requests == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key-env", KEY],
        ["--endpoint", f"user:{KEY}@localhost/v1"],
        ["--endpoint", KEY],
        ["--endpoint", f"http://localhost/v1#{KEY}"],
        ["--endpoint", f"http://localhost/v1;key={KEY}"],
    ],
)
def test_a_key_in_the_wrong_place_on_the_command_line_is_not_shown(
    arguments, outputs, reference_folder, judge, capsys
):
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, *arguments) == 2
    assert KEY not in capsys.readouterr().err
    assert judge.requests == 0


@pytest.mark.parametrize("said", ["pebble", "\ud83d", "sk-loopback"])
def test_answers_are_stored_unchanged(reference_folder, tmp_path, monkeypatch, said):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-loopback")
    monkeypatch.setenv("POSTGRES_PASSWORD", "pebble")
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    with LoopbackJudge(lambda number, instruction: {"choices": [choice]}) as server:
        arguments = ["--model", "m", "--reference", str(reference_folder), "--output", str(tmp_path / "run")]
        assert cli.main(["generate", *arguments, "--endpoint", server.url, "--limit", "3"]) == 0
    rows = json.loads((tmp_path / "run" / "model_outputs.json").read_text())
    assert [row["output"] for row in rows] == [said] * 3


def tree(folder: Path) -> dict[str, tuple]:
    """Size and time of writing of every file, and the content of the package's own."""
    found: dict[str, tuple] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            status = os.stat(os.path.join(place, name), follow_symlinks=False)
            found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns)
    for path in upstream.folder().rglob("*"):
        if str(path) in found:
            found[str(path)] += (hashlib.sha256(path.read_bytes()).hexdigest(),)
    return found


def test_nothing_is_written_into_site_packages(outputs, reference_folder, judge, tmp_path):
    site_packages = upstream.folder().parent
    before = tree(site_packages)
    assert str(upstream.folder() / "main.py") in before
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    submit = ["submit", str(outputs.parent / "judged"), "--reference", str(reference_folder)]
    assert cli.main([*submit, "--output", str(tmp_path / "submission"), "--not-comparable"]) == 0
    assert tree(site_packages) == before


def test_white_space_around_a_key_is_not_sent(outputs, reference_folder, judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, "--limit", "2") == 0
    assert judge.keys == {KEY}


def test_key_invalid_in_a_header_is_an_error_before_the_first_call(
    outputs, reference_folder, judge, monkeypatch, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-é-0123456789")
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 2
    shown = capsys.readouterr().err
    assert "not allowed in an HTTP header" in shown
    assert "0123456789" not in shown
    assert judge.requests == 0
