"""The plugin, an entry point of the group `vllm.general_plugins`: vLLM calls [`register`] in each of its processes.

vLLM has no official interface for adapters other than LoRA, so that its managers of adapters are extended. Each name
that this relies on is checked first. A version of vLLM without them is left as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from typing import Any

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

# The versions that the tests were run with.
SUPPORTED = SpecifierSet("==0.32.*")
# Names in vLLM that are replaced, overridden or called here -> the arguments of functions, `None` for other objects.
RELIED_ON: dict[str, tuple[str, ...] | None] = {
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": None,
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._manager_cls": None,
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.__init__": (
        *("self", "vllm_config", "device", "embedding_modules", "lora_model_cls"),
    ),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.activate_adapter": ("self", "lora_id"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.lora_slots": None,
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.register_module": ("self", "module_name", "module"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._create_lora_modules": ("self",),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager._set_adapter_mapping": ("self", "mapping"),
    "vllm.lora.model_manager:LRUCacheLoRAModelManager.list_adapters": ("self",),
    "vllm.lora.layers.base:BaseLayerWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
    "vllm.lora.layers.base:BaseLayerWithLoRA.reset_lora": ("self", "index"),
    "vllm.lora.layers:LoRAMapping": ("index_mapping", "prompt_mapping", "is_prefill", "type"),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    "vllm.lora.lora_weights:LoRALayerWeights.__init__": (
        *("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter": (
        *("self", "request", "base_model_name"),
    ),
    "vllm.entrypoints.serve:create_error_response": ("message", "err_type", "status_code", "param"),
    "vllm.exceptions:LoRAAdapterNotFoundError": None,
    "vllm.model_executor.models.utils:PPMissingLayer": None,
}


def register() -> None:
    """Lets vLLM serve our adapter folders. Does nothing the second time, and nothing but a warning if it cannot."""
    reason = why_not()
    if reason is not None:
        logger.warning(
            "trl_steer leaves vLLM as it is: %s. Adapters of steering cannot be served. See the page "
            "integrations/vllm/README.md of trl_steer.",
            reason,
        )
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.worker import lora_model_runner_mixin

    from .manager import SteeringWorkerManager
    from .refusal import answer_with_status_400

    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is not SteeringWorkerManager:
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager = SteeringWorkerManager
        answer_with_status_400(OpenAIServingModels)


def why_not() -> str | None:
    """The reason why this vLLM cannot be extended, `None` if it can."""
    import vllm

    if not SUPPORTED.contains(vllm.__version__, prereleases=True):
        return f"it knows vLLM {SUPPORTED}, and this is {vllm.__version__}"
    if importlib.util.find_spec("peft") is None:
        return "the package peft, which reads adapter folders, is not installed"
    for name, arguments in RELIED_ON.items():
        problem = _problem(name, arguments)
        if problem is not None:
            return f"this vLLM {vllm.__version__} {problem}"
    return None


def _problem(name: str, arguments: tuple[str, ...] | None) -> str | None:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return f"has no {name}"
    if arguments is not None and tuple(inspect.signature(found).parameters) != arguments:
        return f"has other arguments of {name}"
    return None
