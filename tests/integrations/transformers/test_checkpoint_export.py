"""Checkpoints that transformers loads where this package is not installed."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_inputs
from model_zoo import tiny_model as zoo_model
from safetensors.torch import load_file, save_file
from saved_adapters import JOINT, LOW_RANK, SILU, VECTOR, logits_of, steer
from tiny_chat import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_steer import LofitConfig, LoReftConfig, PostBlockSteeringConfig, SublayerSteeringConfig
from trl_steer.integrations.export.progress import Progress
from trl_steer.integrations.transformers.export import CODE, export_checkpoint

HERE = Path(__file__).parent
GELU = PostBlockSteeringConfig(
    task_type="CAUSAL_LM",
    rank_pattern={"0": 5},
    layers_to_transform=[0, 2],
    r=2,
    init_weights=False,
    activation="gelu",
)
CODE_CASES = {
    "llama-low_rank": ("llama", LOW_RANK),
    "llama-joint": ("llama", JOINT),
    "mistral-silu": ("mistral", SILU),
    "qwen2-vector": ("qwen2", VECTOR),
    "qwen3-gelu": ("qwen3", GELU),
    "gemma3-low_rank": ("gemma3", LOW_RANK),
    "gpt2-silu": ("gpt2", SILU),
    "opt-low_rank": ("opt", LOW_RANK),
    "phi3-gelu": ("phi3", GELU),
    "olmo2-vector": ("olmo2", VECTOR),
}
# Those whose other features are tried as well.
TRIED = ("llama-low_rank", "gpt2-silu")
MERGED_CASES = {
    "llama-vector": ("llama", VECTOR),
    "gpt2-vector": ("gpt2", VECTOR),
    "llama-joint-vector": (
        "llama",
        {**JOINT.to_dict(), "steering": {"steering_type": "vector", "init_weights": False}},
    ),
    "llama-post_mlp": (
        "llama",
        SublayerSteeringConfig(task_type="CAUSAL_LM", r=2, site="post_mlp", init_weights=False),
    ),
    "llama-post_attn-vector": (
        "llama",
        SublayerSteeringConfig(task_type="CAUSAL_LM", steering_type="vector", site="post_attn", init_weights=False),
    ),
    "llama-lofit": ("llama", LofitConfig(task_type="CAUSAL_LM", init_weights=False)),
}


@pytest.fixture(autouse=True)
def _code_in_a_temporary_folder(tmp_path, monkeypatch):
    """Where transformers keeps the code of checkpoints."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def export(adapter: Path, output: Path, base: Path | None = None, overwrite: bool = False) -> str:
    with Progress() as progress:
        return export_checkpoint(str(adapter), output, None if base is None else str(base), overwrite, progress)


