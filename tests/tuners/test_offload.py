"""Models that accelerate has spread over devices or offloaded, here with the CPU and the disk as devices."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from model_zoo import FAMILIES, NUM_BLOCKS, tiny_inputs, tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from steering_cases import adapters_of, layers_of, logits, steer
from transformers import AutoModelForCausalLM
from tuner_cases import ROWS, over_cases, over_rows, over_rows_on


def device_map_of(family: str, offloaded: str) -> dict[str, str]:
    """The last two blocks on `offloaded`, all else on the CPU."""
    blocks = [f"{FAMILIES[family].blocks}.{index}" for index in range(NUM_BLOCKS)]
    names = set(blocks)
    for name, _ in tiny_model(family).named_parameters(remove_duplicate=False):
        if not name.startswith(tuple(f"{block}." for block in blocks)):
            names.add(name.rpartition(".")[0])
    return {name: offloaded if name in blocks[1:] else "cpu" for name in names}


@over_cases
def test_explicit_device_map_before_and_after_the_adapter(row, family):
    model = steer(tiny_model(family), row)
    expected = logits(model)
    device_map = {f"base_model.model.{name}": device for name, device in device_map_of(family, "cpu").items()}
    assert torch.equal(logits(dispatch_model(model, {**device_map, "": "cpu"}, "cpu", force_hooks=True)), expected)

    base = dispatch_model(tiny_model(family), {**device_map_of(family, "cpu"), "": "cpu"}, "cpu", force_hooks=True)
    model = steer(base, row)
    assert torch.equal(logits(model), expected)
    assert model.unload() is base
    assert torch.equal(logits(base), logits(tiny_model(family)))


@over_rows_on("llama", "gpt2", slow=("mixtral", "falcon"))
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("adapter_first", [True, False])
def test_offloaded_models_give_equal_logits(row, family, where, adapter_first, tmp_path, request):
    def offload(model):
        return cpu_offload(model) if where == "cpu" else disk_offload(model, tmp_path)

    if ROWS[row].has_lora and not adapter_first:
        reason = "PEFT does not move LoRA's weights to where an offloaded linear layer computes, plain LoRA's neither"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    expected = logits(steer(tiny_model(family), row))
    model = offload(steer(tiny_model(family), row)) if adapter_first else steer(offload(tiny_model(family)), row)
    assert next(model.get_input_embeddings().parameters()).is_meta  # it is offloaded
    assert torch.equal(logits(model), expected)
    generation = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    expected = steer(tiny_model(family), row).generate(**tiny_inputs(), **generation)
    assert torch.equal(model.generate(**tiny_inputs(), **generation), expected)


@over_rows_on("llama", "gpt2")
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_adapter_loads_onto_a_base_with_blocks_on_disk(row, family, low_cpu_mem_usage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes a copy of the files that hold what is on disk, below where it is run
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = steer(tiny_model(family), row)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")

    device_map = device_map_of(family, "disk")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    model = PeftModel.from_pretrained(
        base,
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": device for name, device in device_map.items()},
        offload_folder=tmp_path / "disk",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert any(parameter.is_meta for parameter in model.parameters())  # some blocks are on disk
    assert not any(parameter.is_meta for adapter in adapters_of(model) for parameter in adapter.parameters())
    assert torch.equal(logits(model), expected)

    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    if ROWS[row].has_lora:  # PEFT leaves LoRA's weights on the disk, where it cannot read them to save them
        return
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    again, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
    unloaded = model.unload()
    assert not layers_of(unloaded)
    assert torch.equal(logits(unloaded), logits(tiny_model(family)))


@over_rows
def test_adapter_whose_weights_are_away_when_it_runs_is_refused(row):
    expected = logits(steer(tiny_model(), row))
    # Brings all weights of a block at once, for as long as it runs. What is added to its output comes too late.
    model = cpu_offload(steer(tiny_model(), row), preload_module_classes=["LlamaDecoderLayer"])
    if all(layer.anatomy.site(layer.adapters["default"].site).module for layer in layers_of(model)):
        assert torch.equal(logits(model), expected)
        return
    with pytest.raises(RuntimeError, match=r"meta|offloaded"):
        logits(model)
