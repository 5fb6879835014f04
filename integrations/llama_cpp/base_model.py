"""The base model of a GGUF file in transformers: to measure the residual stream, and to merge LoRA."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..export.adapter import PostBlockAdapter
from .families import Family
from .gguf_file import BaseFile, Tensor

_KEPT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_CLOSE = 1e-5


def load(base: BaseFile) -> tuple[Any, Any]:
    """The model of a GGUF file in float32, and its tokenizer."""
    place = {"pretrained_model_name_or_path": str(base.path.parent), "gguf_file": base.path.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**place)


def with_adapter(model: Any, folder: str, family: Family) -> Any:
    """The model with the adapter of a folder.

    Raises:
        ValueError: It is not an adapter of this model.
    """
    config: Any = PeftConfig.from_pretrained(folder)
    if getattr(config, "base_model_type", None) in family.models:
        config.base_model_type = None  # files do not tell Llama and Mistral apart
    try:
        return PeftModel.from_pretrained(model, folder, config=config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not an adapter of this base model: {' '.join(str(error).split())}") from error


@torch.no_grad()
def merge_lora(base: BaseFile, model: Any, adapter: PostBlockAdapter, family: Family) -> tuple[Any, list[str]]:
    """Merges the LoRA half of a joint adapter, into the model and into the tensors of the file.

    Tensors in float32, float16 and bfloat16 keep their type. Quantized ones become float16.

    Args:
        base ([`BaseFile`]): The file, whose `tensors` are replaced.
        model (`PreTrainedModel`): The model of [`load`].
        adapter ([`PostBlockAdapter`]): The adapter.
        family ([`Family`]): The family of the base model.

    Returns:
        `tuple[PreTrainedModel, list[str]]`: The merged model, and the names of the tensors that changed.

    Raises:
        ValueError: LoRA changes a tensor that the file does not have as it is.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[base.architecture.upper()], model.config.num_hidden_layers)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merged = with_adapter(model, str(adapter.lora), family).merge_and_unload()
    changed = []
    for name, parameter in merged.named_parameters():
        if name in before and torch.equal(before[name], parameter):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        tensor, original = base.tensors.get(found), before.get(name)
        if (
            tensor is None
            or original is None
            or not _is_that(tensor, _as_in_file(original, found, model.config, family))
        ):
            raise ValueError(f"LoRA changes {name}, which {base.path.name} does not have in this form.")
        changed.append(found)
        base.tensors[found] = _typed(_as_in_file(parameter, found, model.config, family), tensor.type)
    return merged, changed


def _as_in_file(parameter: torch.Tensor, name: str, config: Any, family: Family) -> np.ndarray:
    """A parameter of transformers as the converter of llama.cpp writes it."""
    data = parameter.detach().float().numpy()
    part = name.split(".")[-2]
    if part in ("attn_q", "attn_k") and not family.pairs_halves:
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        halves = data.reshape(heads, 2, -1, *data.shape[1:])
        data = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)
    return data


def _is_that(tensor: Tensor, values: np.ndarray) -> bool:
    stored = tensor.values()
    return stored.shape == values.shape and np.allclose(stored, values, atol=_CLOSE)


def _typed(values: np.ndarray, kind: GGMLQuantizationType) -> Tensor:
    kind = kind if kind in _KEPT_TYPES else GGMLQuantizationType.F16
    return Tensor(gguf.quants.quantize(values, kind), kind)
