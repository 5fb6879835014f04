"""Models and batches for the tests of measures: float64 models, and the same texts in batches of several kinds."""

from __future__ import annotations

import pytest
import torch
from model_zoo import FAMILIES, tiny_model
from peft import get_peft_model
from tuner_cases import FOUR_FAMILIES, ROWS

PAD = 0
# Every family, of which four are tested by `make test`. The states that measures are made of are tested for all.
EVERY_FAMILY = [
    family if family in FOUR_FAMILIES else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]
_GENERATOR = torch.Generator().manual_seed(0)
# Token ids, more than the tiny models have dimensions.
TEXTS = [torch.randint(3, 60, (length,), generator=_GENERATOR).tolist() for length in (5, 9, 3, 12, 7, 8)]
# The same texts: alone, in batches that are padded on one side or the other, and in another order.
BATCHINGS = {
    "alone": [("right", [index]) for index in range(6)],
    "left": [("left", [0, 1]), ("left", [2, 3, 4, 5])],
    "mixed": [("right", [0, 1, 2]), ("left", [3, 4, 5])],
    "reordered": [("right", [3, 1, 5, 0, 2, 4])],
}


def batch_of(side: str, indices: list[int]) -> dict[str, torch.Tensor]:
    """Some of [`TEXTS`], padded on one side."""
    rows = [TEXTS[index] for index in indices]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        start = length - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(name: str = "mixed") -> list[dict[str, torch.Tensor]]:
    return [batch_of(side, indices) for side, indices in BATCHINGS[name]]


def double_model(family: str = "llama", **kwargs):
    """A tiny model in float64."""
    model = tiny_model(family, dtype=torch.float64, **kwargs)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others have no float64
    return model


def adapted_model(row: str, family: str = "llama", **changes):
    """A tiny model in float64 with a random adapter of this row of the matrix of tuners."""
    return with_adapter(double_model(family), ROWS[row].config(**changes))


def with_adapter(model, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, config).double().eval()


def sublayer_outputs(model, blocks: str = "model.layers"):
    """What a Llama computes for all texts, by direct hooks: names to lists over blocks of (tokens, width) arrays."""
    parts = {"mlp": "mlp", "attention": "self_attn", "output": ""}
    found: dict[str, list] = {name: [[] for _ in model.get_submodule(blocks)] for name in (*parts, "mlp_input")}
    hooks = []

    def keep(name, index):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            found[name][index].append(hidden[0].detach())
            if name == "mlp":
                found["mlp_input"][index].append(args[0][0].detach())

        return hook

    for index, block in enumerate(model.get_submodule(blocks)):
        for name, part in parts.items():
            hooks.append(block.get_submodule(part).register_forward_hook(keep(name, index)))
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return {name: [torch.cat(parts).numpy() for parts in lists] for name, lists in found.items()}
