"""A training loop with steering or a joint adapter, on one process or sharded over two by torch's `fully_shard`."""

from pathlib import Path

import model_zoo
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_chat import tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trl_steer import JointSteeringConfig, LofitConfig, PostBlockSteeringConfig
from trl_steer.tuners.joint_steering import OrthogonalityConstraint

WIDTH, STEPS = 36, 4
# Odd ranks, so that one process holds more rows of LoRA's A and of W_down than the other. `modules_to_save` is
# what PEFT saves beside an adapter, along another way.
CONFIGS = {
    "steering": lambda: PostBlockSteeringConfig(r=3, activation="silu", modules_to_save=["lm_head"]),
    "vector": lambda: PostBlockSteeringConfig(steering_type="vector"),
    "lofit": lambda: LofitConfig(heads={0: [2], 1: [0, 1]}, init_weights=False),
    "joint": lambda: JointSteeringConfig(r=5, use_dora=True, steering={"r": 3}, modules_to_save=["lm_head"]),
    "joint input": lambda: JointSteeringConfig(r=5, steering={"r": 3}),
    "joint norms": lambda: JointSteeringConfig(r=5, steering={"r": 3}, modules_to_save=["post_feedforward_layernorm"]),
}


def base_model(kind: str = "") -> torch.nn.Module:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    if kind == "joint norms":  # one between the MLP and the residual addition, sharded like everything else
        return model_zoo.tiny_model("olmo2", hidden_size=WIDTH, vocab_size=260, **heads).double()
    return tiny_model(hidden_size=WIDTH, **heads).double()


def adapted_model(kind: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base_model(kind), CONFIGS[kind]())


def train(
    kind: str, rank: int = 0, size: int = 1, **sharding
) -> tuple[PeftModel, OrthogonalityConstraint | None, list[float]]:
    """Trains with the same global batch whatever the number of processes, and returns the model and its losses."""
    model = adapted_model(kind)
    side = "input" if kind == "joint input" else "output"
    constraint = OrthogonalityConstraint(model, "default", side=side) if kind.startswith("joint") else None
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh, **sharding)
        fully_shard(model, mesh=mesh, **sharding)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(0, 250, (4, 12), generator=generator)
        rows = ids.chunk(size)[rank]
        logits = model(input_ids=rows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if constraint is not None:
            constraint.project_gradients()
        optimizer.step()
        if constraint is not None:
            constraint.project()
        total = loss.detach().clone()
        if size > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total) / size)
    return model, constraint, losses


def train_sharded_and_save(rank: int, folder: Path) -> None:
    """One of two processes. Saves as a script does, and with a state dict as transformers' trainer does."""
    for kind in CONFIGS:
        model, _, losses = train(kind, rank, size=2)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        model.save_pretrained(folder / kind / "gathered", is_main_process=rank == 0)
        # accelerate's `get_state_dict` under FSDP2: whole tensors on the first process, nothing on the others
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        assert bool(state) is (rank == 0)
        if rank == 0:
            model.save_pretrained(folder / kind / "state_dict", state_dict=state)
            torch.save(losses, folder / kind / "losses.pt")
        torch.distributed.barrier()
        _reload(model, folder / kind / "gathered")
        model.save_pretrained(folder / kind / "reloaded", is_main_process=rank == 0)
    _project_after_evaluating(rank, folder)


def _reload(model: PeftModel, folder: Path) -> None:
    """Reads an adapter into a model that is sharded already."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def _project_after_evaluating(rank: int, folder: Path) -> None:
    """As when a checkpoint follows an evaluation, which has left the weights gathered."""
    model, constraint, _ = train("joint", rank, size=2, reshard_after_forward=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.add_(1.0)
        model(input_ids=torch.arange(1, 13)[None])
    constraint.project()
    model.save_pretrained(folder / "evaluated", is_main_process=rank == 0)
