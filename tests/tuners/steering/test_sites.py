"""The anatomy of a block, and that each site is where its name says, on every family of models."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import transformers
from model_zoo import FAMILIES, HIDDEN_SIZE, tiny_inputs, tiny_model
from operator_cases import FORMS
from peft import LoraConfig, get_peft_model
from steering_cases import layers_of, logits, over_families, parameters_of, steer, weights_of
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, PretrainedConfig

from trl_steer import SublayerSteeringConfig, steering_operator
from trl_steer.tuners.steering import SITES, BlockAnatomy
from trl_steer.tuners.steering.matching import find_blocks
from trl_steer.tuners.steering.sites import get_hidden


class Parts(NamedTuple):
    attention: str
    mlp: str | None
    attention_output: str
    mlp_output: str | None
    norm_after_attention: str | None = None
    norm_after_mlp: str | None = None


LLAMA = Parts("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj")
EXPERTS = LLAMA._replace(mlp_output=None)  # whose weights are no linear layers
NORMS_BEHIND = LLAMA._replace(
    norm_after_attention="post_attention_layernorm", norm_after_mlp="post_feedforward_layernorm"
)
NEOX = Parts("attention", "mlp", "attention.dense", "mlp.dense_4h_to_h")
FALCON = Parts("self_attention", "mlp", "self_attention.dense", "mlp.dense_4h_to_h")
OPT = Parts("self_attn", None, "self_attn.out_proj", "fc2")
PARTS = {
    **dict.fromkeys(("llama", "llama_mlp_bias", "mistral", "qwen2", "qwen3", "phi3", "smollm3"), LLAMA),
    **dict.fromkeys(("llava", "qwen2_vl"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), EXPERTS),
    "qwen2_moe": LLAMA._replace(mlp_output="mlp.shared_expert.down_proj"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3n", "gemma3_vision", "olmo2"), NORMS_BEHIND),
    "starcoder2": LLAMA._replace(mlp_output="mlp.c_proj"),
    "gpt2": Parts("attn", "mlp", "attn.c_proj", "mlp.c_proj"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), NEOX),
    **dict.fromkeys(("falcon", "falcon_new", "falcon_rw"), FALCON),
    **dict.fromkeys(("opt", "opt_post_norm"), OPT),
}
# Blocks whose output is more than the sum of their input and their sublayers.
NOT_A_SUM = ("opt_post_norm", "gemma3n")


def anatomy_of(model: nn.Module, family: str, block: int = 0) -> BlockAnatomy:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return BlockAnatomy(base.get_submodule(FAMILIES[family].blocks)[block], base.config.get_text_config(decoder=True))


def parts_of(anatomy: BlockAnatomy) -> Parts:
    attention_output, mlp_output = anatomy.attention_output(), anatomy.mlp_output()
    return Parts(
        anatomy.attention,
        anatomy.mlp,
        attention_output,
        mlp_output,
        anatomy.norm_after(attention_output),
        mlp_output and anatomy.norm_after(mlp_output),
    )


@over_families
def test_parts_of_a_block_are_told_apart(family):
    assert parts_of(anatomy_of(tiny_model(family), family)) == PARTS[family]


@over_families
def test_parts_are_the_same_with_adapters_around_and_inside(family):
    model = steer(tiny_model(family), "low_rank")
    model = get_peft_model(model.get_base_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert parts_of(anatomy_of(model, family)) == PARTS[family]


@torch.no_grad()
def states_of(model: nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The hidden state at every site of the first block, and what goes into the block."""
    anatomy = anatomy_of(model, family)
    states: dict[str, torch.Tensor] = {}

    def keep(name, value):
        states.setdefault(name, get_hidden(value).clone())  # Falcon writes into its MLP's output

    for name in SITES:
        site = anatomy.site(name)
        module = anatomy.block.get_submodule(site.module)
        if site.is_input:
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: keep(name, args or kwargs), with_kwargs=True
            )
        else:
            module.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
    anatomy.block.register_forward_pre_hook(lambda _, args, kwargs: keep("block", args or kwargs), with_kwargs=True)
    model(**tiny_inputs())
    return states


