"""A script for `accelerate launch`: trains in float64 with SGD and writes losses, weights and adapter folders."""

import gc
import sys
from pathlib import Path

import torch
from sft_runs import make_run
from tiny_chat import tiny_model
from trl_cases import logged

GLOBAL_BATCH = 4
KINDS = ["low_rank", "joint"]


class Float64Loss:
    """The loss of completions. transformers and TRL take the logits to float32, and what they log as well."""

    def __init__(self):
        self.values = []

    def __call__(self, outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        self.values.append(float(total.detach()) / int(num_items_in_batch))
        return total / num_items_in_batch


def train(kind: str, folder: Path, processes: int) -> dict:
    """Returns this process' share of the loss of each batch, the loss that was logged, and the weights."""
    loss = Float64Loss()
    trainer = make_run(
        kind,
        folder / kind,
        tiny_model().double(),
        extra={"compute_loss_func": loss},
        optim="sgd",
        learning_rate=5.0,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        gradient_accumulation_steps=2,
        activation_checkpointing=False,
    )
    assert trainer.args.world_size == processes
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    trainer.save_model()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in weights.values()} == {torch.float64}
    return {"losses": loss.values, "logged": logged(trainer, "loss"), "weights": weights}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for kind in KINDS:
        result = train(kind, out, processes=2)
        torch.save(result, out / f"{kind}-{torch.distributed.get_rank()}.pt")
    gc.collect()  # DDP's reducer must not be the last to refer to the group
    torch.distributed.destroy_process_group()
