"""The plugin replaces what it knows in vLLM, and leaves every other version as it is."""

import importlib.metadata
import logging
import subprocess
import sys

import pytest
from serving_cases import WHY

pytest.importorskip("vllm", reason=WHY)

import vllm
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.v1.worker import lora_model_runner_mixin

from trl_steer.integrations.vllm import plugin


@pytest.fixture
def untouched(monkeypatch):
    """vLLM as it is without the plugin, after the test too."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", LRUCacheWorkerLoRAManager)
    monkeypatch.setattr(OpenAIServingModels, "load_lora_adapter", OpenAIServingModels.load_lora_adapter)
    return lambda: (lora_model_runner_mixin.LRUCacheWorkerLoRAManager, OpenAIServingModels.load_lora_adapter)


def test_it_is_an_entry_point_that_vllm_finds():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="trl_steer")
    assert found.load() is plugin.register


def test_it_extends_the_version_that_is_installed_once(untouched):
    before = untouched()
    plugin.register()
    after = untouched()
    assert plugin.why_not() is None
    assert all(one is not two for one, two in zip(before, after, strict=True))
    plugin.register()
    assert untouched() == after


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0.0"])
def test_an_unknown_version_is_left_alone_with_one_message(version, untouched, monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", version)
    before = untouched()
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert untouched() == before
    (said,) = [record.getMessage() for record in caplog.records if record.name == plugin.__name__]
    assert f"it knows vLLM ==0.32.*, and this is {version}" in said


@pytest.mark.parametrize("name", sorted(plugin.RELIED_ON))
def test_without_a_name_that_it_relies_on_vllm_is_left_alone(name, untouched, monkeypatch, caplog):
    gone, arguments = f"{name}_of_old", plugin.RELIED_ON[name]
    monkeypatch.setattr(plugin, "RELIED_ON", {**plugin.RELIED_ON, gone: arguments})
    before = untouched()
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert untouched() == before
    assert f"has no {gone}" in caplog.text


def test_other_arguments_of_a_method_are_noticed(untouched, monkeypatch, caplog):
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", lambda self, lora_request, device: None)
    before = untouched()
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert untouched() == before
    assert "has other arguments of vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter" in caplog.text


def test_loading_the_plugin_imports_neither_peft_nor_our_tuners():
    code = (
        "import sys; from trl_steer.integrations.vllm import plugin; plugin.register();"
        "print(sorted({'peft', 'trl', 'trl_steer.tuners'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
