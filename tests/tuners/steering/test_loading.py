"""Adapter folders, whole and broken. After any failure the base model is bit for bit what it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_zoo import HIDDEN_SIZE, tiny_inputs, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from steering_cases import (
    adapters_of,
    assert_same_weights,
    layers_of,
    logits,
    over_kinds,
    steer,
    steering_config,
    weights_of,
)

BLOCK = "base_model.model.model.layers.1"
STEERING = f"{BLOCK}.post_block_steering.steering_adapter"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A good adapter folder for each kind."""
    root = tmp_path_factory.mktemp("adapters")
    for kind in ("low_rank", "vector"):
        steer(tiny_model(), kind, seed=3).save_pretrained(root / kind)
    return root


def edit_weights(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def set_value(value):
    def edit(tensors):
        tensors[f"{STEERING}.{tensor_name(tensors)}"].view(-1)[5] = value

    return edit


def tensor_name(tensors) -> str:
    return "vector" if f"{STEERING}.vector" in tensors else "down"


def add(key, *shape):
    return lambda tensors: tensors.update({key: torch.randn(*shape)})


def of_another_width(tensors):
    for key, tensor in tensors.items():
        tensors[key] = torch.randn([2 * size if size == HIDDEN_SIZE else size for size in tensor.shape])


def as_integers(tensors):
    tensors[f"{STEERING}.{tensor_name(tensors)}"] = tensors[f"{STEERING}.{tensor_name(tensors)}"].to(torch.int32)


def too_large(tensors):
    key = f"{STEERING}.{tensor_name(tensors)}"
    tensors[key] = tensors[key].double() * 1e300


def as_float8(tensors):
    key = f"{STEERING}.{tensor_name(tensors)}"
    tensors[key] = torch.full_like(tensors[key], float("nan")).to(torch.float8_e4m3fn)


def other_rank(tensors):
    for key in tensors:
        tensors[key] = torch.randn(5, HIDDEN_SIZE) if key.endswith(".down") else torch.randn(HIDDEN_SIZE, 5)


# what is wrong -> (how to break the weights, what the error says)
BROKEN = {
    "missing": (lambda tensors: tensors.pop(f"{STEERING}.{tensor_name(tensors)}"), [STEERING, "missing"]),
    "all missing": (dict.clear, [STEERING, "missing"]),
    "extra block": (
        add(STEERING.replace("layers.1", "layers.7") + ".vector", 32),
        ["layers.7", "unexpected"],
    ),
    "extra tensor": (add(f"{STEERING}.gate", 4), [f"{STEERING}.gate", "(4,)"]),
    "base weight": (add(f"{BLOCK}.mlp.down_proj.weight", 32, 48), [f"{BLOCK}.mlp.down_proj.weight", "(32, 48)"]),
    "base weight without prefix": (add("model.layers.1.mlp.down_proj.weight", 32, 48), ["mlp.down_proj", "(32, 48)"]),
    "lone head": (add("base_model.model.lm_head.weight", 64, 32), ["lm_head.weight", "(64, 32)"]),
    "lone embedding": (add("base_model.model.model.embed_tokens.weight", 64, 32), ["embed_tokens", "(64, 32)"]),
    "final norm": (add("base_model.model.model.norm.weight", 32), ["model.norm.weight"]),
    "name inserted": (add(f"{STEERING}.default.vector", 32), ["(32,)"]),
    "hidden size": (of_another_width, [STEERING, "64", "32"]),
    "NaN": (set_value(float("nan")), [STEERING, "NaN"]),
    "inf": (set_value(float("inf")), [STEERING, "infinite"]),
    "-inf": (set_value(float("-inf")), [STEERING, "infinite"]),
    "too large for the model": (too_large, [STEERING, "infinite values in float32"]),
    "float8 NaN": (as_float8, [STEERING, "NaN"]),
    "integers": (as_integers, [STEERING, "int32", "floating"]),
}


def assert_refused(folder, *texts, error=ValueError, base=None, **kwargs):
    """Loading fails both as the only adapter and as a second one, and neither changes anything."""
    base = tiny_model() if base is None else base
    weights, expected = weights_of(base), logits(base)
    with pytest.raises(error) as info:
        PeftModel.from_pretrained(base, folder, **kwargs)
    for text in texts:
        assert text in str(info.value)
    assert_same_weights(base, weights)
    assert base.state_dict().keys() == weights.keys()
    assert not layers_of(base)
    assert torch.equal(logits(base), expected)

    model = steer(type(base)(base.config).eval(), "silu", "first")
    weights, expected = weights_of(model), logits(model)
    with pytest.raises(error):
        model.load_adapter(folder, "second", **kwargs)
    assert_same_weights(model, weights)
    assert model.active_adapters == ["first"]
    assert torch.equal(logits(model), expected)
    if "second" not in model.peft_config:
        return
    model.set_adapter("second")  # the half-made one does nothing
    with model.disable_adapter():
        unsteered = logits(model)
    assert torch.equal(logits(model), unsteered)


@pytest.mark.parametrize("kind", ["low_rank", "vector"])
@pytest.mark.parametrize("problem", BROKEN)
def test_broken_weights_are_refused_by_name_and_change_nothing(problem, kind, folders, tmp_path):
    edit, texts = BROKEN[problem]
    folder = shutil.copytree(folders / kind, tmp_path / "adapter")
    edit_weights(folder, edit)
    assert_refused(folder, *texts)


@pytest.mark.parametrize("kind", ["low_rank", "vector"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("problem", ["truncated", "NaN"])
def test_no_way_of_loading_lets_a_broken_file_change_anything(
    problem, kind, low_cpu_mem_usage, is_trainable, folders, tmp_path
):
    folder = shutil.copytree(folders / kind, tmp_path / "adapter")
    if problem == "truncated":
        truncate(folder)
    else:
        edit_weights(folder, BROKEN[problem][0])
    assert_refused(folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable)


def test_wrong_rank_is_refused_with_both_shapes(folders, tmp_path):
    folder = shutil.copytree(folders / "low_rank", tmp_path / "weights")
    edit_weights(folder, other_rank)
    assert_refused(folder, STEERING, "(5, 32)", "(3, 32)")
    folder = shutil.copytree(folders / "low_rank", tmp_path / "config")
    edit_config(folder, r=5)
    assert_refused(folder, STEERING, "(3, 32)", "(5, 32)", ignore_mismatched_sizes=True)


@pytest.mark.parametrize(("kind", "other"), [("low_rank", "vector"), ("vector", "low_rank")])
def test_config_of_the_other_form_is_refused(kind, other, folders, tmp_path):
    folder = shutil.copytree(folders / kind, tmp_path / "adapter")
    edit_config(folder, steering_type=other)
    assert_refused(folder, "missing", "unexpected")


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "qwen3", "mistral", "mixtral", "olmo2", "gpt_oss"])
def test_adapter_for_another_architecture_is_refused_even_if_its_shapes_fit(family, folders):
    base = tiny_model(family)
    assert_refused(folders / "low_rank", "'llama'", f"{base.config.model_type!r}", base=base)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llava", "gemma3"])
def test_tensors_are_checked_where_no_type_of_model_was_written_down(family, folders, tmp_path):
    folder = shutil.copytree(folders / "low_rank", tmp_path / "adapter")
    edit_config(folder, base_model_type=None)
    # gemma3 has the same paths, so it is given another width
    base = tiny_model(family, **({"hidden_size": 48} if family == "gemma3" else {}))
    assert_refused(folder, "post_block_steering", "trained on this base model", base=base)


def test_an_adapter_of_no_type_of_model_fits_every_one(folders, tmp_path):
    folder = shutil.copytree(folders / "low_rank", tmp_path / "adapter")
    edit_config(folder, base_model_type=None)
    PeftModel.from_pretrained(tiny_model("qwen3"), folder)


@pytest.mark.parametrize("init_weights", [True, False])
def test_config_of_a_loaded_adapter_is_a_template_like_any_other(init_weights, folders):
    config = PeftModel.from_pretrained(tiny_model(), folders / "low_rank", is_trainable=True).peft_config["default"]
    config.init_weights = init_weights
    base = tiny_model("qwen3")  # another type of model, on which it makes another adapter
    before = logits(base)
    model = get_peft_model(base, config).eval()
    assert torch.equal(logits(model), before) is init_weights


def test_adapter_for_a_deeper_or_shallower_model_is_refused(folders):
    for layers in (2, 4):
        assert_refused(folders / "vector", f"layers.{min(layers, 3)}", base=tiny_model(num_hidden_layers=layers))


@over_kinds
def test_fields_of_a_newer_version_are_named_in_a_warning_and_left_out(kind, tmp_path):
    model = steer(tiny_model(), kind)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, another_option="last", future_option=3)
    base = tiny_model()
    weights = weights_of(base)
    with pytest.warns(UserWarning, match="future_option"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert_same_weights(base, weights)


def test_impossible_value_in_a_config_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "low_rank", tmp_path / "adapter")
    edit_config(folder, activation="from_the_future")
    assert_refused(folder, "from_the_future", "silu")


