"""A joint adapter is a LoRA and a steering adapter in one: it keeps the promises of both."""

import copy

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig, adapter_scaling, hotswap_adapter, set_scaling
from trl_steer.tuners.joint_steering import join_adapters, split_adapter

FAMILIES = ["llama", "gemma3", "gpt2", "mixtral"]
STEERING = {
    "low_rank": {"r": 2, "init_weights": False},
    "vector": {"steering_type": "vector", "init_weights": False},
}


def config_for(steering="low_rank", **kwargs):
    return JointSteeringConfig(
        **{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", "steering": STEERING[steering], **kwargs}
    )


def joint_model(family="llama", **kwargs):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(family), config_for(**kwargs)).eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_model_and_a_random_one_is_not(family):
    base = tiny_model(family).eval()
    fresh = get_peft_model(copy.deepcopy(base), JointSteeringConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(fresh), logits(base))
    assert not torch.allclose(logits(joint_model(family)), logits(base), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_lora_is_on_every_linear_layer_in_the_blocks_and_nowhere_else(family):
    base = tiny_model(family)
    inside = {
        name
        for name, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    }
    model = get_peft_model(base, JointSteeringConfig())
    wrapped = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == inside


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_lora_on_embeddings_saves_and_loads_with_them(targets, tmp_path):
    model = joint_model(target_modules=targets)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize("steering", STEERING)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_loads_exactly(family, steering, tmp_path):
    model = joint_model(family, steering=steering)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    low_memory = PeftModel.from_pretrained(tiny_model(family), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low_memory), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # untied and tied embeddings
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_embeddings_that_lora_adapts_load_with_the_original_that_peft_saves_beside(fields, family, tmp_path):
    model = joint_model(family, target_modules=["q_proj", "embed_tokens"], **fields)
    model.save_pretrained(tmp_path)
    assert any("embed_tokens.base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), logits(model))
    other = joint_model(family, target_modules=["q_proj", "embed_tokens"])
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_own_loader_finds_both_halves(family, tmp_path):
    model = joint_model(family)
    model.save_pretrained(tmp_path)
    base = tiny_model(family).eval()
    report = base.load_adapter(tmp_path)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(base), logits(model))


def test_keys_of_the_lora_half_are_those_of_lora_alone():
    joint = get_peft_model_state_dict(joint_model(target_modules=["q_proj", "down_proj"]))
    alone = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    steering = {key for key in joint if ".post_block_steering." in key}
    assert set(joint) - steering == set(get_peft_model_state_dict(alone))
    assert steering
    assert all(key.endswith((".down", ".up")) for key in steering)


@pytest.mark.parametrize("steering", STEERING)
def test_halves_split_into_folders_that_add_up_and_join_back(steering, tmp_path):
    model = joint_model(steering=steering)
    model.save_pretrained(tmp_path / "joint")
    split_adapter(tmp_path / "joint", lora=tmp_path / "lora", steering=tmp_path / "steering")

    for half in ("lora", "steering"):
        assert "library_name: peft" in (tmp_path / half / "README.md").read_text()
    lora = PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")
    assert type(lora.peft_config["default"]) is LoraConfig
    halves = inject_adapter_in_model(
        PostBlockSteeringConfig.from_pretrained(tmp_path / "steering"), lora.base_model.model
    )
    weights = load_file(tmp_path / "steering" / "adapter_model.safetensors")
    with torch.no_grad():
        for key, tensor in weights.items():
            head, _, tensor_name = key.removeprefix("base_model.model.").rpartition(".")
            halves.get_parameter(f"{head}.default.{tensor_name}").copy_(tensor)
    assert torch.equal(logits(halves.eval()), logits(model))

    join_adapters(tmp_path / "lora", tmp_path / "steering", tmp_path / "joined")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "joined")), logits(model))
    names = ["joint", "joined"]
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    assert before.keys() == after.keys()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_saved_with_the_lora_half_and_missed_when_they_are_gone(bias, tmp_path):
    model = joint_model("gpt2", bias=bias, target_modules=["c_proj", "c_fc"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")}
    assert any("c_proj.base_layer" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "joint")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "joint")), logits(model))

    split_adapter(tmp_path / "joint", lora=tmp_path / "lora", steering=tmp_path / "steering")
    lora = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "lora")
    state = lora.state_dict()
    assert all(torch.equal(state[name], parameter) for name, parameter in trained.items())

    path = tmp_path / "joint" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("c_proj.base_layer.bias"))
    save_file({k: t for k, t in tensors.items() if k != key}, path)
    with pytest.raises(ValueError, match=key.replace(".", r"\.") + " is missing"):
        PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "joint")


