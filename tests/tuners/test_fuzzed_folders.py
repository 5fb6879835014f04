"""Folders broken at random. A refused load leaves nothing behind; one that succeeds has exactly the file's values."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from fuzzed_folders import (
    CASES,
    CONFIG,
    WEIGHTS,
    adapted_model,
    anatomy,
    base_model,
    broken_copy,
    differences,
    joint_config,
    wrong_values,
)
from model_zoo import tiny_inputs
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from trl_steer import hotswap_adapter


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good folder of each case, made when it is asked for."""
    root = tmp_path_factory.mktemp("good")

    def folder(case):
        if not (root / case).exists():
            adapted_model(case, seed=3).save_pretrained(root / case)
        return root / case

    return folder


@contextmanager
def a_minute_at_most():
    """Nothing in a folder may be waited for."""

    def give_up(*_):
        raise AssertionError("a minute has passed")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_ours(folder) -> bool:
    """Whether the configuration is for one of our tuners. PEFT's own make no such promise."""
    try:
        return not (folder / CONFIG).is_file() or json.loads((folder / CONFIG).read_text())["peft_type"] != "LORA"
    except Exception:
        return True


def load(way, model, folder, rng):
    """Loads `folder`; returns the model with the adapter and the adapter's name."""
    kwargs = {"low_cpu_mem_usage": rng.random() < 0.5, "is_trainable": rng.random() < 0.5}
    if way == "first":
        return PeftModel.from_pretrained(model, folder, **kwargs), "default"
    if way == "second":
        model.load_adapter(folder, "second", **kwargs)
        return model, "second"
    if way == "transformers":
        model.load_adapter(str(folder), **kwargs)
    else:
        hotswap_adapter(model, folder)
    return model, "default"


def check(seeds, good, folder):
    models, refusals = {}, []
    for seed in seeds:
        rng = random.Random(seed)
        case = rng.choice(sorted(CASES))
        what = f"seed {seed}, {case}: {broken_copy(good(case), folder, rng)}"
        if not is_ours(folder):
            continue
        way = rng.choice(["first", "second", "transformers", "swap"])
        make = base_model if way in ("first", "transformers") else adapted_model
        model = models.pop((make, case), None) or make(case)
        before = anatomy(model)
        try:
            with a_minute_at_most():
                loaded, name = load(way, model, folder, rng)
        except Exception as error:
            assert not differences(before, anatomy(model)), f"{what}, {way} left something behind"
            refusals.append((what, way, error))
            models[make, case] = model
        else:
            assert not wrong_values(loaded, folder, name), f"{what}, {way} loaded something else"
    swaps = [(what, error) for what, way, error in refusals if way == "swap"]
    assert swaps
    unclear = [swap for swap in swaps if type(swap[1]) is not ValueError or str(folder) not in str(swap[1])]
    assert not unclear


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_no_broken_folder_leaves_anything_behind(first, good, tmp_path):
    check(range(first, first + 40), good, tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 200))
def test_none_of_many_broken_folders_leaves_anything_behind(first, good, tmp_path):
    check(range(first, first + 200), good, tmp_path / "broken")


# Kinds of mistakes that random ones have found


def edited(folder, good, config=None, tensors=None):
    shutil.copytree(good, folder)
    values = json.loads((folder / CONFIG).read_text())
    for name, value in (config or {}).items():
        part, _, field = name.rpartition(".")
        (values[part] if part else values)[field] = value
    (folder / CONFIG).write_text(json.dumps(values))
    if tensors is not None:
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def assert_refused(case, folder, match, **kwargs):
    model = base_model(case)
    before = anatomy(model)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(model, folder, **kwargs)
    assert not differences(before, anatomy(model))
    model = adapted_model(case)
    before = anatomy(model)
    with pytest.raises(ValueError, match=match):
        model.load_adapter(folder, "second", **kwargs)
    assert not differences(before, anatomy(model))


REPLICATION = {"layer_replication": [[0, 2], [1, 3]]}


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("low rank", {"r": 3000000}),
        ("pre_mlp", {"r": 3000000}),
        ("joint", {"r": 3000000}),
        ("joint", {"steering.r": 3000000}),
        ("joint", {"steering.r": 3000000, **REPLICATION}),
        ("joint", {"r": 3000000, **REPLICATION}),
        ("joint", {"r": 3000000, "use_qalora": True, "qalora_group_size": 1}),
        ("joint", {"r": 3000000, "target_modules": "all-linear"}),
        ("joint ranks", {"rank_pattern": {"q_proj": 3000000}}),
        ("joint ranks", {"rank_pattern": {"v_proj": 3000000}}),
    ],
)
@pytest.mark.parametrize("tensors", ["all", "steering only"])
def test_no_memory_is_taken_for_a_rank_that_the_file_does_not_have(case, config, tensors, good, tmp_path):
    def steering(tensors):
        return {key: tensor for key, tensor in tensors.items() if "steering" in key}

    folder = edited(tmp_path / "huge", good(case), config, steering if tensors == "steering only" else None)
    model = base_model(case)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match="do not match"):
        PeftModel.from_pretrained(model, folder)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024  # KiB
    assert_refused(case, folder, "do not match")


