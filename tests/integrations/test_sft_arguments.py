"""The arguments of `trl-steer sft`: read once, checked before anything heavy is imported, and helped with."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

import trl_steer.integrations
from trl_steer import JointOrthSFTConfig, presets
from trl_steer.integrations.trl import sft
from trl_steer.integrations.trl.arguments import SteeringArguments, read
from trl_steer.integrations.trl.checks import check_paths
from trl_steer.integrations.trl.help import dry_run
from trl_steer.integrations.trl.source_arguments import ArgumentError

RECIPES = Path(trl_steer.integrations.__path__[0], "trl", "recipes")
NOTHING_HEAVY = (
    "import sys; from trl_steer.cli import main\n"
    "status = main(sys.argv[1:])\n"
    "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'lm_eval'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "sys.exit(status)\n"
)


def run_light(*argv, cwd=None):
    """The command in a process of its own, in which nothing heavy may be imported."""
    return subprocess.run([sys.executable, "-c", NOTHING_HEAVY, *argv], capture_output=True, text=True, cwd=cwd)


def test_help_shows_the_defaults_and_imports_nothing_heavy():
    ran = run_light("sft", "--help")
    assert ran.returncode == 0, ran.stderr
    for shown in ("--method", "--preset", "--steering_r", "learning_rate 0.002", "vector", "0.01", "steering_overlap"):
        assert shown in ran.stdout
    assert "--gradient_accumulation_steps" in ran.stdout  # TRL's


def test_help_of_joint_shows_the_rates_of_joint():
    ran = run_light("joint", "--help")
    assert "(default: joint_orth)" in ran.stdout
    assert "learning_rate 0.001, steering_learning_rate 0.002" in ran.stdout


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "no_model").mkdir()
    (tmp_path / "broken.yaml").write_text("method: low_rank\n  learning_rate: [\n")
    (tmp_path / "list.yaml").write_text("- method\n")
    (tmp_path / "mistyped.yaml").write_text("methd: vector\n")
    (tmp_path / "words.yaml").write_text("steering_r: many\n")
    (tmp_path / "good.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "mixture.yaml").write_text("datasets:\n- path: json\n  data_files: absent.jsonl\n")
    (tmp_path / "a_file").write_text("")
    return tmp_path


GOOD = ["--model_name_or_path", "model", "--output_dir", "out", "--dataset_name", "good.jsonl"]
WRONG = {
    "unknown argument": (["--learning_rat", "1"], ["--learning_rat", "did you mean learning_rate?"]),
    "unknown method": (["--method", "lowrank"], ["lowrank", "low_rank, vector"]),
    "unknown preset": (["--preset", "papr"], ["papr", "paper"]),
    "word for a number": (["--learning_rate", "fast"], ["learning_rate must be a number", "fast"]),
    "word for one of ours": (["--steering_r", "many"], ["steering_r must be an integer", "many"]),
    "no truth value": (["--bf16", "maybe"], ["bf16 must be true or false"]),
    "one word too many": (["vector"], ["dataset_name takes one value, got good.jsonl vector"]),
    "absent config": (["--config", "absent.yaml"], ["Can't read --config absent.yaml"]),
    "broken config": (["--config", "broken.yaml"], ["broken.yaml, line 2"]),
    "config without names": (["--config", "list.yaml"], ["list.yaml must contain arguments"]),
    "mistyped config": (["--config", "mistyped.yaml"], ["mistyped.yaml", "methd", "did you mean method?"]),
    "wrong value in config": (["--config", "words.yaml"], ["steering_r must be an integer"]),
    "LoRA for steering alone": (["--use_peft"], ["--method low_rank, which does not train LoRA", "--method lora"]),
    "LoRA's rank for steering": (["--lora_r", "4"], ["--lora_r 4", "--method low_rank, which does not train LoRA"]),
    "unknown task": (["--task", "booq"], ["no task 'booq'", "boolq"]),
    "no such model": (["--model_name_or_path", "./nowhere"], ["./nowhere", "There is no folder"]),
    "unknown model": (["--model_name_or_path", "nobody/nothing"], ["no model nobody/nothing on the Hub"]),
    "folder without a model": (["--model_name_or_path", "no_model"], ["no config.json"]),
    "no such data": (["--dataset_name", "absent.jsonl"], ["absent.jsonl", "there is no file"]),
    "malformed data": (["--dataset_name", "malformed.jsonl"], ["malformed.jsonl, line 2", "invalid JSON"]),
    "other columns": (["--dataset_name", "columns.jsonl"], ["columns.jsonl, line 1", "`prompt`", "question, answer"]),
    "no rows": (["--dataset_name", "empty.jsonl"], ["empty.jsonl has no rows"]),
    "absent file of a mixture": (["--config", "mixture.yaml"], ["no file absent.jsonl"]),
    "output in a file": (["--output_dir", "a_file/out"], ["Can't create --output_dir a_file/out"]),
    "rows": (["--task_rows", "0"], ["at least 1, got 0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_arguments_are_reported_before_anything_heavy_is_imported(case, folder):
    argv, said = WRONG[case]
    ran = run_light("sft", *GOOD, *argv, cwd=folder)
    assert ran.returncode == 2, ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    for text in said:
        assert text in ran.stderr
    assert ran.stderr.startswith("trl-steer sft: error: ")


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--dataset_name"])
def test_missing_argument_is_named(missing, folder):
    index = GOOD.index(missing)
    ran = run_light("sft", *GOOD[:index], *GOOD[index + 2 :], cwd=folder)
    assert ran.returncode == 2
    assert missing in ran.stderr


def dry_run_of(*argv) -> dict:
    ran = run_light("sft", *argv, "--dry-run")
    assert ran.returncode == 0, ran.stderr
    return yaml.safe_load(ran.stdout)


def test_dry_run_shows_the_settings_and_what_of_them_is_guessed():
    shown = dry_run_of("--preset", "paper", "--method", "low_rank", "--task", "gsm8k")
    assert (shown["learning_rate"], shown["num_train_epochs"], shown["steering_r"]) == (2e-3, 3.0, 8)
    assert "grid" in shown["guessed"]["learning_rate"]
    given = dry_run_of("--preset", "paper", "--task", "gsm8k", "--learning_rate", "3e-4")
    assert given["learning_rate"] == 3e-4
    assert "learning_rate" not in given["guessed"]


def test_the_command_line_goes_before_the_config_file_and_both_before_the_preset(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"method": "vector", "learning_rate": 0.25}))
    argv = ["--config", str(tmp_path / "recipe.yaml")]
    assert (dry_run_of(*argv)["method"], dry_run_of(*argv)["learning_rate"]) == ("vector", 0.25)
    assert dry_run_of(*argv, "--learning_rate", "0.125")["learning_rate"] == 0.125
    assert dry_run_of("--method", "vector")["learning_rate"] == 1e-2


# One with a script beside it is the script's.
@pytest.mark.parametrize(
    "recipe",
    sorted(path for path in RECIPES.glob("*.yaml") if not path.with_suffix(".py").exists()),
    ids=lambda path: path.stem,
)
def test_recipes_are_valid(recipe, tmp_path):
    argv = ["--config", str(recipe), "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    request = read(argv)
    parsed, options = sft.parse(request, argv)
    assert not options
    assert parsed[1].learning_rate == float(yaml.safe_load(recipe.read_text())["learning_rate"])


def test_every_argument_of_steering_reaches_the_configuration():
    argv = [
        *("--steering_r", "4", "--steering_activation", "silu", "--steering_scaling", "0.5"),
        *("--steering_dropout", "0.1", "--steering_init_scale", "0.01", "--steering_layers", "0", "2"),
    ]
    config = sft.peft_config(read(argv), None)
    assert (config.steering_type, config.r, config.activation) == ("low_rank", 4, "silu")
    assert (config.scaling, config.dropout, config.init_scale) == (0.5, 0.1, 0.01)
    assert config.layers_to_transform == [0, 2]
    sublayer = sft.peft_config(read(["--method", "sublayer", "--site", "pre_mlp", "--steering_type", "vector"]), None)
    assert (sublayer.site, sublayer.steering_type) == ("pre_mlp", "vector")
    loreft = sft.peft_config(read(["--method", "loreft", "--preset", "paper", "--steering_r", "4"]), None)
    assert (loreft.site, loreft.positions, loreft.r) == ("post_mlp", "last_prompt", 4)
    assert sft.peft_config(read(["--method", "loreft"]), None).site == "post_block"
    assert sft.peft_config(read(["--method", "jola", "--positions", "f7+l7"]), None).positions == "f7+l7"


@pytest.mark.parametrize(
    ("given", "rate"),
    [([], 5e-4), (["--site", "post_mlp"], 2e-3), (["--site", "post_mlp", "--learning_rate", "1e-3"], None)],
)
def test_loreft_has_the_rate_of_its_site(given, rate):
    assert read(["--method", "loreft", *given]).settings().values.get("learning_rate") == rate


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--method", "lofit", "--site", "pre_mlp"],
            "--site cannot be used with --method lofit, only with sublayer, loreft. Leave",
        ),
        (["--method", "sublayer", "--site", "post_block"], "--site post_block cannot be used"),
        (["--positions", "f7+l6"], "Expected positions to be"),
        (["--positions", "f7+l7", "--packing", "true"], "cannot be used with --packing"),
        (["--method", "loreft", "--preset", "paper", "--padding_free", "true"], "cannot be used with --padding_free"),
        (["--method", "lora", "--positions", "last_prompt"], "does not steer"),
        (["--method", "lora", "--init_from", "adapter"], "does not steer"),
    ],
)
def test_sites_and_positions_that_a_method_cannot_have_are_refused(argv, said):
    with pytest.raises(ArgumentError, match=re.escape(said)):
        read(argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "lora", "--steering_r", "4"], "--steering_r cannot be used with --method lora, which does not"),
        (["--method", "full", "--steering_layers", "0", "1"], "--steering_layers cannot be used with --method full"),
        (["--method", "vector", "--steering_activation", "silu"], "--steering_activation cannot be used"),
        (["--method", "loreft", "--steering_type", "vector"], "only with sublayer, joint, joint_orth. Leave it out."),
        (
            ["--method", "sublayer", "--steering_type", "vector", "--steering_r", "4"],
            "--steering_r cannot be used with --steering_type vector. Leave it out, or use --steering_type low_rank.",
        ),
        (["--method", "joint", "--orthogonal_every", "4"], "only with joint_orth"),
        (["--method", "lora", "--steering_learning_rate", "1e-3"], "does not steer"),
        (["--method", "joint", "--orthogonal", "true"], "It is true for --method joint_orth"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(argv, said, tmp_path):
    with pytest.raises(ArgumentError, match=re.escape(said)):
        read(argv)
    names = [word.removeprefix("--") for word in argv[::2]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dict(zip(names, argv[1::2], strict=False))))
    with pytest.raises(ArgumentError, match=re.escape(said)):
        read(["--config", str(tmp_path / "recipe.yaml")])


ADAPTER = {
    "low_rank": {"positions", "r", "activation", "scaling", "dropout", "init_scale", "layers"},
    "vector": {"positions", "scaling", "layers"},
    "sublayer": {"type", "site", "positions", "r", "activation", "scaling", "dropout", "init_scale", "layers"},
    "loreft": {"site", "positions", "r", "activation", "scaling", "dropout", "layers"},
    "lofit": {"positions", "scaling", "layers"},
    "jola": {"positions", "scaling", "layers"},
    "lora": set(),
    "joint": {"type", "positions", "r", "activation", "scaling", "dropout", "init_scale", "layers", "learning_rate"},
    "full": set(),
}


@pytest.mark.parametrize("method", ADAPTER)
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_dry_run_shows_what_the_method_has_and_nothing_else(method, preset):
    shown = yaml.safe_load(dry_run(read(["--method", method, "--preset", preset, "--task", "alpaca"])))
    ours = {name for name in shown if name.startswith("steering_") or name in ("site", "positions")}
    assert {name.removeprefix("steering_") for name in ours} == ADAPTER[method]
    assert shown["task"] == "alpaca"


@pytest.mark.parametrize("method", ["sublayer", "joint"])
def test_dry_run_of_vectors_shows_no_bottleneck(method):
    shown = yaml.safe_load(dry_run(read(["--method", method, "--preset", "paper", "--steering_type", "vector"])))
    assert shown["steering_type"] == "vector"
    assert not {"steering_r", "steering_init_scale"} & (shown.keys() | shown["guessed"].keys())


def test_every_option_of_ours_is_one_of_some_method_or_of_all():
    of_all = {"method", "preset", "dry_run", "train_end_token", "task"}
    own = {field.name for field in fields(SteeringArguments) if not field.name.startswith("task_")} - of_all
    of_joint = {field.name for field in fields(JointOrthSFTConfig)} - {field.name for field in fields(SFTConfig)}
    assert own | of_joint == presets.OPTIONS
    for method in presets.METHODS:
        assert presets.OPTIONS.issuperset(presets.options(method))


def test_every_json_line_is_checked(tmp_path):
    good = json.dumps({"text": "a"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(good * 2000 + "nonsense\n")
    argv = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path", "some/model"]
    with pytest.raises(ArgumentError, match="line 2001"):
        check_paths(read(argv).given)


@pytest.mark.parametrize("method", presets.METHODS)
@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_parses_without_a_device(preset, method, tmp_path):
    argv = ["--preset", preset, "--method", method, "--task", "alpaca", "--output_dir", str(tmp_path)]
    (_, training_args, *_), _ = sft.parse(read(argv), argv)
    assert training_args.use_cpu or training_args.n_gpu