@over_families
def test_every_site_has_the_width_that_it_names(family):
    model = tiny_model(family)
    states, anatomy = states_of(model, family), anatomy_of(model, family)
    for name in SITES:
        assert states[name].shape[-1] == anatomy.site(name).width
    assert {anatomy.site(name).width for name in SITES if name != "heads"} == {HIDDEN_SIZE}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_A_SUM])
def test_sublayer_outputs_are_what_is_added_to_the_residual_stream(family):
    states = states_of(tiny_model(family), family)
    total = states["block"] + states["post_attn"] + states["post_mlp"].view_as(states["block"])
    torch.testing.assert_close(states["post_block"], total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if PARTS[family].mlp_output and "moe" not in family])
def test_pre_mlp_is_what_the_mlp_computes_its_output_from(family):
    model = tiny_model(family)
    states, anatomy = states_of(model, family), anatomy_of(model, family)
    module = anatomy.block.get_submodule(anatomy.site("pre_mlp").module)
    first = next(child for child in module.modules() if isinstance(child, nn.Linear) or hasattr(child, "nx"))
    assert torch.equal(states["pre_mlp"].view(-1, HIDDEN_SIZE), _input_of(model, first).view(-1, HIDDEN_SIZE))


@torch.no_grad()
def _input_of(model: nn.Module, module: nn.Module) -> torch.Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**tiny_inputs())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_oss"])
def test_heads_are_as_wide_as_all_heads_together_where_that_is_not_the_hidden_size(family):
    model = tiny_model(family, head_dim=12)
    site = anatomy_of(model, family).site("heads")
    assert (site.width, site.is_input) == (4 * 12, True)
    assert states_of(model, family)["heads"].shape[-1] == 4 * 12


@pytest.mark.parametrize("site", ["post_block", "pre_mlp", "post_mlp", "post_attn"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "opt"])
def test_an_adapter_gets_the_hidden_state_of_its_site(family, site):
    expected = states_of(tiny_model(family), family)[site]
    model = steer(tiny_model(family), "low_rank" if site == "post_block" else f"{site}-low_rank")
    seen = []
    layers_of(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    logits(model)
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-6)


def test_unknown_site_is_named_along_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"no site 'post_norm'.*post_block.*pre_mlp.*post_mlp.*post_attn.*heads"):
        anatomy_of(tiny_model(), "llama").site("post_norm")


@pytest.mark.parametrize("site", ["pre_mlp", "post_attn", "heads"])
def test_a_site_that_a_block_does_not_have_is_refused_with_its_children(site):
    block = nn.Module()
    block.norm, block.mixer = nn.LayerNorm(8), nn.Identity()
    with pytest.raises(ValueError, match=f"the site '{site}'.*norm.*mixer"):
        BlockAnatomy(block, PretrainedConfig(hidden_size=8)).site(site)


def test_a_model_without_the_site_is_refused_and_stays_whole():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    base = MambaForCausalLM(config).eval()
    weights, expected = weights_of(base), logits(base)
    with pytest.raises(ValueError, match="the site 'post_attn'"):
        steer(base, "post_attn-low_rank")
    assert base.state_dict().keys() == weights.keys()
    assert not layers_of(base)
    assert torch.equal(logits(base), expected)


# Falcon with parallel attention adds the attention's output to what its MLP returns in place.
@pytest.mark.parametrize("operator", FORMS)
def test_an_update_that_the_block_writes_into_trains(operator):
    model = steer(tiny_model("falcon"), "post_mlp-low_rank").train()
    inputs = tiny_inputs()
    with steering_operator(operator):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters_of(model).values())


def blocks_of(model_cls: str, **fields) -> tuple[nn.Module, list[BlockAnatomy]]:
    """A tiny model outside of the zoo, and the anatomies of its two blocks."""
    common = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    cls = getattr(transformers, model_cls)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**common, **fields})).eval()
    config = model.config.get_text_config(decoder=True)
    return model, [BlockAnatomy(model.get_submodule(name), config) for name in find_blocks(model)]


MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4}
INKLING = {
    "head_dim": 8,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_cls", "fields", "post_attn", "post_mlp"),
    [
        # Whose MLP, and attention, return the sum of what they compute and the residual stream.
        ("BloomForCausalLM", {}, "self_attention.dense", "mlp.dense_4h_to_h"),
        ("MptForCausalLM", MPT, "attn", "ffn.down_proj"),
        # Whose sublayers are followed by convolutions.
        ("InklingForCausalLM", INKLING, "attn_sconv", "mlp_sconv"),
    ],
)
def test_outputs_of_further_architectures_are_what_is_added_to_the_residual_stream(
    model_cls, fields, post_attn, post_mlp
):
    model, anatomies = blocks_of(model_cls, **fields)
    anatomy, states = anatomies[1], {}
    assert (anatomy.site("post_attn").module, anatomy.site("post_mlp").module) == (post_attn, post_mlp)
    for name in ("", post_attn, post_mlp):
        anatomy.block.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: states.__setitem__(name, get_hidden(output))
        )
    anatomy.block.register_forward_pre_hook(
        lambda _, args, kwargs: states.__setitem__("input", get_hidden(args or kwargs)), with_kwargs=True
    )
    model(**tiny_inputs())
    torch.testing.assert_close(states[""], states["input"] + states[post_attn] + states[post_mlp])


def test_the_attention_of_a_block_that_adds_and_normalizes_is_what_its_projection_returns():
    _, anatomies = blocks_of("BertLMHeadModel", is_decoder=True, intermediate_size=48)
    assert anatomies[0].site("post_attn").module == "attention.output.dense"


def test_module_that_mixes_streams_around_a_sublayer_is_not_taken_for_it():
    block = nn.Module()
    for name in ("attn_hc", "ffn_hc", "self_attn", "mlp"):
        block.add_module(name, nn.Sequential(nn.Linear(8, 8)))
    anatomy = BlockAnatomy(block, PretrainedConfig(hidden_size=8))
    assert (anatomy.attention, anatomy.mlp) == ("self_attn", "mlp")


def test_an_attention_inside_of_what_also_normalizes_and_adds_is_found():
    block, attention = nn.Module(), nn.Module()
    attention.norm_1, attention.attn, attention.norm_2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
    block.norm_attn_norm = attention
    anatomy = BlockAnatomy(block, PretrainedConfig(hidden_size=8))
    assert anatomy.site("post_attn").module == "norm_attn_norm.attn"


# Experts beside an MLP for all tokens; the output that is added is that of neither.
@pytest.mark.parametrize("site", ["pre_mlp", "post_mlp"])
def test_of_several_mlps_side_by_side_none_is_taken_for_the_whole(site):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    model, _ = blocks_of("GraniteMoeSharedForCausalLM", shared_intermediate_size=16, **experts)
    with pytest.raises(ValueError, match=f"Could not find the site '{site}'.*block_sparse_moe.*shared_mlp"):
        get_peft_model(model, SublayerSteeringConfig(site=site))


def test_a_list_of_sublayers_which_is_never_called_is_no_site():
    block = nn.Module()
    block.self_attn = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    block.mlp, block.mlps = nn.Sequential(nn.Linear(8, 8)), nn.ModuleList([nn.Linear(8, 8)])
    for site in ("pre_mlp", "post_mlp", "post_attn"):
        with pytest.raises(ValueError, match="Could not find the site"):
            BlockAnatomy(block, PretrainedConfig(hidden_size=8)).site(site)


@pytest.mark.parametrize("site", ["pre_mlp", "post_mlp"])
def test_a_single_projection_is_not_taken_for_an_mlp(site):
    block = nn.Module()
    block.linear, block.mixer = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="Could not find the site"):
        BlockAnatomy(block, PretrainedConfig(hidden_size=8)).site(site)


@pytest.mark.parametrize("row", ["post_attn-low_rank", "post_mlp-low_rank", "post_mlp-vector", "pre_mlp-low_rank"])
def test_where_a_sublayer_adds_the_residual_stream_itself_updates_merge_exactly(row):
    model, _ = blocks_of("BloomForCausalLM")
    model = steer(model.double(), row)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-10, rtol=1e-10)


def test_where_a_block_attends_to_an_encoder_too_the_heads_are_those_of_its_self_attention():
    assert blocks_of("BartForConditionalGeneration", **BART)[1][0].site("heads").module == "self_attn.out_proj"