@pytest.mark.parametrize("case", ["low rank", "joint"])
def test_keys_without_the_prefix_are_refused(case, good, tmp_path):
    def without_prefix(tensors):
        return {key.removeprefix("base_model.model.") if "1" in key else key: t for key, t in tensors.items()}

    folder = edited(tmp_path / "bare", good(case), tensors=without_prefix)
    assert_refused(case, folder, "unexpected|is missing")
    model = adapted_model(case)
    before = anatomy(model)
    with pytest.raises(ValueError, match=str(folder)):
        hotswap_adapter(model, folder)
    assert not differences(before, anatomy(model))


def test_a_failed_load_does_not_let_a_later_one_rewrite_the_base_model(good, tmp_path):
    """KaSA without memory for the weights puts the change of the base model off until the first forward pass."""
    folder = edited(tmp_path / "broken", good("joint KaSA"), tensors=lambda tensors: dict(list(tensors.items())[1:]))
    assert_refused("joint KaSA", folder, "missing", low_cpu_mem_usage=True)


def test_dora_is_not_loaded_by_transformers_which_would_drop_half_of_it(good):
    model = base_model("joint DoRA")
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"`PeftModel\.from_pretrained`"):
        model.load_adapter(str(good("joint DoRA")))
    assert not differences(before, anatomy(model))


def test_transformers_is_not_let_read_a_pickle(good, tmp_path):
    folder = edited(tmp_path / "both", good("low rank"))
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    model = base_model("low rank")
    before = anatomy(model)
    with pytest.raises(ValueError, match="safetensors files only"):
        model.load_adapter(str(folder), use_safetensors=False)
    assert not differences(before, anatomy(model))


# What fails beside the folder


@pytest.mark.parametrize("device", ["nonsense", "cuda:77"])
@pytest.mark.parametrize("case", ["low rank", "joint"])
def test_a_device_that_does_not_exist_is_noticed_before_anything_is_created(case, device, good):
    model = adapted_model(case)
    before = anatomy(model)
    with pytest.raises((RuntimeError, AssertionError)):
        model.load_adapter(good(case), "second", torch_device=device)
    assert not differences(before, anatomy(model))


@pytest.mark.parametrize("case", ["low rank", "joint"])
def test_a_configuration_that_was_handed_in_stays_as_it_was(case, good, tmp_path):
    folder = edited(tmp_path / "broken", good(case), tensors=lambda tensors: {})
    config = PeftConfig.from_pretrained(good(case))
    config.target_modules = None  # which a joint tuner fills in
    config.inference_mode = True
    before = config.to_dict()
    with pytest.raises(ValueError, match="is missing"):
        PeftModel.from_pretrained(base_model(case), folder, config=config)
    assert config.to_dict() == before


@pytest.mark.parametrize("weights", [None, b"broken"])
@pytest.mark.parametrize("case", ["low rank", "joint"])
def test_a_configuration_is_a_template_whatever_the_weights_beside_it_are(case, weights, good, tmp_path):
    folder = edited(tmp_path / "broken", good(case))
    (folder / WEIGHTS).unlink()
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
    config = PeftConfig.from_pretrained(folder)
    model = get_peft_model(base_model(case), config).eval()
    with torch.no_grad(), model.disable_adapter():
        unsteered = model(**tiny_inputs()).logits
    with torch.no_grad():
        assert not torch.equal(model(**tiny_inputs()).logits, unsteered)  # `init_weights=False`


class NoLinear(torch.nn.Module):
    """What LoRA cannot wrap."""


FORMS = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": {}}, {"use_dora": True}]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("fields", [*FORMS, REPLICATION, {"init_lora_weights": "pissa", **REPLICATION}], ids=str)
@pytest.mark.parametrize("is_second", [False, True])
def test_an_injection_that_fails_in_the_last_block_is_undone_in_the_others(is_second, fields, error, monkeypatch):
    case = "joint KaSA" if "kasa_config" in fields else "joint tokens"  # PEFT adds KaSA to KaSA only
    model = adapted_model(case) if is_second else base_model(case)
    base = model.get_base_model() if is_second else model
    config = joint_config(target_modules=["k_proj", "up_proj"], **fields)
    if error is ValueError:
        base.model.layers[2].self_attn.k_proj = NoLinear()
    else:
        calls, update = [], LoraLayer.update_layer

        def interrupted(*args, **kwargs):
            calls.append(args)
            if len(calls) == 4:
                raise KeyboardInterrupt
            update(*args, **kwargs)

        monkeypatch.setattr(LoraLayer, "update_layer", interrupted)
    before = anatomy(model)
    with pytest.raises(error):
        model.add_adapter("second", config) if is_second else get_peft_model(model, config)
    assert not differences(before, anatomy(model))