def save_base(model, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def record(family: str, config, folder: Path, output: Path) -> str:
    """Exports an adapter, and records what PEFT computes. Returns the text that follows "ab c"."""
    if isinstance(config, dict):
        config = type(JOINT)(**{name: value for name, value in config.items() if name != "peft_type"})
    model = zoo_model(family, vocab_size=300)
    save_base(model, folder / "base")
    steered = steer(model, config, folder / "adapter")
    ids = tiny_inputs()["input_ids"]
    export(folder / "adapter", output, folder / "base")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    chosen = steered.generate(input_ids=ids[:1], **settings)[0, ids.shape[1] :]
    with torch.no_grad():
        found = steered(input_ids=ids, output_hidden_states=True)
    states = {f"hidden_states.{index}": state.clone() for index, state in enumerate(found.hidden_states)}
    save_file({"input_ids": ids, "logits": found.logits, "chosen": chosen, **states}, output / "recorded.safetensors")
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("ab c", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return tokenizer.decode(steered.generate(input_ids=prompt, **settings)[0, 4:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a program that cannot import this package finds for each case, and what it should write."""
    folder = tmp_path_factory.mktemp("exports")
    answers = {
        name: record(family, config, folder / name, folder / "exported" / name)
        for name, (family, config) in (CODE_CASES | MERGED_CASES).items()
    }
    results = folder / "results.json"
    command = [sys.executable, str(HERE / "without_us.py"), str(folder / "exported"), str(results), *TRIED]
    environment = {**os.environ, "TRL_STEER_NO_AUTOLOAD": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: {**result, "expected": answers[name], "has_code": (folder / "exported" / name / f"{CODE}.py").exists()}
        for name, result in json.loads(results.read_text()).items()
    }


@pytest.mark.parametrize("case", [*CODE_CASES, *MERGED_CASES])
def test_a_checkpoint_gives_what_peft_gives_where_this_package_is_not_installed(case, found):
    assert all(error <= 2e-5 for error in found[case]["errors"].values()), found[case]
    assert found[case]["answer"] == found[case]["expected"]


def test_what_is_merged_needs_no_code(found):
    assert {name for name, result in found.items() if result["has_code"]} == CODE_CASES.keys()


def test_without_trust_in_its_code_a_checkpoint_does_not_load_unsteered(tmp_path):
    record("llama", LOW_RANK, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.slow
def test_lm_eval_scores_a_checkpoint_where_this_package_is_not_installed(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"{number}+1=", "answer": str(number)} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{answer}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(task))
    model = tiny_model()
    save_base(model, tmp_path / "base")
    steered = steer(model, LOW_RANK, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    found = _lm_eval(f"pretrained={tmp_path / 'out'},trust_remote_code=True", tmp_path)
    assert found == pytest.approx(bits_per_byte(steered, rows), rel=1e-6)
    with steered.disable_adapter():
        assert found != pytest.approx(bits_per_byte(steered, rows), rel=1e-4)


def bits_per_byte(model, rows: list[dict]) -> float:
    """As lm-eval computes it, with the end token in front of each text."""
    tokenizer, texts = tiny_tokenizer(), [row["question"] + row["answer"] for row in rows]
    total = 0.0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        predicted = logits_of(model, [tokenizer.eos_token_id, *ids])[:-1].log_softmax(-1)
        total += predicted.gather(1, torch.tensor(ids)[:, None]).sum().item()
    return -total / sum(len(text.encode()) for text in texts) / math.log(2)


def _lm_eval(arguments: str, folder: Path) -> float:
    """A score of stock lm-eval where this package cannot be imported."""
    code = """
import sys
sys.modules["trl_steer"] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
    output = folder / "scores"
    command = [sys.executable, "-c", code, "run", "--model", "hf", "--model_args", f"{arguments},dtype=float32"]
    command += ["--tasks", "tiny", "--include_path", str(folder / "tasks"), "--output_path", str(output)]
    places = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_DATASETS_CACHE": str(folder / "data")}
    environment = {**os.environ, **places, "TRL_STEER_NO_AUTOLOAD": "1"}
    done = subprocess.run([*command, "--device", "cpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = output.rglob("results_*.json")
    return json.loads(results.read_text())["results"]["tiny"]["bits_per_byte,none"]


def test_factors_stay_in_float32_on_a_bfloat16_model(tmp_path):
    model = zoo_model("llama", vocab_size=300, dtype=torch.bfloat16)
    save_base(model, tmp_path / "base")
    steered = steer(model, SILU, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items() if "post_block_steering" in name}
    assert set(kinds.values()) == {torch.float32}
    ids = tiny_inputs()["input_ids"][0].tolist()
    expected = logits_of(steered, ids)
    assert (logits_of(loaded, ids) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_scaling_can_be_changed_when_loading(tmp_path):
    record("llama", LOW_RANK, tmp_path, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, steering_scaling=0.0)
    ids = tiny_inputs()["input_ids"][0].tolist()
    assert torch.equal(logits_of(loaded, ids), logits_of(base, ids))


def test_saving_a_loaded_checkpoint_keeps_its_code(tmp_path):
    record("llama", LOW_RANK, tmp_path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ids = tiny_inputs()["input_ids"][0].tolist()
    assert torch.equal(logits_of(again, ids), logits_of(loaded, ids))


def test_trained_modules_and_new_tokens_are_part_of_the_checkpoint(tmp_path):
    model = zoo_model("llama", vocab_size=64)  # fewer than the tokenizer has
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tiny_tokenizer()))
    config = copy.deepcopy(LOW_RANK)
    config.modules_to_save = ["lm_head"]
    steered = steer(model, config, tmp_path / "adapter")
    with torch.no_grad():
        steered.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    steered.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.vocab_size == len(tiny_tokenizer())
    ids = tiny_inputs()["input_ids"][0].tolist()
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(steered, ids), atol=1e-5, rtol=0)


REFUSED = {
    "positions": (PostBlockSteeringConfig(task_type="CAUSAL_LM", positions="f2+l2"), "edits some tokens only"),
    "activation inside": (
        SublayerSteeringConfig(task_type="CAUSAL_LM", site="post_mlp", activation="silu", init_weights=False),
        "cannot be exported: .*nonlinear",
    ),
    "baseline": (LoReftConfig(task_type="CAUSAL_LM", r=2), "cannot be exported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(case, tmp_path):
    config, message = REFUSED[case]
    model = zoo_model("llama", vocab_size=300)
    save_base(model, tmp_path / "base")
    steer(model, config, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_differs_from_the_adapter_is_not_written(tmp_path, monkeypatch):
    model = zoo_model("llama", vocab_size=300)
    save_base(model, tmp_path / "base")
    steer(model, LOW_RANK, tmp_path / "adapter")
    from trl_steer.integrations.transformers import export as exporter

    correct = exporter._code
    monkeypatch.setattr(exporter, "_code", lambda *args: correct(*args).replace("return h + (", "return h - ("))
    with pytest.raises(ValueError, match="The checkpoint differs from the adapter"):
        export(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_template_is_code_for_llama_as_it_stands(tmp_path):
    from trl_steer.integrations.transformers import modeling_steered

    record("llama", LOW_RANK, tmp_path, tmp_path / "out")
    template = Path(modeling_steered.__file__).read_text()
    assert (tmp_path / "out" / f"{CODE}.py").read_text() == template
    assert "post_block_steering" in next(
        name for name in load_file(tmp_path / "out" / "model.safetensors") if "steer" in name
    )
