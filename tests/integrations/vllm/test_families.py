"""Every family that is served gives PEFT's answers, at every site. The models are tiny."""

import os

import pytest
import torch
from model_zoo import FAMILIES
from serving_cases import (
    WHY,
    assert_is_of_peft,
    is_different,
    joint,
    lora,
    post_block,
    run_engine,
    sublayer,
    write_adapters,
)
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason=WHY)

# vLLM's attention wants heads of at least 32 features.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
OVERRIDES = {
    "opt": {"word_embed_proj_dim": 64},
    "opt_post_norm": {"word_embed_proj_dim": 32},
    "gemma3": {"query_pre_attn_scalar": 32},
}
CONFIGS = {
    "low_rank": post_block(r=4, scaling=0.5),
    "activation": post_block(r=3, activation="silu", layers_to_transform=[0, 2]),
    "vector": post_block(steering_type="vector", scaling=2.0),
    "pre_mlp": sublayer("pre_mlp", r=2, activation="gelu"),
    "post_mlp": sublayer("post_mlp", r=8),
    "post_attn": sublayer("post_attn", steering_type="vector"),
    "joint": joint({"r": 5, "rank_pattern": {"layers.1": 2}}, r=2, lora_alpha=8),
    "lora": lora(r=8, lora_alpha=4),
}
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
SERVED = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "opt", "opt_post_norm")


@pytest.mark.parametrize("family", SERVED)
def test_answers_are_those_of_peft(family, tmp_path):
    model = FAMILIES[family].build(**SIZES, **OVERRIDES.get(family, {}))
    # Fewer slots than adapters, and fewer tokens in a step than in a prompt.
    options = {"max_loras": 3, "max_num_batched_tokens": 32}
    compare_with_peft(model, tmp_path, CONFIGS, **options)


@pytest.mark.skipif(CORES is None or len(CORES) < 2, reason="needs two cores")
def test_two_processes_with_half_of_each_layer_give_the_answers_of_peft(tmp_path):
    model = FAMILIES["llama"].build(**SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2})
    configs = {name: CONFIGS[name] for name in ("activation", "pre_mlp", "joint", "lora")}
    variables = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[1]}"}
    compare_with_peft(model, tmp_path, configs, variables=variables, tensor_parallel_size=2, max_loras=4)


def compare_with_peft(model, tmp_path, configs, **options) -> None:
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    write_adapters(folder, tmp_path, configs, size=0.5)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in (5, 50)]
    names = [None, *configs]
    requests = [(prompt, name and str(tmp_path / name)) for prompt in prompts for name in names]
    answers = run_engine(folder, requests, max_lora_rank=8, max_model_len=96, max_num_seqs=8, **options)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    by_name = {name: answers[index :: len(names)] for index, name in enumerate(names)}
    for name, its_own in by_name.items():
        assert_is_of_peft(its_own, reference, name and tmp_path / name)
        assert name is None or all(map(is_different, its_own, by_name[None]))
