"""Configuration of [`JointOrthSFTTrainer`]."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class JointOrthSFTConfig(SFTConfig):
    """
    Configuration class for the [`JointOrthSFTTrainer`].

    Inherits every parameter from [`~trl.SFTConfig`].

    Parameters:
        orthogonal (`bool`, defaults to `True`):
            Whether to keep the steering update orthogonal to the output of LoRA: `W_up <- (I - Q Q^T) W_up`, with `Q`
            an orthonormal basis of the column space of LoRA's `B` (section 5.2 of the paper). `False` is naive joint
            training.
        orthogonal_every (`int`, defaults to `1`):
            Number of optimizer steps between projections.
        orthogonal_side (`str`, defaults to `"output"`):
            `"output"` projects `W_up`, as in the paper. `"input"` projects `W_down`, as in the authors' code.
        orthogonal_before_step (`bool`, defaults to `False`):
            Whether to project before an optimizer step rather than after it.
        orthogonal_at_end (`bool`, defaults to `True`):
            Whether to project after the last step and whenever weights are saved. `False` does not guarantee that
            saved weights satisfy the constraint.
        orthogonal_gradients (`bool`, defaults to `True`):
            Whether to also project the gradients before each step, so that the optimizer's momentum stays in the
            orthogonal complement. Not in the paper.
        orthogonal_norms (`bool`, defaults to `True`):
            If there is a norm between LoRA and the residual addition (Gemma 2 and 3, OLMo 2), whether to use
            `diag(gamma) B`, with the norm's weight `gamma`, instead of `B`.
        orthogonal_modules (`list[str]`, *optional*):
            Names, or ends of names, of LoRA's target modules in a block to be orthogonal to. Default: the last linear
            layer of the MLP.
        lora_learning_rate (`float`, *optional*):
            Learning rate of LoRA. Default: `learning_rate`.
        steering_learning_rate (`float`, *optional*):
            Learning rate of steering. Default: `learning_rate`.
        steering_weight_decay (`float`, defaults to `0.0`):
            Weight decay of steering.

    Raises:
        ValueError: A field has an invalid value.
    """

    orthogonal: bool = field(
        default=True, metadata={"help": "Keep steering orthogonal to LoRA's output. False is naive joint training."}
    )
    orthogonal_every: int = field(default=1, metadata={"help": "Number of optimizer steps between projections."})
    orthogonal_side: str = field(
        default="output",
        metadata={"help": "'output' projects W_up (the paper), 'input' W_down.", "choices": ["output", "input"]},
    )
    orthogonal_before_step: bool = field(
        default=False, metadata={"help": "Project before an optimizer step rather than after it."}
    )
    orthogonal_at_end: bool = field(
        default=True, metadata={"help": "Project after the last step and whenever weights are saved."}
    )
    orthogonal_gradients: bool = field(
        default=True, metadata={"help": "Also project the gradients before each optimizer step."}
    )
    orthogonal_norms: bool = field(
        default=True, metadata={"help": "Include the norm between LoRA and the residual addition, if there is one."}
    )
    orthogonal_modules: list[str] | None = field(
        default=None,
        metadata={"help": "LoRA's target modules to be orthogonal to. Default: the last linear layer of the MLP."},
    )
    lora_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of LoRA. Default: learning_rate."}
    )
    steering_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of steering. Default: learning_rate."}
    )
    steering_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of steering."})

    def __post_init__(self):
        super().__post_init__()
        if self.orthogonal_side not in ("output", "input"):
            raise ValueError(f"orthogonal_side must be 'output' or 'input', got {self.orthogonal_side!r}.")
        every = self.orthogonal_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"orthogonal_every must be an integer, at least 1, got {every!r}.")
        if isinstance(self.orthogonal_modules, str):
            raise ValueError(
                f"orthogonal_modules must be a list of names, got the string {self.orthogonal_modules!r}."
            )
        for name in ("lora_learning_rate", "steering_learning_rate", "steering_weight_decay"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number, at least 0, got {value!r}.")
