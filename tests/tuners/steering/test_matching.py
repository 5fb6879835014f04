"""Which blocks are found and chosen."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import FAMILIES, NUM_BLOCKS, VISION, tiny_inputs, tiny_model
from peft import PeftModel
from steering_cases import layers_of, logits, over_families, steer, steering_config
from torch import nn
from transformers import PretrainedConfig

from trl_steer import PostBlockSteeringConfig
from trl_steer.tuners.steering.matching import BlockMatcher, block_index, find_blocks


class Block(nn.Module):
    def __init__(self, width: int = 8, experts: int = 0):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, hidden):
        return hidden + self.linear(hidden)


class Stacks(nn.Module):
    """A model with a list of blocks for each name, and none of transformers' conventions but a config."""

    def __init__(self, experts: int = 0, width: int | None = 8, **lengths: int):
        super().__init__()
        fields = {} if width is None else {"hidden_size": width}
        self.config = PretrainedConfig(num_hidden_layers=2, **fields)
        for name, length in lengths.items():
            setattr(self, name, nn.ModuleList(Block(experts=experts) for _ in range(length)))

    def forward(self, hidden):
        for blocks in self.children():
            for block in blocks:
                hidden = block(hidden)
        return hidden


def matched(model: nn.Module, **fields) -> list[str]:
    matcher = BlockMatcher(model, PostBlockSteeringConfig(**fields))
    return [name for name, _ in model.named_modules() if matcher(name)]


def indices(names: list[str]) -> list[int]:
    return [block_index(name) for name in names]


# Discovery


@over_families
def test_blocks_of_every_family_are_found_first_to_last(family):
    expected = [f"{FAMILIES[family].blocks}.{index}" for index in range(NUM_BLOCKS)]
    assert find_blocks(tiny_model(family)) == expected
    assert find_blocks(steer(tiny_model(family)).get_base_model()) == expected  # also when steered already


@pytest.mark.parametrize(
    ("model_cls", "blocks", "fields"),
    [
        ("BloomForCausalLM", "transformer.h", {}),
        ("CTRLLMHeadModel", "transformer.h", {"dff": 32}),
        ("CodeGenForCausalLM", "transformer.h", {"rotary_dim": 4}),
        ("CohereForCausalLM", "model.layers", {}),
        ("GPTBigCodeForCausalLM", "transformer.h", {}),
        ("GPTJForCausalLM", "transformer.h", {"rotary_dim": 4}),
        ("GPTNeoForCausalLM", "transformer.h", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
        ("GraniteForCausalLM", "model.layers", {}),
        ("MambaForCausalLM", "backbone.layers", {"state_size": 4}),
        ("ModernBertDecoderForCausalLM", "model.layers", {}),
        ("MptForCausalLM", "transformer.blocks", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("PhiForCausalLM", "model.layers", {}),
        ("StableLmForCausalLM", "model.layers", {}),
        ("LlamaForSequenceClassification", "model.layers", {}),
        ("LlamaModel", "layers", {}),
        ("GPT2Model", "h", {}),
    ],
)
def test_blocks_of_further_architectures_are_found(model_cls, blocks, fields):
    model_cls = getattr(transformers, model_cls)
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    with torch.device("meta"):
        model = model_cls(model_cls.config_class(**{**common, **fields}))
    assert find_blocks(model) == [f"{blocks}.0", f"{blocks}.1"]


@pytest.mark.parametrize("family", ["llava", "gemma3_vision", "qwen2_vl"])
def test_vision_tower_with_as_many_layers_is_never_steered(family):
    base = tiny_model(family)
    towers = [name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and "vi" in name]
    assert any(len(base.get_submodule(name)) == VISION["num_hidden_layers"] == NUM_BLOCKS for name in towers)
    model = steer(base)
    assert model.targeted_module_names == [f"{FAMILIES[family].blocks}.{index}" for index in range(NUM_BLOCKS)]
    # nor is it by an ending that would fit it too
    ending = steer(tiny_model(family), target_modules=["layers.0"])
    assert ending.targeted_module_names == [f"{FAMILIES[family].blocks}.0"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_list_of_as_many_experts_is_not_a_list_of_blocks(family):
    model = Stacks(experts=2, layers=2)
    assert find_blocks(model) == ["layers.0", "layers.1"]
    assert find_blocks(tiny_model(family)) == [f"model.layers.{index}" for index in range(NUM_BLOCKS)]


@pytest.mark.parametrize(
    "lengths", [{"encoder": 2, "decoder": 2}, {"layers": 3}, {}], ids=["several fit", "none fits", "no list at all"]
)
def test_error_asks_for_target_modules_with_an_example(lengths):
    model = Stacks(**lengths)
    with pytest.raises(ValueError, match=re.escape("target_modules=")) as error:
        steer(model, task_type=None)
    found = "found several: ['decoder', 'encoder']" if "encoder" in lengths else "found none"
    assert found in str(error.value)
    assert "Stacks" in str(error.value)


def test_named_blocks_of_a_model_that_cannot_be_searched_are_steered():
    hidden = torch.randn(2, 3, 8)
    model = Stacks(encoder=2, decoder=2).eval()
    expected = model(hidden)
    model = steer(model, task_type=None, target_modules=["decoder"])
    assert model.targeted_module_names == ["decoder.0", "decoder.1"]
    assert not torch.allclose(model(hidden), expected)


def test_unknown_width_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="hidden_size"):
        steer(Stacks(layers=2, width=None), task_type=None)


# Choice


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"target_modules": ["model.layers"]}, [0, 1, 2]),
        ({"target_modules": ["layers"]}, [0, 1, 2]),
        ({"target_modules": ["layers.1"]}, [1]),
        ({"target_modules": ["model.layers.0", "layers.2"]}, [0, 2]),
        ({"target_modules": r"model\.layers\.[02]"}, [0, 2]),
        ({"target_modules": r".*\.layers\.\d+"}, [0, 1, 2]),
        ({"exclude_modules": ["layers.1"]}, [0, 2]),
        ({"exclude_modules": r".*\.0"}, [1, 2]),
        ({"target_modules": ["layers"], "exclude_modules": ["model.layers.2"]}, [0, 1]),
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [2, 0]}, [0, 2]),
        ({"target_modules": ["model.layers"], "layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": [0, 1], "exclude_modules": ["layers.0"]}, [1]),
        ({"modules_to_save": ["layers.0"]}, [1, 2]),
    ],
)
def test_fields_choose_blocks(fields, expected):
    assert indices(matched(tiny_model(), **fields)) == expected
    layers = layers_of(steer(tiny_model(), **fields))
    assert len(layers) == len(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, "no block 'q_proj'"),
        ({"target_modules": ["layers.7"]}, "no block 'layers.7'"),
        ({"target_modules": ["layers", "nonsense"]}, "no block 'nonsense'"),
        ({"target_modules": r".*q_proj"}, "No block to steer"),
        ({"target_modules": "all-linear"}, "No block to steer"),
        ({"target_modules": []}, "No block to steer"),
        ({"exclude_modules": ["layers"]}, "No block to steer"),
        ({"exclude_modules": ["lm_head"]}, "no block 'lm_head'"),
        ({"layers_to_transform": [0, 3]}, r"contains \[3\]"),
        ({"layers_to_transform": [1], "exclude_modules": ["layers.1"]}, "No block to steer"),
    ],
)
def test_missing_blocks_are_refused_and_the_model_is_unchanged(fields, message):
    base = tiny_model()
    expected, names = logits(base), [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message) as error:
        steer(base, **fields)
    assert "model.layers.0, model.layers.1, model.layers.2" in str(error.value)
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(logits(base), expected)


