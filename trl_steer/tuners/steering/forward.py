"""Calls of the model by a tuner: selects the adapter for each row, and finds the prompt in `generate`."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper

from .matching import modules_outside_adapters
from .prompts import generation, is_watched
from .rows import adapters_by_row


class ForwardMixin(BaseTuner):
    """The part of a tuner that PEFT calls in forward passes and in `generate`."""

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        """Like [`~peft.PeftModel`]: `adapter_names` selects the adapter for each row of the batch. A change of an
        adapter while `generate` runs counts from the next call on."""
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        with self._enable_peft_forward_hooks(adapter_names=adapter_names):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any):
        """Like the method of the model. The inputs are the prompt in all of its forward passes."""
        with generation(self.model, args, kwargs) if is_watched(self.model) else nullcontext():
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def _other_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """The forward hooks of a tuner of PEFT that is a base class too. Not found by `getattr`, which torch.compile
        does not trace."""
        return nullcontext()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        with self._other_forward_hooks(*args, **kwargs):
            if adapter_names is None:
                yield
                return
            if self.training:
                raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
            unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
            if unknown:
                raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
            types = (self.tuner_layer_cls, AuxiliaryTrainingWrapper)
            layers = [module for _, module in modules_outside_adapters(self) if isinstance(module, types)]
            with adapters_by_row(layers, adapter_names, args, kwargs, self.model):
                yield
