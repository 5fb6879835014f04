"""The base class of tuners that only steer."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from .config import check_choice
from .sums import check_summable, summed_config, write_sums
from .tuner import SteeringTuner


class _BlocksOnlyTuner(BaseTuner):
    """The next base class after [`SteeringTuner`] for tuners that have no targets other than blocks."""

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return False

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        raise ValueError(f"{current_key} cannot be steered, because it is not a block of the model.")


class SteeringModel(SteeringTuner, _BlocksOnlyTuner):
    """
    Base class of the tuners that only steer. A subclass sets `steering_layer_cls` and `tuner_layer_cls`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`SteeringConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.
    """

    prefix: str = "steering_"
    target_module_mapping: dict[str, list[str]] = {}

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """
        Adds an adapter whose update is exactly the weighted sum of the updates of other adapters. Vectors are added.
        Low-rank factors are concatenated, so that the rank is the sum of the ranks.

        Args:
            adapters (`list[str]`): Names of the adapters to combine. They must have the same type and activation.
            weights (`list[float]`): A weight for each adapter. May be negative.
            adapter_name (`str`): Name of the new adapter, which is not activated.
            combination_type (`str`, defaults to `"cat"`): `"cat"` or `"linear"`. Both give the exact sum.

        Raises:
            ValueError: An adapter does not exist, the new one already does, or the adapters have no exact sum.
            TypeError: A weight is not a number.
        """
        check_choice("combination_type", combination_type, ("cat", "linear"))
        check_summable(self, adapters, weights, adapter_name)
        self.peft_config[adapter_name] = summed_config(self, adapters)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        write_sums(self, adapters, weights, adapter_name)
