"""LoFiT computes its formulas, on the heads that were asked for, with the parameters that the paper counts."""

from __future__ import annotations

import pytest
import torch
from head_cases import BASES, NUM_HEADS, assert_equal, double_model, run, run_plainly, steered, tensors_of
from model_zoo import COMMON, tiny_inputs, tiny_model
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from steering_cases import adapters_of, layers_of, logits, steer
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from tuner_cases import HEADS

from trl_steer import JolaConfig, LofitConfig, hotswap_adapter
from trl_steer.eval.reproduce.shapes import SHAPES

over_bases = pytest.mark.parametrize("base", BASES)


def rows(tensor: torch.Tensor, block: int, only_heads: bool) -> torch.Tensor:
    """(H, k) from the rows of the heads that have one."""
    if not only_heads:
        return tensor
    mine = [head for at, head in HEADS if at == block]
    zero = torch.zeros(tensor.shape[1], dtype=tensor.dtype)
    return torch.stack([tensor[mine.index(head)] if head in mine else zero for head in range(NUM_HEADS)])


@over_bases
@pytest.mark.parametrize("scaling", [1.0, -0.7])
@pytest.mark.parametrize("row", ["lofit", "lofit-heads", "lofit-scale"])
def test_logits_and_gradients_are_those_of_the_formula(row, scaling, base):
    model = steered(base, row, scaling=scaling)
    tensors = tensors_of(model)
    found, by_embeddings, by_tensors = run(model)

    def update(x, block, tensor):
        if row == "lofit-scale":
            return x * (1 + scaling * tensor)
        return x + scaling * rows(tensor, block, row == "lofit-heads")

    expected = run_plainly(base, tensors, update)
    assert_equal([found, by_embeddings, *by_tensors], [expected[0], expected[1], *expected[2]])
    with model.disable_adapter():
        assert not torch.allclose(found, model(**tiny_inputs()).logits, atol=1e-3)


@over_bases
def test_tensors_are_the_query_heads_and_their_size(base):
    k = BASES[base][2]
    for row, name in (("lofit", "offset"), ("lofit-scale", "scale")):
        for adapter in adapters_of(steered(base, row)):
            assert {n: tuple(p.shape) for n, p in adapter.named_parameters()} == {name: (NUM_HEADS, k)}
    shapes = [tuple(adapter.offset.shape) for adapter in adapters_of(steered(base, "lofit-heads"))]
    assert shapes == [(2, k), (1, k), (3, k)]


def test_blocks_without_heads_have_no_adapter():
    model = steer(tiny_model(), "lofit", heads={1: [2]})
    assert [name for name, _ in model.base_model.named_steering_layers()] == ["model.layers.1.lofit"]
    assert model.get_nb_trainable_parameters()[0] == 8


@pytest.mark.parametrize("row", ["lofit", "lofit-scale"])
def test_a_new_adapter_is_close_to_the_base_model_and_not_it(row):
    wide = {"hidden_size": 512, "num_attention_heads": 64, "num_key_value_heads": 64}
    model = steer(tiny_model(**wide), row, fresh=True)
    values = torch.cat([p.detach().flatten() for a in adapters_of(model) for p in a.parameters()])
    assert values.std() == pytest.approx(1e-3, rel=0.1)
    assert abs(values.mean()) < 2e-4
    assert not any(adapter.starts_at_identity for adapter in adapters_of(model))
    with model.disable_adapter():
        expected = logits(model)
    assert 0 < (logits(model) - expected).norm() < 0.05 * expected.norm()


# LoFiT's parameters and JoLA's
COUNTS = {
    "meta-llama/Llama-3.2-1B": (32_768, 66_560),
    "google/gemma-3-1b-pt": (26_624, 53_456),
    "Qwen/Qwen3-4B": (147_456, 297_216),
    "meta-llama/Llama-3.1-8B": (131_072, 264_192),
}


