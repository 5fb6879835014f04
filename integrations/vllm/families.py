"""Which models are served, and where their blocks have the sites.

vLLM has its own model classes. Their blocks pass the residual stream on in one of two forms, and what is behind a
sublayer's norm differs too, so that a class is listed only after the answers with it were compared with PEFT's.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a site is in one of vLLM's blocks.

    Attributes:
        module (`str`): Name of the module in the block, `""` for the block itself.
        is_input (`bool`): Whether the hidden state is the module's input, rather than its output.
    """

    module: str
    is_input: bool = False


_PRE_NORM = {
    "post_block": Place(""),
    "pre_mlp": Place("mlp", is_input=True),
    "post_mlp": Place("mlp"),
    "post_attn": Place("self_attn"),
}
# Norms stand between the sublayers and the residual addition, and both sites behind them.
_SANDWICH_NORM = {
    **_PRE_NORM,
    "post_mlp": Place("post_feedforward_layernorm"),
    "post_attn": Place("post_attention_layernorm"),
}
# The layers of the MLP are children of the block.
_OPT = {**_PRE_NORM, "pre_mlp": Place("fc1", is_input=True), "post_mlp": Place("fc2")}

# The names of vLLM's model classes -> the places of the sites in their blocks.
FAMILIES: dict[str, dict[str, Place]] = {
    "LlamaForCausalLM": _PRE_NORM,
    "Qwen2ForCausalLM": _PRE_NORM,
    "Qwen3ForCausalLM": _PRE_NORM,
    "MistralForCausalLM": _PRE_NORM,
    "Phi3ForCausalLM": _PRE_NORM,
    "Gemma3ForCausalLM": _SANDWICH_NORM,
    "OPTForCausalLM": _OPT,
}


def is_listed(model: Any) -> bool:
    """Whether steering is served for one of vLLM's models."""
    return type(model).__name__ in FAMILIES


def place_of(model: Any, site: str) -> Place:
    """The place of a site in the blocks of one of vLLM's models.

    Raises:
        ValueError: The class of the model is not listed, or there is no such site.
    """
    name = type(model).__name__
    if not is_listed(model):
        raise ValueError(
            f"Steering is not served for {name}, whose answers were not compared with PEFT's. It is for "
            f"{', '.join(sorted(FAMILIES))}."
        )
    if site not in FAMILIES[name]:
        raise ValueError(f"There is no site {site!r} in {name}; use one of {sorted(FAMILIES[name])}.")
    return FAMILIES[name][site]
