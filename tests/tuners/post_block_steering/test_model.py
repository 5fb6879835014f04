"""What post-block steering alone promises: where hidden states are steered, names and shapes of its file, the reason
why a low-rank update is not merged."""

from __future__ import annotations

import pytest
import torch
from model_zoo import FAMILIES, HIDDEN_SIZE, NUM_BLOCKS, tiny_inputs, tiny_model
from safetensors.torch import load_file
from steering_cases import KINDS, adapters_of, layers_of, over_families, over_kinds, steer, update_of


@over_kinds
@over_families
@pytest.mark.parametrize("captured_before", [True, False])
def test_hidden_states_are_the_steered_ones(family, kind, captured_before):
    def hidden_states(model):
        states = model(**tiny_inputs(), output_hidden_states=True).hidden_states
        return [state[0] if state.dim() == 4 else state for state in states]  # of several streams the residual one

    model = tiny_model(family)
    with torch.no_grad():
        if captured_before:
            unsteered = hidden_states(model)
        model = steer(model, kind)
        inputs_of_layers = {}
        for index, layer in enumerate(layers_of(model)):
            layer.register_forward_pre_hook(lambda _, args, index=index: inputs_of_layers.update({index: args[0]}))
        steered = hidden_states(model)
        assert len(steered) == NUM_BLOCKS + 1
        # the last one is what the final norm makes of it
        for index in range(NUM_BLOCKS - 1):
            h = inputs_of_layers[index]
            expected = h + update_of(adapters_of(model)[index], h)
            torch.testing.assert_close(steered[index + 1], expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(steered[index + 1], h, atol=1e-3)
        if captured_before:
            assert torch.equal(steered[0], unsteered[0])
            assert not torch.allclose(steered[-1], unsteered[-1], atol=1e-3)


@over_kinds
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "llava"])
def test_file_has_the_documented_names_and_shapes(family, kind, tmp_path):
    shapes = {"vector": (HIDDEN_SIZE,)}
    if kind != "vector":
        r = KINDS[kind]["r"]
        shapes = {"down": (r, HIDDEN_SIZE), "up": (HIDDEN_SIZE, r)}
    steer(tiny_model(family), kind).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == {
        f"base_model.model.{FAMILIES[family].blocks}.{index}.post_block_steering.steering_adapter.{tensor_name}": shape
        for index in range(NUM_BLOCKS)
        for tensor_name, shape in shapes.items()
    }


@pytest.mark.parametrize("kind", ["low_rank", "silu"])
def test_refusal_to_merge_says_why_and_what_to_do_instead(kind):
    with pytest.raises(ValueError, match="cannot be merged") as error:
        steer(tiny_model("gpt2"), kind).merge_and_unload()
    reason = "multiplies the residual stream" if kind == "low_rank" else "nonlinear"
    assert reason in str(error.value)
    assert "save_pretrained" in str(error.value)
    assert "vLLM" in str(error.value)