def test_unsteered_blocks_stay_as_they_were():
    base = tiny_model()
    with torch.no_grad():
        expected = base(**tiny_inputs(), output_hidden_states=True).hidden_states
        steered = steer(base, layers_to_transform=[1])(**tiny_inputs(), output_hidden_states=True).hidden_states
    assert torch.equal(steered[0], expected[0])
    assert torch.equal(steered[1], expected[1])
    assert not torch.allclose(steered[2], expected[2], atol=1e-3)


def test_many_named_blocks_survive_saving(tmp_path):
    # PEFT shortens lists of 20 targets and more
    blocks = [f"model.layers.{index}" for index in range(24) if index != 11]
    model = steer(tiny_model(num_hidden_layers=24), "vector", target_modules=blocks)
    assert model.targeted_module_names == blocks
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(num_hidden_layers=24), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert indices(loaded.targeted_module_names) == indices(blocks)


def test_compiled_model_is_matched_under_the_names_of_the_original():
    compiled = torch.compile(tiny_model(), backend="eager")
    assert matched(compiled, layers_to_transform=[1]) == ["_orig_mod.model.layers.1"]
    assert matched(compiled, target_modules=r"model\.layers\.2") == ["_orig_mod.model.layers.2"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_choice_is_the_intersection_of_its_fields(data):
    count = data.draw(st.integers(1, 13), label="blocks")
    everything = list(range(count))
    subsets = st.lists(st.sampled_from(everything), min_size=1, unique=True)
    targets = data.draw(st.none() | subsets, label="target_modules")
    excluded = data.draw(st.none() | subsets, label="exclude_modules")
    layers = data.draw(st.none() | subsets, label="layers_to_transform")

    def name(index):
        full = f"layers.{index}"
        return full if data.draw(st.booleans()) else f"model.{full}"

    model = nn.Module()
    model.config = PretrainedConfig(num_hidden_layers=count)
    model.model = Stacks(layers=count)
    fields = {
        "target_modules": targets and [name(index) for index in targets],
        "exclude_modules": excluded and [name(index) for index in excluded],
        "layers_to_transform": layers,
    }
    expected = set(everything if targets is None else targets) - set(excluded or ())
    expected &= set(everything if layers is None else layers)
    if expected:
        assert indices(matched(model, **fields)) == sorted(expected)
    else:
        with pytest.raises(ValueError, match="No block to steer"):
            matched(model, **fields)


def test_block_index_is_the_number_at_the_end():
    assert block_index("model.layers.13") == 13
    with pytest.raises(ValueError, match="lm_head"):
        block_index("lm_head")


def test_one_config_serves_models_of_different_depth():
    config = steering_config("vector")
    for count in (2, 4):
        matcher = BlockMatcher(tiny_model(num_hidden_layers=count), config)
        assert len(matcher.blocks) == count
