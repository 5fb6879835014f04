"""GGUF files of tiny models, written as llama.cpp's converter does, with a tokenizer of one token per byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, TokenType
from model_zoo import tiny_model
from tiny_chat import tiny_tokenizer

# Wide enough for blocks of quantized types.
FIELDS = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def gguf_model(family: str = "llama", **fields) -> Any:
    """A tiny model that a GGUF file can hold. Mistral's attention reaches as far as that of llama.cpp."""
    other = {"sliding_window": None} if family == "mistral" else {}
    return tiny_model(family, **{**FIELDS, "tie_word_embeddings": True, **other, **fields})


def write_gguf(
    model: Any,
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    quantize: Callable = gguf.quants.quantize,
    **metadata: int | float | str,
) -> Path:
    """Writes a model. Matrices get the type `kind`."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(f"Tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            key.replace("__", "."), value
        )
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        data, name = parameter.detach().float().numpy(), names.get_name(key, try_suffixes=(".weight", ".bias"))
        if config.model_type != "qwen2" and name.split(".")[-2] in ("attn_q", "attn_k"):
            data = _neighbours(data, config.head_dim)
        own = kind if data.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(np.ascontiguousarray(data), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _neighbours(data: np.ndarray, size: int) -> np.ndarray:
    """Entry i and entry i + size / 2 of each head become neighbours."""
    order = np.arange(len(data)).reshape(-1, 2, size // 2).transpose(0, 2, 1).ravel()
    return data[order]


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    special = set(tiny_tokenizer().all_special_tokens)
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    tokens.append("ab")  # a list of merges is not empty
    kinds.append(TokenType.NORMAL)
    tokens += [f"<unused{index}>" for index in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [TokenType.UNUSED] * (size - len(kinds)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(tiny_tokenizer().eos_token_id)
