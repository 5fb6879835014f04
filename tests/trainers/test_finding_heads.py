"""Both methods find the three heads by which a model differs from the base model that they train on."""

from __future__ import annotations

import pytest
import torch
from model_zoo import NUM_BLOCKS, tiny_model
from peft import get_peft_model
from steering_cases import adapters_of, steer
from transformers import TrainerControl, TrainerState

from trl_steer import JolaConfig, LofitConfig, PenaltyCallback, top_heads
from trl_steer.tuners.jola.layer import OPEN, gate

NUM_HEADS, STEPS = 4, 150
over_seeds = pytest.mark.parametrize("seed", range(3))


def three_heads(seed: int) -> list[tuple[int, int]]:
    places = torch.randperm(NUM_BLOCKS * NUM_HEADS, generator=torch.Generator().manual_seed(seed))[:3]
    return sorted(divmod(place, NUM_HEADS) for place in places.tolist())


@torch.no_grad()
def teacher(row: str, heads: list[tuple[int, int]], seed: int):
    """A model that is strongly steered at these heads and nowhere else."""
    model = steer(tiny_model(), row, seed=seed)
    for block, adapter in enumerate(adapters_of(model)):
        for name, parameter in adapter.named_parameters():
            if name.endswith("log_gate"):
                parameter.fill_(OPEN)
            else:
                own = [head for at, head in heads if at == block]
                parameter.mul_(torch.tensor([[4.0 if head in own else 0.0] for head in range(NUM_HEADS)]))
    return model


def train_on(target, config, seed: int, learning_rate: float):
    """Fits the logits of another model, with a penalty as trainers add it."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    state, generator = TrainerState(max_steps=STEPS), torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        ids = torch.randint(3, 60, (8, 8), generator=generator)
        with torch.no_grad():
            wanted = target(input_ids=ids).logits
        optimizer.zero_grad()
        (model(input_ids=ids).logits - wanted).square().mean().backward()
        state.global_step = step
        PenaltyCallback().on_pre_optimizer_step(None, state, TrainerControl(), model=model, optimizer=optimizer)
        optimizer.step()
    return model.eval()


@over_seeds
def test_lofit_first_phase_ranks_heads_with_a_signal_highest(seed):
    heads = three_heads(seed)
    config = LofitConfig(phase="scale", penalty_weight=0.01)
    model = train_on(teacher("lofit-scale", heads, seed), config, seed, learning_rate=2e-2)
    assert sorted(top_heads(model, k=3)) == heads
    norms = torch.cat([adapter.scale.detach().norm(dim=1) for adapter in adapters_of(model)]).sort().values
    assert norms[-3] > 10 * norms[-4]


@over_seeds
def test_jola_opens_gates_of_heads_with_a_signal_widest(seed):
    heads = three_heads(seed)
    config = JolaConfig(penalty_schedule="constant", penalty_weight=0.5)
    model = train_on(teacher("jola", heads, seed), config, seed, learning_rate=5e-2)
    gates = torch.cat(
        [gate(adapter.offset_log_gate) + gate(adapter.scale_log_gate) for adapter in adapters_of(model)]
    ).flatten()
    found = gates.argsort(descending=True)[:3].tolist()
    assert sorted(divmod(place, NUM_HEADS) for place in found) == heads