@pytest.mark.parametrize("name", COUNTS)
def test_trainable_parameters_are_those_of_the_paper(name):
    lofit, jola = COUNTS[name]
    for config, expected in ((LofitConfig(), lofit), (JolaConfig(), jola)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
        assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == expected


def test_heads_of_blocks_may_differ_in_number():
    base = tiny_model("llama")
    attention = base.model.layers[1].self_attn
    attention.head_dim, attention.o_proj = 16, torch.nn.Linear(64, 32, bias=False)
    model = get_peft_model(base, LofitConfig())
    assert [tuple(a.offset.shape) for a in adapters_of(model)] == [(4, 8), (4, 16), (4, 8)]


def test_heads_of_latent_attention_have_the_size_of_its_values():
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    base = DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON, **sizes, first_k_dense_replace=3))
    assert [tuple(a.offset.shape) for a in adapters_of(get_peft_model(base, LofitConfig()))] == [(4, 6)] * 3


def test_a_width_that_is_not_made_of_heads_is_refused():
    base = tiny_model("llama")
    base.model.layers[1].self_attn.head_dim = 7
    with pytest.raises(ValueError, match=r"heads of model.layers.1.*o_proj has 32 entries.*size 7"):
        get_peft_model(base, LofitConfig())
    assert not layers_of(base)


def test_stock_peft_loads_heads_from_a_folder(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = steer(base, "lofit", heads={0: [1], 2: [0, 3]})
    expected = logits(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


def test_a_folder_with_other_heads_cannot_be_loaded_or_swapped_in(tmp_path):
    steer(tiny_model(), "lofit", heads={0: [1], 2: [0, 3]}).save_pretrained(tmp_path)
    model = steer(tiny_model(), "lofit", heads={0: [1], 2: [0, 2]})
    before = logits(model)
    with pytest.raises(ValueError, match=r"heads is .*0, 3.* 0, 2|heads"):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
    hotswap_adapter(same := steer(tiny_model(), "lofit", heads={0: [1], 2: [0, 3]}, seed=3), tmp_path)
    assert torch.equal(logits(same), logits(PeftModel.from_pretrained(tiny_model(), tmp_path)))


# Sums


def update_at(adapter, x: torch.Tensor) -> torch.Tensor:
    return adapter(x) - x


def assert_sum_is_exact(model, weights: dict[str, float]) -> None:
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for layer in layers_of(model):
        parts = [
            weight * update_at(layer.adapters[name], x) for name, weight in weights.items() if name in layer.adapters
        ]
        torch.testing.assert_close(update_at(layer.adapters["sum"], x), sum(parts), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("row", ["lofit", "lofit-scale", "jola"])
def test_weighted_sums_are_exact(row):
    model = steer(double_model("llama"), row, "a", seed=1, scaling=0.5)
    model = steer(model, row, "b", seed=2).double()
    assert_sum_is_exact(model, {"a": 0.7, "b": -2.0})


@pytest.mark.parametrize("row", ["lofit", "lofit-scale"])
def test_sums_of_different_heads_have_the_heads_of_both(row):
    model = steer(double_model("llama"), row, "a", seed=1, heads={0: [1], 1: [0, 3]})
    model = steer(model, row, "b", seed=2, heads={1: [2, 3], 2: [0]}).double()
    assert_sum_is_exact(model, {"a": 0.7, "b": -2.0})
    assert model.peft_config["sum"].heads == {0: [1], 1: [0, 2, 3], 2: [0]}
    steer(model, row, "all", seed=3, layers_to_transform=[0]).double()
    model.add_weighted_adapter(["a", "all"], [1.0, 1.0], "everywhere")
    assert model.peft_config["everywhere"].heads is None


def test_offsets_and_scales_have_no_sum():
    model = steer(steer(tiny_model(), "lofit", "a"), "lofit-scale", "b")
    with pytest.raises(ValueError, match="phase"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
