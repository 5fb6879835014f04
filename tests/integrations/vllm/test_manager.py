"""What an engine has from the start, and what a compiled model cannot get later."""

import json
import subprocess
import sys

import pytest
from model_zoo import FAMILIES
from serving_cases import ENVIRONMENT, WHY, joint, lora, post_block, sublayer, write_adapters
from tiny_chat import tiny_model

pytest.importorskip("vllm", reason=WHY)

CODE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, is_compiled, *names = sys.argv[1:]
engine = LLM(f"{folder}/model", enable_lora=True, max_lora_rank=8, max_model_len=64, skip_tokenizer_init=True)
config = engine.llm_engine.vllm_config
salted, salt = config.compute_hash(), config.additional_config.pop("trl_steer")
worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager
manager = worker._adapter_manager
found = {"salt": salt, "is salted": salted != config.compute_hash(), "is eager": manager._is_eager, "idle": {}}
found["at first"] = [sorted(manager._sites), sorted(manager._slots.activations)]
if is_compiled == "yes":
    manager._is_eager = False  # with LoRA, vLLM compiles nothing on a CPU
for number, name in enumerate(names, 1):
    try:
        request = LoRARequest(name, number, f"{folder}/{name}")
        worker.add_adapter(request)
        found[name] = "loaded"
        engine.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=2), lora_request=request)
        found["idle"][name] = manager.punica_wrapper_mapping["language_model"].no_lora
    except ValueError as error:
        found[name] = str(error)
found["at last"] = [sorted(manager._sites), sorted(manager._slots.activations)]
print(json.dumps(found))
"""
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def load_all(model, folder, configs, is_compiled=False, **variables) -> dict:
    """What an engine says when adapters are loaded one after the other."""
    model.save_pretrained(folder / "model")
    write_adapters(str(folder / "model"), folder, configs, size=0.5)
    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), "yes" if is_compiled else "no", *configs],
        env={**ENVIRONMENT, **variables, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-8000:]
    return json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))


def test_a_compiled_model_serves_what_it_had_from_the_start_and_has_a_cache_of_its_own(tmp_path):
    configs = {
        "silu": post_block(r=2, activation="silu"),
        "gelu": post_block(r=2, activation="gelu"),
        "pre_mlp": sublayer("pre_mlp", r=2),
    }
    variables = {"TRL_STEER_VLLM_SITES": "post_block post_mlp", "TRL_STEER_VLLM_ACTIVATIONS": "silu"}
    found = load_all(tiny_model(**SIZES), tmp_path, configs, is_compiled=True, **variables)
    assert (found["salt"][1:], found["is salted"]) == (["post_block post_mlp", "silu"], True)
    assert found["at first"] == found["at last"] == [["post_block", "post_mlp"], ["silu"]]
    assert found["silu"] == "loaded"
    assert "compiled without the activation 'gelu'" in found["gelu"]
    assert "TRL_STEER_VLLM_ACTIVATIONS='silu gelu'" in found["gelu"]
    assert "compiled without the site 'pre_mlp'" in found["pre_mlp"]


def test_an_eager_model_gets_what_adapters_need(tmp_path):
    configs = {
        "lora": lora(r=2),
        "tanh": post_block(r=2, activation="tanh"),
        "joint": joint({"r": 2}, r=2),
        "post_mlp": sublayer("post_mlp", r=2),
    }
    found = load_all(tiny_model(**SIZES), tmp_path, configs)
    assert (found["is eager"], found["at first"]) == (True, [[], []])
    assert [found[name] for name in configs] == ["loaded"] * 4
    assert found["at last"] == [["post_block", "post_mlp"], ["tanh"]]
    # vLLM's LoRA layers do nothing for adapters without LoRA.
    assert found["idle"] == {"lora": False, "tanh": True, "joint": False, "post_mlp": True}


def test_a_family_that_was_not_compared_with_peft_is_refused_and_keeps_lora(tmp_path):
    configs = {"steering": post_block(r=2), "lora": lora(r=2)}
    model = FAMILIES["gemma2"].build(**SIZES, query_pre_attn_scalar=32)
    found = load_all(model, tmp_path, configs, TRL_STEER_VLLM_SITES="post_block")
    assert "Steering is not served for Gemma2ForCausalLM" in found["steering"]
    assert found["lora"] == "loaded"
    assert found["at last"] == [[], []]
