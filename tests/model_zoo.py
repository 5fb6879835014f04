"""A tiny model of every family, built from its config: no download, and the same weights for the same seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

VOCAB_SIZE = 64
HIDDEN_SIZE = 32
NUM_BLOCKS = 3
PAD, BOS, EOS = 0, 1, 2

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    # ten times the usual spread, so that tiny models have opinions and no two logits tie
    "initializer_range": 0.2,
}
MULTI_HEAD = {**COMMON, "num_key_value_heads": 4}
# As many experts as blocks: a list of experts must not be taken for the list of blocks.
EXPERTS = {"num_experts": NUM_BLOCKS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# As many vision layers as text blocks: a vision tower must not be taken for the text decoder.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and what the tests need to know of it.

    Attributes:
        model_cls (`str`): Name of the model class in transformers. Its config class is the `config_class` of that.
        config (`dict`): Arguments of the config class.
        blocks (`str`): Name of the list of blocks.
        merges_vector (`bool`): Whether a steering vector equals a bias that the model has.
        text_config (`dict`): Arguments of the text half of a vision-language model.
    """

    model_cls: str
    config: dict[str, Any]
    blocks: str = "model.layers"
    merges_vector: bool = False
    text_config: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
        """A fresh model in evaluation mode. Its biases and norms are random too, so that none is a neutral element."""
        model_cls = getattr(transformers, self.model_cls)
        fields = {**self.config, **overrides}
        if self.text_config:
            fields["text_config"] = {**self.text_config, **fields.get("text_config", {})}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_cls(model_cls.config_class(**fields))
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
        return model.to(dtype).eval()


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {**COMMON, "tie_word_embeddings": False}),
    "llama_mlp_bias": Family("LlamaForCausalLM", {**COMMON, "mlp_bias": True}, merges_vector=True),
    "mistral": Family("MistralForCausalLM", {**COMMON, "sliding_window": 4}),
    "mixtral": Family("MixtralForCausalLM", {**COMMON, "num_local_experts": NUM_BLOCKS, "num_experts_per_tok": 2}),
    "qwen2": Family("Qwen2ForCausalLM", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": Family("Qwen3ForCausalLM", {**COMMON, "head_dim": 8}),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]}
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {**COMMON, **EXPERTS, "head_dim": 8}),
    "gemma2": Family("Gemma2ForCausalLM", {**COMMON, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {
            **COMMON,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    # Each block carries streams, (streams, rows, tokens, width), the first of which is the residual stream. With four,
    # as real ones have, there would be as many projections between them as there are blocks.
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        {
            **COMMON,
            "intermediate_size": [48] * NUM_BLOCKS,
            "activation_sparsity_pattern": [0.0] * NUM_BLOCKS,
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": Family("Phi3ForCausalLM", COMMON),
    "olmo2": Family("Olmo2ForCausalLM", COMMON),
    "smollm3": Family("SmolLM3ForCausalLM", {**COMMON, "no_rope_layers": [1, 0, 1]}),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            **COMMON,
            "head_dim": 8,
            "num_local_experts": NUM_BLOCKS,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "starcoder2": Family("Starcoder2ForCausalLM", {**COMMON, "sliding_window": None}, merges_vector=True),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {**COMMON, "n_embd": HIDDEN_SIZE, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 128},
        blocks="transformer.h",
        merges_vector=True,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", {**COMMON, "use_parallel_residual": True}, blocks="gpt_neox.layers", merges_vector=True
    ),
    "gpt_neox_sequential": Family(
        "GPTNeoXForCausalLM", {**COMMON, "use_parallel_residual": False}, blocks="gpt_neox.layers", merges_vector=True
    ),
    "opt": Family(
        "OPTForCausalLM",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN_SIZE, "init_std": 0.2},
        blocks="model.decoder.layers",
        merges_vector=True,
    ),
    # Blocks that end in a norm, and embeddings of another width than the residual stream.
    "opt_post_norm": Family(
        "OPTForCausalLM",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.2},
        blocks="model.decoder.layers",
    ),
    "falcon": Family(
        "FalconForCausalLM",
        {**MULTI_HEAD, "new_decoder_architecture": False, "parallel_attn": True, "multi_query": True, "bias": False},
        blocks="transformer.h",
    ),
    "falcon_new": Family(
        "FalconForCausalLM",
        {**COMMON, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
        blocks="transformer.h",
    ),
    "falcon_rw": Family(
        "FalconForCausalLM",
        {
            **MULTI_HEAD,
            "new_decoder_architecture": False,
            "parallel_attn": False,
            "multi_query": False,
            "alibi": True,
            "bias": True,
        },
        blocks="transformer.h",
        merges_vector=True,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            "image_token_index": 63,
            "pad_token_id": PAD,
        },
        blocks="model.language_model.layers",
        text_config={"model_type": "llama", **COMMON},
    ),
    "gemma3_vision": Family(
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "mm_tokens_per_image": 1,
            "boi_token_index": 60,
            "eoi_token_index": 61,
            "image_token_index": 62,
        },
        blocks="model.language_model.layers",
        text_config={**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {"depth": NUM_BLOCKS, "embed_dim": 16, "num_heads": 2, "hidden_size": HIDDEN_SIZE},
            "image_token_id": 60,
            "video_token_id": 61,
            "vision_start_token_id": 62,
            "vision_end_token_id": 63,
        },
        blocks="model.language_model.layers",
        text_config={
            **COMMON,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    ),
}


def tiny_model(family: str = "llama", **kwargs) -> PreTrainedModel:
    """A fresh tiny model, see [`Family.build`]."""
    return FAMILIES[family].build(**kwargs)


def tiny_inputs(rows: int = 2, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids without any special meaning, (rows, length), and the attention mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 60, (rows, length), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
