"""What the tests of LoFiT and JoLA share: models whose heads differ, and both methods in plain PyTorch."""

from __future__ import annotations

import torch
from model_zoo import FAMILIES, tiny_inputs, tiny_model
from steering_cases import adapters_of, steer

# family, changes, size k of a head. The first has 2 key-value heads for 4 query heads.
BASES = {
    "llama": ("llama", {}, 8),
    "qwen3, wider than d / H": ("qwen3", {"head_dim": 12}, 12),
    "gemma3, wider than d / H": ("gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16}, 16),
    "gpt2": ("gpt2", {}, 8),
    "opt": ("opt", {}, 8),
}
NUM_HEADS = 4
PROJECTION = {"gpt2": "attn.c_proj", "opt": "self_attn.out_proj"}


def double_model(base: str, **fields):
    family, changes, _ = BASES[base]
    return tiny_model(family, dtype=torch.float64, **changes, **fields)


def steered(base: str, row: str, **fields):
    return steer(double_model(base), row, **fields).double()


def projections(model, base: str) -> list[torch.nn.Module]:
    """The attention's output projection of each block."""
    family = BASES[base][0]
    blocks = model.get_submodule(FAMILIES[family].blocks)
    return [block.get_submodule(PROJECTION.get(family, "self_attn.o_proj")) for block in blocks]


def run(model, seed: int = 1):
    """Logits and the gradients of some function of them, by the embeddings too."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = tiny_inputs(seed=seed)["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    gradients = torch.autograd.grad(logits.sin().sum(), [embeddings, *parameters])
    return logits.detach(), gradients[0], gradients[1:]


def run_plainly(base: str, leaves: list[list[torch.Tensor]], update, seed: int = 1):
    """The same without us: `update(x, block, *leaves)` for each block takes and returns heads (..., H, k)."""
    model = double_model(base).requires_grad_(False)
    k = BASES[base][2]

    def hook(block):
        def on_input(module, args):
            heads = args[0].unflatten(-1, (NUM_HEADS, k))
            return (update(heads, block, *leaves[block]).flatten(-2),)

        return on_input

    for block, projection in enumerate(projections(model, base)):
        projection.register_forward_pre_hook(hook(block))
    ids = tiny_inputs(seed=seed)["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    flat = [leaf for block in leaves for leaf in block]
    gradients = torch.autograd.grad(logits.sin().sum(), [embeddings, *flat])
    return logits.detach(), gradients[0], gradients[1:]


def tensors_of(model) -> list[list[torch.Tensor]]:
    """Copies of all tensors of the adapters, block by block."""
    return [[p.detach().clone().requires_grad_() for p in adapter.parameters()] for adapter in adapters_of(model)]


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
