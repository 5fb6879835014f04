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
            Keep the steering update orthogonal to what LoRA writes into the residual stream. `False` is naive joint
            training.
        orthogonal_every (`int`, defaults to `1`):
            Project every so many optimizer steps. The constraint holds in everything that is saved anyway.
        orthogonal_side (`str`, defaults to `"output"`):
            `"output"` projects `W_up`, as in the paper. `"input"` projects `W_down` instead, as in the code that its
            authors released.
        orthogonal_before_step (`bool`, defaults to `False`):
            Project before a step instead of after it.
        orthogonal_at_end (`bool`, defaults to `True`):
            Project after the last step too, and what a checkpoint holds. Without it nothing says that the constraint
            holds in what is saved.
        orthogonal_gradients (`bool`, defaults to `True`):
            Project the gradients before each step, so that the optimizer's momentum does not keep pushing out. This
            is not in the paper.
        orthogonal_norms (`bool`, defaults to `True`):
            Where a norm sits between LoRA and the residual addition, constrain what comes out of it. `False` takes
            LoRA's matrix as it is.
        orthogonal_modules (`list[str]`, *optional*):
            Names, or their endings, of the modules inside a block whose LoRA matrices count. By default the MLP's last
            linear layer.
        lora_learning_rate (`float`, *optional*):
            Learning rate of the LoRA half, `learning_rate` if not given.
        steering_learning_rate (`float`, *optional*):
            Learning rate of the steering half, `learning_rate` if not given.
        steering_weight_decay (`float`, defaults to `0.0`):
            Weight decay of the steering half.
    """

    orthogonal: bool = field(
        default=True, metadata={"help": "Keep steering orthogonal to what LoRA writes. False is naive joint training."}
    )
    orthogonal_every: int = field(default=1, metadata={"help": "Project every so many optimizer steps."})
    orthogonal_side: str = field(
        default="output",
        metadata={"help": "'output' projects W_up (the paper), 'input' W_down.", "choices": ["output", "input"]},
    )
    orthogonal_before_step: bool = field(
        default=False, metadata={"help": "Project before a step instead of after it."}
    )
    orthogonal_at_end: bool = field(
        default=True, metadata={"help": "Project after the last step too, and what is saved."}
    )
    orthogonal_gradients: bool = field(
        default=True, metadata={"help": "Project the gradients before each step, so that momentum does not push out."}
    )
    orthogonal_norms: bool = field(
        default=True, metadata={"help": "Count the norm between LoRA and the residual addition, where there is one."}
    )
    orthogonal_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules inside a block whose LoRA matrices count. Default: the MLP's last linear layer."},
    )
    lora_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the LoRA half, learning_rate if not given."}
    )
    steering_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the steering half, learning_rate if not given."}
    )
    steering_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the steering half."})

    def __post_init__(self):
        super().__post_init__()
        if self.orthogonal_side not in ("output", "input"):
            raise ValueError(f"orthogonal_side must be 'output' or 'input', got {self.orthogonal_side!r}.")
        every = self.orthogonal_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"orthogonal_every must be an integer of at least 1, got {every!r}.")
        if isinstance(self.orthogonal_modules, str):
            raise ValueError(
                f"orthogonal_modules must be a list of names, got the string {self.orthogonal_modules!r}."
            )
        for name in ("lora_learning_rate", "steering_learning_rate", "steering_weight_decay"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a number, finite and not negative, got {value!r}.")
