"""Generation: rows in canonical order, written down as they are finished, from a model here or behind an endpoint."""

import json
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from loopback_judge import KillAt, LoopbackJudge
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import PostBlockSteeringConfig
from trl_steer.eval.alpaca_eval import cli, generation
from trl_steer.eval.alpaca_eval.journal import Journal
from trl_steer.eval.alpaca_eval.local_model import LocalModel, Sampling

GREEDY = Sampling(max_new_tokens=6, temperature=0.0, top_p=1.0, seed=0)
SAMPLED = Sampling(max_new_tokens=6, temperature=1.0, top_p=0.95, seed=0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory) -> str:
    """A folder as TRL's scripts leave it: the adapter with its tokenizer, which names its base model."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(1)
    get_peft_model(base, PostBlockSteeringConfig(r=2, init_weights=False)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def generate(model: str, reference, output, *more: str) -> int:
    arguments = ["--model", model, "--reference", str(reference), "--output", str(output), "--max-new-tokens", "6"]
    return cli.main(["generate", *arguments, "--batch-size", "4", *more])


def written(folder) -> list[dict]:
    return json.loads((folder / "model_outputs.json").read_text())


def test_outputs_are_in_canonical_order_and_a_batch_answers_as_single_prompts(
    model_folder, reference_folder, tmp_path
):
    assert generate(model_folder, reference_folder, tmp_path / "run", "--limit", "10", "--device", "cpu") == 0
    baseline = json.loads((reference_folder / "alpaca_eval_gpt4_baseline.json").read_text())[:10]
    outputs = written(tmp_path / "run")
    for column in ("instruction", "dataset"):
        assert [row[column] for row in outputs] == [row[column] for row in baseline]
    assert {row["generator"] for row in outputs} == {"run"}
    model = LocalModel(model_folder, None, "auto", GREEDY, device="cpu")
    singly = [model.answer([row["instruction"]])[0].text for row in baseline]
    assert [row["output"] for row in outputs] == singly
    assert len(set(singly)) > 1


def test_an_adapter_steers_and_its_folder_names_its_base(model_folder, adapter_folder, reference_folder, tmp_path):
    runs = {"base": [model_folder], "named": [adapter_folder], "on_top": [model_folder, "--adapter", adapter_folder]}
    for name, (model, *more) in runs.items():
        assert generate(model, reference_folder, tmp_path / name, "--limit", "4", "--device", "cpu", *more) == 0
    texts = {name: [row["output"] for row in written(tmp_path / name)] for name in runs}
    assert texts["named"] == texts["on_top"] != texts["base"]
    settings = json.loads((tmp_path / "named" / "generation.json").read_text())
    base = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert (settings["model"], settings["adapter"]) == (model_folder, adapter_folder)
    assert settings["parameters"] == {"base": base, "adapter": 2 * 2 * 2 * 32}


@pytest.mark.parametrize("config", [PostBlockSteeringConfig, LoraConfig])
def test_an_adapter_that_was_trained_with_new_tokens_is_loaded_with_them(config, model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    base, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    base.resize_token_embeddings(len(tokenizer))
    get_peft_model(base, config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = LocalModel(str(tmp_path), None, "alpaca", GREEDY, device="cpu")
    assert model.model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert len(model.answer(["Use <tool>."])) == 1


def test_the_prompt_is_the_chat_template_or_alpacas(model_folder):
    chat = LocalModel(model_folder, None, "auto", GREEDY, device="cpu")
    assert chat.text("Sing.") == "<|im_start|>user\nSing.<|im_end|>\n<|im_start|>assistant\n"
    text = LocalModel(model_folder, None, "alpaca", GREEDY, device="cpu").text("Sing.")
    assert text.endswith("### Instruction:\nSing.\n\n### Response:\n")
    assert "### Input" not in text


def test_sampling_repeats_for_a_seed_also_after_an_interruption(model_folder, reference_folder, tmp_path):
    rows = json.loads((reference_folder / "alpaca_eval_gpt4_baseline.json").read_text())

    def run(folder, seed=0, fail_at=None):
        calls = []
        model = LocalModel(model_folder, None, "chat", Sampling(6, 1.0, 0.95, seed), device="cpu")

        def answer(batch):
            calls.append(batch)
            if len(calls) == fail_at:
                raise RuntimeError("out of memory")
            return model.answer(batch)

        generation.generate(folder, rows, range(12), "m", answer, batch_size=4)
        return calls

    assert len(run(tmp_path / "whole")) == 3
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "cut", fail_at=3)
    assert not (tmp_path / "cut" / "model_outputs.json").exists()
    assert len(run(tmp_path / "cut")) == 1
    run(tmp_path / "other", seed=1)
    assert written(tmp_path / "cut") == written(tmp_path / "whole") != written(tmp_path / "other")
    assert run(tmp_path / "whole") == []


def test_outputs_of_other_settings_are_not_mixed(model_folder, reference_folder, tmp_path, capsys):
    assert generate(model_folder, reference_folder, tmp_path / "run", "--limit", "2", "--device", "cpu") == 0
    assert generate(model_folder, reference_folder, tmp_path / "run", "--device", "cpu", "--seed", "5") == 2
    assert "other settings (seed 0, now 5)" in capsys.readouterr().err


def test_outputs_of_an_adapter_that_was_trained_anew_are_not_mixed(adapter_folder, reference_folder, tmp_path, capsys):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    arguments = (str(folder), reference_folder, tmp_path / "run", "--device", "cpu")
    assert generate(*arguments, "--limit", "2") == 0
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    assert generate(*arguments) == 2
    assert "other settings (weights" in capsys.readouterr().err


def test_outputs_of_an_adapter_with_another_scaling_are_not_mixed(adapter_folder, reference_folder, tmp_path, capsys):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    arguments = (str(folder), reference_folder, tmp_path / "run", "--device", "cpu")
    assert generate(*arguments, "--limit", "2") == 0
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "scaling": 0.0}))
    assert generate(*arguments) == 2
    assert "other settings (weights" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_generation_config_of_the_model_is_ignored(model_folder, sampling, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    theirs = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3, "suppress_tokens": [5, 6, 7]}
    (folder / "generation_config.json").write_text(json.dumps({**config, **theirs, "typical_p": 0.2}))
    texts = [
        LocalModel(str(path), None, "auto", sampling, device="cpu").answer(["Sing.", "Count to three."])
        for path in (model_folder, folder)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "x", "--endpoint", "http://localhost:1/v1"], "Load the adapter in the server"),
        (["--endpoint", "localhost"], "must be a URL"),
        (["--limit", "0"], None),
    ],
)
def test_invalid_generate_arguments_are_one_line(reference_folder, tmp_path, capsys, arguments, said):
    if said is None:
        with pytest.raises(SystemExit, match="2"):
            generate("m", reference_folder, tmp_path / "run", *arguments)
        return
    assert generate("m", reference_folder, tmp_path / "run", *arguments) == 2
    assert said in capsys.readouterr().err


def test_folder_without_a_model_is_an_error(reference_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert generate(str(tmp_path / "empty"), reference_folder, tmp_path / "run") == 2
    assert "neither config.json nor adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["chat", "alpaca"])
def test_outputs_of_an_endpoint_are_its_answers(reference_folder, tmp_path, judge, form):
    output = tmp_path / "served"
    assert generate("m", reference_folder, output, "--endpoint", judge.url, "--prompt", form, "--name", "served") == 0
    assert judge.requests == 24
    last_line = "### Response:" if form == "alpaca" else None
    for row in written(output):
        assert row["output"] == f"An answer to: {last_line or row['instruction']}"
        assert row["generator"] == "served"
    assert generate("m", reference_folder, output, "--endpoint", judge.url, "--prompt", form, "--name", "served") == 0
    assert judge.requests == 24


def test_only_rows_that_failed_are_requested_again(reference_folder, tmp_path, capsys):
    def fault(number, instruction):
        return "500" if instruction.endswith("number 3.") and broken.is_set() else None

    broken = threading.Event()
    broken.set()
    with LoopbackJudge(fault) as server:
        more = ("--endpoint", server.url, "--retries", "0")
        assert generate("m", reference_folder, tmp_path / "run", *more) == 1
        assert "1 of 24 rows have no output (1 times: " in capsys.readouterr().err
        broken.clear()
        assert generate("m", reference_folder, tmp_path / "run", *more) == 0
        assert sorted(server.asked.values()) == [1] * 23 + [2]


def test_a_killed_run_goes_on_where_it_was(reference_folder, tmp_path):
    kill = KillAt(10)
    output = tmp_path / "run"
    with LoopbackJudge(kill) as server:
        arguments = ["--model", "m", "--reference", str(reference_folder), "--output", str(output), "--in-flight", "2"]
        arguments = ["generate", *arguments, "--endpoint", server.url]
        kill.process = subprocess.Popen([sys.executable, "-m", "trl_steer.cli", "alpaca-eval", *arguments])
        assert kill.process.wait(timeout=120) == -signal.SIGKILL
        finished = len(Journal(output / "progress.jsonl").read())
        assert 9 <= finished < 24
        before = server.requests
        assert cli.main(arguments) == 0
        assert server.requests - before == 24 - finished
    assert len(written(output)) == 24


@pytest.mark.parametrize("in_flight", ["1", "4"])
def test_row_refused_by_the_server_does_not_stop_the_others(reference_folder, tmp_path, in_flight, capsys):
    rows = json.loads((reference_folder / "alpaca_eval_gpt4_baseline.json").read_text())
    longest = max((row["instruction"] for row in rows), key=len)
    with LoopbackJudge(lambda number, instruction: "400" if longest in instruction else None) as server:
        more = ("--endpoint", server.url, "--in-flight", in_flight)
        assert generate("served", reference_folder, tmp_path / "run", *more) == 1
        assert "1 of 24 rows have no output" in capsys.readouterr().err
        assert server.requests == 24
        server.fault = lambda number, instruction: None
        assert generate("served", reference_folder, tmp_path / "run", *more) == 0
        assert server.requests == 25
    assert len(written(tmp_path / "run")) == 24


def test_settings_that_gave_no_output_may_be_corrected(reference_folder, tmp_path):
    with LoopbackJudge(lambda number, instruction: "400") as server:
        more = ("--endpoint", server.url, "--limit", "2")
        assert generate("misspelt", reference_folder, tmp_path / "run", *more) == 1
        server.fault = lambda number, instruction: None
        assert generate("right", reference_folder, tmp_path / "run", *more) == 0
        assert generate("another", reference_folder, tmp_path / "run", *more) == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", "0"),
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--timeout", "nan"),
        ("--limit", "x"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_anything_is_loaded(reference_folder, tmp_path, option, value):
    with pytest.raises(SystemExit, match="2"):
        generate("nowhere", reference_folder, tmp_path / "run", option, value)
    assert not (tmp_path / "run").exists()
