"""The architectures of llama.cpp that adapters can be exported to, and what is needed of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .gguf_file import BaseFile

# llama.cpp's architecture with blocks that have no attention, and MLPs of different widths.
FLEXIBLE = "deci"


@dataclass(frozen=True)
class Family:
    """
    What is needed of an architecture. Its blocks compute what those of [`FLEXIBLE`] do.

    Args:
        models (`tuple[str, ...]`): The `model_type` in transformers of models that are converted to it.
        reads_bias (`bool`): Whether llama.cpp reads `blk.N.ffn_down.bias`.
        pairs_halves (`bool`): Whether rotary embeddings rotate the two halves of a head against each other, and not
            neighbouring entries.
    """

    models: tuple[str, ...]
    reads_bias: bool
    pairs_halves: bool


# Each was compared with transformers, see tests/integrations/llama_cpp.
FAMILIES = {
    "llama": Family(("llama", "mistral"), reads_bias=True, pairs_halves=False),
    "qwen2": Family(("qwen2",), reads_bias=False, pairs_halves=True),
}

# How a tensor is attached to the residual stream.
NORM, READS, WRITES, ADDS, OTHER = "norm", "reads", "writes", "adds", "other"
_BLOCK = r"blk\.\d+\."
_ROLES = {
    rf"{_BLOCK}(attn|ffn)_norm\.weight|output_norm\.weight": NORM,
    rf"{_BLOCK}(attn_q|attn_k|attn_v|ffn_gate|ffn_up)\.weight|token_embd\.weight|output\.weight": READS,
    rf"{_BLOCK}(attn_output|ffn_down)\.weight": WRITES,
    rf"{_BLOCK}(attn_output|ffn_down)\.bias": ADDS,
    rf"{_BLOCK}(attn_q|attn_k|attn_v|ffn_gate|ffn_up)\.bias|rope_freqs\.weight": OTHER,
}
# Hyperparameters that both graphs use in the same way.
_KNOWN = re.compile(
    r"vocab_size|context_length|embedding_length|block_count|feed_forward_length|attention\.head_count(_kv)?"
    r"|attention\.(key|value)_length|attention\.layer_norm_rms_epsilon|rope\.dimension_count|rope\.freq_base"
    r"|rope\.scaling\..*"
)


def family_of(base: BaseFile, model_type: str | None) -> Family:
    """The family of a base model.

    Args:
        base ([`BaseFile`]): The base model.
        model_type (`str`, *optional*): The type of the adapter's base model.

    Raises:
        ValueError: It is not supported, or the adapter is of another type of model.
    """
    family = FAMILIES.get(base.architecture)
    if family is None:
        raise ValueError(
            f"{base.path.name} has the architecture {base.architecture!r}. Supported are "
            f"{', '.join(map(repr, FAMILIES))} (which includes Mistral)."
        )
    if model_type is not None and model_type not in family.models:
        raise ValueError(
            f"The adapter is of a {model_type} model, but {base.path.name} has the architecture "
            f"{base.architecture!r}. Pass the GGUF file of the adapter's base model."
        )
    roles = {name: role_of(name) for name in base.tensors}
    unknown = [name for name, role in roles.items() if role is None]
    prefix = f"{base.architecture}."
    unknown += [
        key for key in base.metadata() if key.startswith(prefix) and not _KNOWN.fullmatch(key.removeprefix(prefix))
    ]
    if unknown:
        raise ValueError(
            f"{base.path.name} has {', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}, which is not "
            "supported (mixtures of experts, norms of queries and keys, or a variant of the architecture)."
        )
    return family


def role_of(name: str) -> str | None:
    """How a tensor is attached to the residual stream, or `None` if that is not known."""
    return next((role for pattern, role in _ROLES.items() if re.fullmatch(pattern, name)), None)
