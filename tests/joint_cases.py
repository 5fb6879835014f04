"""Short runs of `JointOrthSFTTrainer`, and how orthogonal the halves are."""

import torch
from trl_cases import make_trainer

from trl_steer import JointOrthSFTTrainer, JointSteeringConfig
from trl_steer.tuners.joint_steering import find_pairs

BOUND = 1e-5


def overlap(model, name="default", side="output"):
    """The largest `max |Q^T W| / ||W||` over the blocks, by a float64 SVD."""
    worst = 0.0
    for pair in find_pairs(model, name):
        B = torch.cat([matrix.double() for matrix in pair.output_matrices(name)], dim=1)
        U, S, _ = torch.linalg.svd(B, full_matrices=False)
        W = pair.steering_matrix(name, side).detach().double()
        W = W.mT if side == "input" else W.reshape(len(B), -1)
        if S[0] > 0 and W.norm() > 0:
            worst = max(worst, float((U[:, 1e-7 * S[0] < S].T @ W).abs().max() / W.norm()))
    return worst


def joint_trainer(folder, peft_config="joint", model=None, **arguments) -> JointOrthSFTTrainer:
    if peft_config == "joint":
        peft_config = JointSteeringConfig(r=4, steering={"r": 2}, task_type="CAUSAL_LM")
    return make_trainer(
        "joint", folder, model, peft_config, **{"bf16": False, "per_device_train_batch_size": 2, **arguments}
    )


def trained(trainer):
    return trainer.accelerator.unwrap_model(trainer.model)