def test_good_folder_loads_after_a_broken_one(folders, tmp_path):
    folder = shutil.copytree(folders / "low_rank", tmp_path / "adapter")
    edit_weights(folder, set_value(float("nan")))
    base = tiny_model()
    with pytest.raises(ValueError, match="NaN"):
        PeftModel.from_pretrained(base, folder)
    loaded = PeftModel.from_pretrained(base, folders / "low_rank")
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(tiny_model(), folders / "low_rank")))


def test_second_adapter_leaves_the_first_untouched(folders):
    model = PeftModel.from_pretrained(tiny_model(), folders / "low_rank", adapter_name="first")
    weights, expected = weights_of(model), logits(model)
    model.load_adapter(folders / "vector", "second")
    assert_same_weights(model, weights)
    assert model.active_adapters == ["first"]
    assert torch.equal(logits(model), expected)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_model(), folders / "vector")))


def test_loaded_adapter_trains_on_if_asked_to(folders):
    for is_trainable in (True, False):
        model = PeftModel.from_pretrained(tiny_model(), folders / "low_rank", is_trainable=is_trainable)
        assert {p.requires_grad for adapter in adapters_of(model) for p in adapter.parameters()} == {is_trainable}


# What is saved besides steering


def perturb(model):
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data.add_(torch.randn_like(parameter))


