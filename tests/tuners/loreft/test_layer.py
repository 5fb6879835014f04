"""LoReFT against its formula, and the rotation that stays one."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from steering_cases import adapters_of, logits
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_steer import LoReftConfig
from trl_steer.tuners.loreft import LoReftAdapter

WIDTH, RANK = 24, 5


def new_adapter(seed: int = 0, **fields) -> LoReftAdapter:
    torch.manual_seed(seed)
    adapter = LoReftAdapter(WIDTH, LoReftConfig(r=RANK, **fields)).double()
    adapter.reset_parameters()
    return adapter


def gram_schmidt(matrix: torch.Tensor) -> torch.Tensor:
    """Rows made orthonormal one after the other."""
    rows: list[torch.Tensor] = []
    for row in matrix:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def reference(h, rotation, weight, bias, activation=None, scaling=1.0):
    """`h + R^T (act(W h + b) - R h)` for each token, with `R` from a matrix that is none yet."""
    rotation = gram_schmidt(rotation)
    source = torch.einsum("rd,nd->nr", weight, h) + bias
    source = source if activation is None else activation(source)
    return h + scaling * torch.einsum("rd,nr->nd", rotation, source - torch.einsum("rd,nd->nr", rotation, h))


def tensors_of(adapter: LoReftAdapter) -> list[torch.Tensor]:
    return [dict(adapter.named_parameters())[name].detach().clone() for name in ("rotation", "weight", "bias")]


@pytest.mark.parametrize("is_stepped", [False, True])
@pytest.mark.parametrize(("name", "activation"), [(None, None), ("silu", F.silu), ("gelu", F.gelu)])
def test_forward_and_all_gradients_are_those_of_the_formula(name, activation, is_stepped):
    adapter = new_adapter(activation=name)
    if is_stepped:  # a matrix as an optimizer leaves it
        with torch.no_grad():
            adapter._parameters["rotation"].add_(0.1 * torch.randn(RANK, WIDTH, dtype=torch.float64))
    h = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    h_too, before = h.detach().clone().requires_grad_(), tensors_of(adapter)
    found = adapter(h, scaling=0.7)
    torch.testing.assert_close(found, reference(h, *before, activation, 0.7), atol=1e-10, rtol=0)
    inputs = [tensor.requires_grad_() for tensor in tensors_of(adapter)]  # with the orthonormal one in its place
    expected = reference(h_too, *inputs, activation, 0.7)
    gradient = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, [h_too, *inputs], gradient)
    parameters = [dict(adapter.named_parameters())[key] for key in ("rotation", "weight", "bias")]
    for one, other in zip(torch.autograd.grad(found, [h, *parameters], gradient), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_dropout_acts_on_the_whole_output_and_in_training_only():
    adapter, h = new_adapter(dropout=0.5), torch.randn(50, WIDTH, dtype=torch.float64)
    whole = adapter.eval()(h)
    torch.testing.assert_close(whole, reference(h, *tensors_of(adapter)), atol=1e-10, rtol=0)
    dropped = adapter.train()(h)
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], atol=1e-10, rtol=0)


def test_parts_that_share_nothing_have_a_rotation_each():
    adapter = new_adapter(positions="f2+l2", share_weights=False)
    assert [tuple(tensor.shape) for tensor in tensors_of(adapter)] == [(2, RANK, WIDTH), (2, RANK, WIDTH), (2, RANK)]
    h = torch.randn(7, WIDTH, dtype=torch.float64)
    for part in (0, 1):
        expected = reference(h, *(tensor[part] for tensor in tensors_of(adapter)))
        torch.testing.assert_close(adapter(h, part=part), expected, atol=1e-10, rtol=0)


def test_the_first_tokens_of_a_prompt_get_the_first_part_and_the_last_the_second():
    config = LoReftConfig(r=3, positions="f2+l2", share_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(dtype=torch.float64), config, autocast_adapter_dtype=False).eval()
    for adapter in adapters_of(model):
        adapter.double().reset_parameters()  # orthonormal in float64
    inputs = tiny_inputs(rows=2, length=9)
    with torch.no_grad():
        steered = model(**inputs, output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            h = model(**inputs, output_hidden_states=True).hidden_states[1]
    tensors = tensors_of(adapters_of(model)[0])
    expected = h.clone()
    for row in range(2):
        for part, tokens in enumerate((slice(0, 2), slice(7, 9))):
            expected[row, tokens] = reference(h[row, tokens], *(tensor[part] for tensor in tensors))
    torch.testing.assert_close(steered, expected, atol=1e-10, rtol=0)


def distance(rotation: torch.Tensor) -> float:
    return (rotation @ rotation.mT - torch.eye(rotation.shape[-2])).abs().max().item()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_rotation_stays_orthonormal_through_training_saving_and_loading(tmp_path, weight_decay):
    model = get_peft_model(tiny_model(), LoReftConfig(r=4, task_type="CAUSAL_LM")).train()
    before = [adapter.rotation.detach().clone() for adapter in adapters_of(model)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=weight_decay
    )
    inputs = tiny_inputs(rows=4)
    for _ in range(200):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        assert max(distance(adapter.rotation) for adapter in adapters_of(model)) < 1e-5
    for adapter, old in zip(adapters_of(model), before, strict=True):
        assert (adapter.rotation - old).abs().max() > 0.1
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rotations = [tensor for key, tensor in saved.items() if key.endswith("loreft.steering_adapter.rotation")]
    assert len(rotations) == len(adapters_of(model))
    assert max(map(distance, rotations)) < 1e-5
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert max(distance(adapter.rotation) for adapter in adapters_of(loaded)) < 1e-5


def test_a_rotation_that_is_none_is_not_loaded(tmp_path):
    get_peft_model(tiny_model(), LoReftConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(".rotation"))
    save_file({**tensors, key: tensors[key] * 2}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"rotation should have orthonormal rows, but max \|R R\^T - I\| is 3"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_nothing_of_size_d_times_d_is_made():
    with torch.device("meta"):
        adapter = LoReftAdapter(4096, LoReftConfig(r=8))
        adapter.reset_parameters()
        sizes: list[int] = []

        class Sizes(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                sizes.extend(
                    t.numel() for t in (result if isinstance(result, tuple) else (result,)) if hasattr(t, "numel")
                )
                return result

        with Sizes():
            adapter.train()(torch.empty(2, 4096)).sum().backward()
    assert sum(p.numel() for p in adapter.parameters()) == 8 * 4096 * 2 + 8
    assert not list(adapter.buffers())
    assert max(sizes) <= 8 * 4096 * 2


@pytest.mark.parametrize(
    ("hidden_size", "blocks", "count"),
    [(2048, 16, 524_416), (1152, 26, 479_440), (2560, 36, 1_474_848), (4096, 32, 2_097_408)],
    ids=["Llama-3.2-1B", "Gemma-3-1B", "Qwen3-4B", "Llama-3.1-8B"],
)
def test_parameters_are_as_many_as_the_paper_counts(hidden_size, blocks, count):
    config = LlamaConfig(
        hidden_size=hidden_size, num_hidden_layers=blocks, intermediate_size=64, vocab_size=64, num_attention_heads=8
    )
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoReftConfig(r=8), low_cpu_mem_usage=True)
    assert model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"site": "pre_mlp"}, "Expected site to be one of 'post_block', 'post_mlp', got 'pre_mlp'"),
        ({"share_weights": False}, "positions='all'"),
        ({"share_weights": False, "positions": "last_prompt"}, "positions='last_prompt'"),
        ({"activation": "prelu"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoReftConfig(**fields)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match="r=40 is more than the 32 dimensions"):
        get_peft_model(tiny_model(), LoReftConfig(r=40))


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_rotation_that_diverged_gives_no_linear_algebra_error(value):
    adapter = new_adapter()
    with torch.no_grad():
        adapter._parameters["rotation"].fill_(value)
    assert not adapter(torch.randn(3, WIDTH, dtype=torch.float64)).isfinite().all()


def test_a_new_rotation_of_a_bf16_model_is_orthonormal_in_float32():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), LoReftConfig(r=4, task_type="CAUSAL_LM")).eval()
    for adapter in adapters_of(model):
        assert adapter.rotation.dtype == torch.float32
        assert distance(adapter.rotation) < 1e-5