def test_splitting_and_joining_refuse_invalid_folders(tmp_path):
    joint_model().save_pretrained(tmp_path / "joint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        split_adapter(tmp_path / "joint", lora=tmp_path / "full", steering=tmp_path / "steering")
    assert not (tmp_path / "steering").exists()
    with pytest.raises(ValueError, match="expected a LoraConfig"):
        join_adapters(tmp_path / "joint", tmp_path / "joint", tmp_path / "out")
    replicated = get_peft_model(tiny_model(), JointSteeringConfig(layer_replication=[(0, 2), (1, 3)]))
    replicated.save_pretrained(tmp_path / "replicated")
    with pytest.raises(ValueError, match="layer_replication"):
        split_adapter(tmp_path / "replicated", lora=tmp_path / "lora", steering=tmp_path / "steering")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "joint", "replicated"]


@pytest.mark.parametrize(("lora", "steering"), [("out", "out"), ("out/lora", "out"), ("out", "out/steering")])
def test_splitting_into_folders_that_share_a_place_writes_nothing(lora, steering, tmp_path):
    joint_model().save_pretrained(tmp_path / "joint")
    with pytest.raises(ValueError, match="must not be the same"):
        split_adapter(tmp_path / "joint", lora=tmp_path / lora, steering=tmp_path / steering)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("half", ["lora_A", "steering", "file", "content"])
def test_splitting_an_incomplete_adapter_is_refused(half, tmp_path):
    joint_model().save_pretrained(tmp_path / "joint")
    path = tmp_path / "joint" / "adapter_model.safetensors"
    if half == "file":
        path.unlink()
    elif half == "content":
        path.write_bytes(b"nothing of the kind")
    else:
        save_file({key: t for key, t in load_file(path).items() if ("steering" in key) == (half == "lora_A")}, path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"it has no|find weights|Can't read"):
        split_adapter(tmp_path / "joint", lora=tmp_path / "lora", steering=tmp_path / "steering")
    assert [child.name for child in tmp_path.iterdir()] == ["joint"]


def test_joining_two_trained_copies_of_one_module_is_refused(tmp_path):
    heads = {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], **heads)).save_pretrained(tmp_path / "lora")
    steered = get_peft_model(tiny_model(), PostBlockSteeringConfig(**heads))
    steered.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        steered.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    steered.save_pretrained(tmp_path / "other")
    join_adapters(tmp_path / "lora", tmp_path / "same", tmp_path / "joined")
    with pytest.raises(ValueError, match=r"lm_head\.weight, with different weights"):
        join_adapters(tmp_path / "lora", tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["lora_B", ".down"])
def test_a_broken_tensor_of_either_half_is_an_error_that_names_it(broken, tmp_path):
    joint_model().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if broken in key)
    save_file({k: t[:1].contiguous() if k == key else t for k, t in tensors.items()}, path)
    base = tiny_model().eval()
    before = logits(base)
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), before)


def test_disabling_and_unloading_give_back_the_base_model():
    base = tiny_model().eval()
    before, modules = logits(base), {name for name, _ in base.named_modules()}
    torch.manual_seed(0)
    model = get_peft_model(base, config_for()).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    unloaded = model.unload()
    assert {name for name, _ in unloaded.named_modules()} == modules
    assert torch.equal(logits(unloaded), before)
    assert not any(module._forward_hooks for module in unloaded.modules())


def test_merging_is_refused_for_low_rank_steering_and_exact_for_vectors():
    model = joint_model("gpt2")
    before = logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    vectors = joint_model("gpt2", steering="vector")
    before = logits(vectors)
    torch.testing.assert_close(logits(vectors.merge_and_unload()), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("undo", ["unmerge", "disable", "unload"])
def test_two_biases_merged_into_one_place_come_out_again(undo):
    """The steering vector and the bias that LoRA adds."""
    base = tiny_model("gpt2")
    before = logits(base)
    config = JointSteeringConfig(
        r=4, target_modules=["c_proj"], lora_bias=True, steering={"steering_type": "vector", "init_weights": False}
    )
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=1e-4)
    if undo == "unload":
        torch.testing.assert_close(logits(model.unload()), before, atol=1e-4, rtol=1e-4)
        return
    if undo == "unmerge":
        model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=1e-4)