@over_kinds
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # untied and tied embeddings
@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"modules_to_save": ["mlp"], "layers_to_transform": [0]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_further_trained_weights_survive_saving(fields, family, kind, tmp_path):
    model = steer(tiny_model(family), kind, **fields)
    before = logits(model)
    perturb(model)
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    base = tiny_model(family)
    unsteered, weights = logits(base), weights_of(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), expected)
    unloaded = loaded.unload()
    assert unloaded.state_dict().keys() == weights.keys()
    assert_same_weights(unloaded, weights)
    assert torch.equal(logits(unloaded), unsteered)


@pytest.mark.parametrize(
    ("fields", "part"), [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"trainable_token_indices": [3]}, "tokens")]
)
@pytest.mark.parametrize("problem", ["NaN", "shape", "smuggled"])
def test_further_weights_are_checked_too(fields, part, problem, tmp_path):
    model = steer(tiny_model(), **fields)
    perturb(model)
    model.save_pretrained(tmp_path)

    def edit(tensors):
        key = next(key for key in tensors if part in key)
        if problem == "NaN":
            tensors[key].view(-1)[0] = float("nan")
        elif problem == "shape":
            tensors[key] = tensors[key][:, :-1]
        elif part == "lm_head":
            tensors["base_model.model.lm_head.original_module.weight"] = torch.randn(64, 32)
        else:
            tensors["base_model.model.model.embed_tokens.token_adapter.base_layer.weight"] = torch.randn(64, 32)

    edit_weights(tmp_path, edit)
    base = tiny_model()
    expected = logits(base)
    with pytest.raises(ValueError, match=part if problem != "smuggled" else "original_module|base_layer"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("problem", ["truncated", "NaN", "token rows missing"])
def test_a_broken_folder_leaves_no_empty_token_rows_behind(problem, family, tmp_path):
    model = steer(tiny_model(family), trainable_token_indices=[3, 5])
    perturb(model)
    model.save_pretrained(tmp_path / "good")
    broken = shutil.copytree(tmp_path / "good", tmp_path / "broken")
    if problem == "truncated":
        truncate(broken)
    elif problem == "NaN":
        edit_weights(broken, set_value(float("nan")))
    else:
        edit_weights(broken, lambda tensors: tensors.pop(next(key for key in tensors if "trainable_tokens" in key)))
    base = tiny_model(family)
    before = logits(base)
    with pytest.raises(ValueError, match=r"Can't read|NaN|is missing"):
        PeftModel.from_pretrained(base, broken, low_cpu_mem_usage=True)
    assert torch.equal(logits(base), before)
    loaded = PeftModel.from_pretrained(base, tmp_path / "good", low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


def test_embeddings_of_a_resized_vocabulary_survive_saving(tmp_path):
    base = tiny_model()
    base.resize_token_embeddings(70)
    model = steer(base)
    inputs = {**tiny_inputs(), "input_ids": torch.arange(60, 70)[None].repeat(2, 1)[:, :7]}
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    resized = tiny_model()
    resized.resize_token_embeddings(70)
    assert torch.equal(logits(PeftModel.from_pretrained(resized, tmp_path), inputs), expected)
    with pytest.raises(ValueError, match=r"\(70, 32\), expected \(64, 32\)"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


# Names of adapters


NAMES = ["default", "adapter", "steering", "steering_", "post_block_steering", "steering_adapter", "up", "vector"]


@over_kinds
@pytest.mark.parametrize("name", [*NAMES, "layers", "model", "0", "lora_A", "with-dash"])
def test_any_adapter_name_survives_saving_under_any_other(name, kind, tmp_path):
    model = steer(tiny_model(), kind, name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    for loaded_name in (name, "other", f"{name}2"):
        loaded = PeftModel.from_pretrained(tiny_model(), folder, adapter_name=loaded_name)
        assert torch.equal(logits(loaded), expected)
    by_transformers = tiny_model()
    by_transformers.load_adapter(str(folder), adapter_name=name)
    assert torch.equal(logits(by_transformers), expected)


@pytest.mark.parametrize("name", ["a.b", "", "pop", "training", "__base__"])
def test_invalid_adapter_name_is_refused_at_once(name):
    base = tiny_model()
    with pytest.raises(ValueError, match="cannot be used as an adapter name"):
        steer(base, adapter_name=name)
    assert not layers_of(base)


def test_another_adapter_with_the_name_of_a_block_loses_no_tensor(tmp_path):
    model = steer(steer(tiny_model(), "vector"), "vector", "1")
    with pytest.raises(ValueError, match="other adapters are called 1, like some blocks"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    model.delete_adapter("1")
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3


def test_names_that_contain_each_other_are_saved_apart(tmp_path):
    names = ["default", "default2", "other_default", "foodefault_bar", "efaul", "steering"]
    model = steer(tiny_model(), "vector", names[0], seed=0)
    for seed, name in enumerate(names[1:], start=1):
        steer(model, "vector", name, seed=seed)
    model.save_pretrained(tmp_path)
    for name in names:
        saved = load_file(tmp_path / ("" if name == "default" else name) / "adapter_model.safetensors")
        assert len(saved) == len(adapters_of(model, name)) == 3
        for tensor, adapter in zip((saved[key] for key in sorted(saved)), adapters_of(model, name), strict=True):
            assert torch.equal(tensor, adapter.vector)
    model.save_pretrained(tmp_path / "selected", selected_adapters=["efaul"])
    assert [path.name for path in (tmp_path / "selected").iterdir() if path.is_dir()] == ["efaul"]


def test_steering_on_top_of_a_lora_model_saves_steering_only(tmp_path):
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = logits(lora)
    model = get_peft_model(lora.merge_and_unload(), steering_config()).eval()
    expected = logits(model)
    assert not torch.allclose(before, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert all("lora" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))
