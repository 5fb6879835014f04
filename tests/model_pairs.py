"""Pairs of tiny models, and batches to compare them on."""

import torch
from model_zoo import tiny_model
from peft import get_peft_model

from trl_steer import PostBlockSteeringConfig
from trl_steer.analysis import Split, token_batches


def token_rows(count: int = 60, length: int = 16, seed: int = 0) -> list[list[int]]:
    """Rows of different lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


def split_of(rows: list[list[int]], batch_size: int = 8) -> Split:
    """Two of three rows to fit on, the others for validation and held out."""
    third = len(rows) // 6
    parts = rows[2 * third :], rows[:third], rows[third : 2 * third]
    return Split(*(token_batches(part, batch_size) for part in parts))


def left_padded(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The same rows with the padding in front."""
    return [{name: tensor.flip(1) for name, tensor in _reversed_rows(batch).items()} for batch in batches]


def _reversed_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        found["input_ids"][row, :length] = batch["input_ids"][row, :length].flip(0)
    return found


def steered_model(family: str = "llama", strength: float = 0.3, ranks: dict[int, int] | None = None, **fields):
    """A model with a random steering adapter whose updates are about `strength` times as large as the states."""
    config = {"r": 3, "task_type": "CAUSAL_LM", "init_weights": False, **fields}
    model = get_peft_model(tiny_model(family), PostBlockSteeringConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "steering_adapter" in name:
            torch.nn.init.normal_(parameter, std=strength / max(parameter.shape[0], 1) ** 0.5)
    return model


def tuned_model(family: str = "llama", size: float = 0.05, seed: int = 1):
    """A model all of whose weights have moved a little."""
    model, generator = tiny_model(family), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model