# OPT hands its MLP the tokens of all rows as one list, and so do models with a shared expert.
@pytest.mark.parametrize("family", [*FAMILIES, "opt", "qwen2_moe"])
def test_each_row_of_a_batch_may_have_its_own_adapter(family):
    model = joint_model(family)
    model.add_adapter("other", config_for(steering="vector"))
    rows = tiny_inputs(rows=4)
    generation = {"num_beams": 3, "max_new_tokens": 3, "min_new_tokens": 3}
    expected, texts = [], []
    with torch.no_grad():
        with model.disable_adapter():
            expected.append(model(**rows).logits[0])
            texts.append(model.generate(**rows, **generation)[0])
        for row, name in enumerate(("other", "default", "other"), start=1):
            model.set_adapter(name)
            expected.append(model(**rows).logits[row])
            texts.append(model.generate(**rows, **generation)[row])
        names = ["__base__", "other", "default", "other"]
        mixed = model(**rows, adapter_names=names).logits
        written = model.generate(**rows, **generation, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert torch.equal(written, torch.stack(texts))
    with pytest.raises(ValueError, match="2 and 4"):
        model(**rows, adapter_names=["other", "default"])


def test_weighted_sum_is_exact_for_both_halves():
    model = joint_model()
    before = logits(model)
    model.add_adapter("copy", config_for())
    state = {k: v for k, v in model.state_dict().items() if ".default." in k}
    model.load_state_dict({k.replace(".default.", ".copy."): v for k, v in state.items()}, strict=False)
    model.add_weighted_adapter(["default", "copy"], [0.25, 0.75], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    model.delete_adapter("sum")
    assert set(model.peft_config) == {"default", "copy"}


def test_scaling_changes_the_steering_half_only(tmp_path):
    model = joint_model()
    with adapter_scaling(model, "default", 0.0):
        without_steering = logits(model)
    model.save_pretrained(tmp_path / "joint")
    split_adapter(tmp_path / "joint", lora=tmp_path / "lora", steering=tmp_path / "steering")
    lora = PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")
    assert torch.equal(without_steering, logits(lora))
    set_scaling(model, "default", 2.0)
    model.save_pretrained(tmp_path / "stronger")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "stronger")), logits(model))


def lora_layers(model):
    return {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_to_transform_chooses_among_the_default_targets(family):
    names = lora_layers(get_peft_model(tiny_model(family), JointSteeringConfig(layers_to_transform=[1])))
    everywhere = lora_layers(get_peft_model(tiny_model(family), JointSteeringConfig()))
    assert names == {name for name in everywhere if ".1." in name}
    assert names


def test_replicated_blocks_have_both_halves():
    model = get_peft_model(tiny_model(), JointSteeringConfig(layer_replication=[(0, 2), (1, 3)]))
    for index in range(4):
        block = model.base_model.model.model.layers[index]
        assert hasattr(block.mlp.down_proj, "lora_A")
        assert hasattr(block, "post_block_steering")


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["nonsense"]}, {"layers_to_transform": [7]}, {"exclude_modules": r".*_proj"}]
)
def test_a_lora_half_without_a_target_is_refused_and_the_model_stays_as_it_is(lora):
    base = tiny_model().eval()
    names = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match="No module for LoRA matches"):
        get_peft_model(base, JointSteeringConfig(**lora))
    assert {name for name, _ in base.named_modules()} == names


def test_hot_swapping_replaces_both_halves(tmp_path):
    torch.manual_seed(3)
    other = get_peft_model(tiny_model(), config_for(steering="low_rank")).eval()
    other.peft_config["default"].dropout = 0.25
    set_scaling(other, "default", 0.5)
    other.save_pretrained(tmp_path)
    model = joint_model()
    assert not torch.equal(logits(model), logits(other))
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
    assert model.peft_config["default"].steering == other.peft_config["default"].steering


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("lora_alpha", {"lora_alpha": 32}),
        ("steering.activation", {"steering": {"r": 2, "activation": "silu"}}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [5]}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
    ],
)
def test_hot_swapping_another_form_of_either_half_is_refused(field, other, tmp_path):
    get_peft_model(tiny_model(), JointSteeringConfig(**{"r": 4, "steering": {"r": 2}, **other})).save_pretrained(
        tmp_path
    )
    model = joint_model()
    before = logits(model)
    with pytest.raises(ValueError, match=f"its {field} is"):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
