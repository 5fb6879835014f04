"""Splitting and joining folders that are broken, on disks that fail, in processes that are killed."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from fuzzed_folders import CASES, CONFIG, WEIGHTS, adapted_model, base_model, broken_copy
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trl_steer.adapter_commands import join, split
from trl_steer.tuners.joint_steering import folders, join_adapters, split_adapter

UP_PROJ = "base_model.model.model.layers.0.mlp.up_proj"
JOINT = [case for case in CASES if case.startswith("joint")]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A joint folder of each case and its halves, made when they are asked for."""
    root = tmp_path_factory.mktemp("good")

    def case_folder(case):
        if not (root / case).exists():
            adapted_model(case, seed=3).save_pretrained(root / case / "joint")
            split_adapter(root / case / "joint", root / case / "lora", root / case / "steering")
        return root / case

    return case_folder


def split_to(folder, out):
    return split([str(folder), "--lora", str(out / "lora"), "--steering", str(out / "steering")])


def join_to(lora, steering, out):
    return join(["--lora", str(lora), "--steering", str(steering), str(out / "joint")])


def run(which, broken, halves, out):
    if which == "joint":
        return split_to(broken, out)
    parts = {"lora": halves / "lora", "steering": halves / "steering", which: broken}
    return join_to(parts["lora"], parts["steering"], out)


def check(seeds, good, tmp_path, capsys):
    for seed in seeds:
        rng = random.Random(seed)
        case, which = rng.choice(JOINT), rng.choice(["joint", "joint", "lora", "steering"])
        halves, out = good(case), tmp_path / str(seed)
        out.mkdir()
        what = f"seed {seed}, {case}: {broken_copy(halves / which, tmp_path / 'broken', rng)}"
        capsys.readouterr()
        status = run(which, tmp_path / "broken", halves, out)
        error = capsys.readouterr().err
        expected = [] if status else ["lora", "steering"] if which == "joint" else ["joint"]
        assert sorted(path.name for path in out.iterdir()) == expected, what
        assert (status, error.count("\n")) in ((0, 0), (1, 1)), f"{what}: {error}"


def test_broken_folder_gives_both_halves_or_one_line(good, tmp_path, capsys):
    check(range(60), good, tmp_path, capsys)


@pytest.mark.slow
def test_many_broken_folders_give_both_halves_or_one_line(good, tmp_path, capsys):
    check(range(1000, 2000), good, tmp_path, capsys)


def drop(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


def change(name, edit):
    def edited(tensors):
        key = next(key for key in sorted(tensors) if name in key)
        return {**tensors, key: edit(tensors[key]).contiguous()}

    return edited


@pytest.mark.parametrize(
    ("case", "edit"),
    [
        ("joint", lambda tensors: {}),
        ("joint", drop("lora_steering")),
        ("joint", drop("layers.1.mlp.down_proj.lora_B")),
        ("joint", change("lora_B", lambda tensor: tensor * float("nan"))),
        ("joint", change("lora_B", lambda tensor: tensor[..., None])),
        ("joint", change("lora_A", lambda tensor: tensor[:-1])),
        ("joint", change("lora_A", lambda tensor: tensor.int())),
        ("joint", change(".up", lambda tensor: tensor.T)),
        ("joint", lambda tensors: {key.removeprefix("base_model.model."): t for key, t in tensors.items()}),
        (
            "joint",
            lambda tensors: {**tensors, "base_model.model.model.layers.0.mlp.up_proj.lora_A.x": tensors[max(tensors)]},
        ),
        ("joint DoRA", drop("layers.1.self_attn.q_proj.lora_magnitude_vector")),
    ],
)
def test_folder_that_cannot_be_loaded_cannot_be_split(case, edit, good, tmp_path, capsys):
    shutil.copytree(good(case) / "joint", tmp_path / "broken")
    tensors = {key: tensor.clone() for key, tensor in edit(load_file(tmp_path / "broken" / WEIGHTS)).items()}
    save_file(tensors, tmp_path / "broken" / WEIGHTS)
    with pytest.raises(ValueError, match=r"do not match|Can't read|it has no"):
        PeftModel.from_pretrained(base_model(case), tmp_path / "broken")
    (tmp_path / "out").mkdir()
    assert split_to(tmp_path / "broken", tmp_path / "out") == 1
    assert str(tmp_path / "broken") in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        *({"r": "x"}, {"r": 0}, {"rank_pattern": ["x"]}, {"alpha_pattern": 3}, {"lora_alpha": None}, {"bias": "x"}),
        *({"modules_to_save": 3}, {"revision": {}}, {"trainable_token_indices": "x"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["joint", "lora"])
def test_a_field_of_a_wrong_type_is_one_line(which, fields, good, tmp_path, capsys):
    halves = good("joint")
    shutil.copytree(halves / which, tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / CONFIG).read_text())
    (tmp_path / "broken" / CONFIG).write_text(json.dumps({**config, **fields}))
    (tmp_path / "out").mkdir()
    assert run(which, tmp_path / "broken", halves, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "broken") in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("failure", ["weights", "second weights", "rename", "second rename"])
def test_a_disk_that_fails_leaves_nothing_and_is_one_line(failure, good, tmp_path, capsys, monkeypatch):
    folder, calls = good("joint") / "joint", []  # written before anything fails

    def failing(function, error):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == (2 if failure.startswith("second") else 1):
                raise error
            return function(*args, **kwargs)

        return call

    if failure.endswith("weights"):
        full = SafetensorError("Error while serializing: No space left on device (os error 28)")
        monkeypatch.setattr(folders, "save_file", failing(save_file, full))
    else:
        monkeypatch.setattr(os, "rename", failing(os.rename, OSError(30, "Read-only file system")))
    (tmp_path / "out").mkdir()
    assert split_to(folder, tmp_path / "out") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_after_being_killed_at_any_moment_a_second_run_gives_the_undisturbed_result(good, tmp_path):
    halves, rng = good("joint"), random.Random(0)
    start = time.monotonic()
    split_adapter(halves / "joint", tmp_path / "lora", tmp_path / "steering")
    undisturbed = time.monotonic() - start
    for attempt in range(12):
        out = tmp_path / str(attempt)
        process = os.fork()
        if not process:
            try:
                split_adapter(halves / "joint", out / "lora", out / "steering")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 1.2 * undisturbed))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        split_adapter(halves / "joint", out / "lora", out / "steering")
        for half in ("lora", "steering"):
            found, expected = contents(out / half), contents(halves / half)
            configs = [json.loads(files.pop(CONFIG)) for files in (found, expected)]
            assert found == expected
            for name, value in configs[0].items():  # lists of names are sets, in any order
                assert (
                    sorted(value) == sorted(configs[1][name]) if isinstance(value, list) else value == configs[1][name]
                )
    join_adapters(halves / "lora", halves / "steering", tmp_path / "joint")
    assert contents(tmp_path / "joint")[WEIGHTS] == contents(halves / "joint")[WEIGHTS]
