"""The base model of the adapter folders that version 0.1 wrote, `fixtures/version_0_1`.

Its weights follow from a formula, since random numbers may change between versions of PyTorch. The folders hold the
logits of `INPUT_IDS` beside the adapter; they were written by version 0.1 with the settings in their
`adapter_config.json` and weights from [`fill`].
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDERS = Path(__file__).parent / "fixtures" / "version_0_1"
INPUT_IDS = torch.tensor([[1, 5, 9, 2, 14, 7], [3, 3, 8, 11, 4, 6]])


def fill(model, scale: float, only_trainable: bool = False) -> None:
    """Sets parameter `i` of `model` to `scale * sin(1 + i + 0.7 * (0, 1, 2, ...))`."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.requires_grad or not only_trainable:
                values = torch.sin(1 + index + 0.7 * torch.arange(parameter.numel(), dtype=torch.float64))
                parameter.copy_((scale * values).view(parameter.shape))


def base_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    fill(model, 0.3)
    return model
