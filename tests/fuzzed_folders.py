"""Adapter folders broken at random, each the same for the same seed, and what a model is made of down to its hooks."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_zoo import tiny_model
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from trl_steer import JointSteeringConfig, JolaConfig, LofitConfig, PostBlockSteeringConfig, SublayerSteeringConfig
from trl_steer.tuners.steering.layer import SteeringLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def joint_config(**fields) -> JointSteeringConfig:
    steering = {"r": 2, "init_weights": False}
    return JointSteeringConfig(**{"r": 4, "init_lora_weights": False, "steering": steering, **fields})


# name -> (family of the base model, configuration)
CASES: dict[str, tuple[str, Callable[[], PeftConfig]]] = {
    "low rank": ("llama", lambda: PostBlockSteeringConfig(r=3, init_weights=False, task_type="CAUSAL_LM")),
    "SiLU": ("qwen2", lambda: PostBlockSteeringConfig(r=3, activation="silu", init_weights=False)),
    "vector": (
        "llama",
        lambda: PostBlockSteeringConfig(steering_type="vector", init_weights=False, modules_to_save=["lm_head"]),
    ),
    "pre_mlp": ("llama", lambda: SublayerSteeringConfig(site="pre_mlp", r=3, init_weights=False)),
    "post_mlp": ("gpt2", lambda: SublayerSteeringConfig(r=3, init_weights=False, trainable_token_indices=[3, 5])),
    "post_attn": ("gemma3", lambda: SublayerSteeringConfig(site="post_attn", steering_type="vector")),
    "lofit": ("gemma3", lambda: LofitConfig(init_weights=False)),
    "lofit heads": ("llama", lambda: LofitConfig(phase="scale", heads={0: [1, 3], 2: [0]}, init_weights=False)),
    "jola": ("gpt2", lambda: JolaConfig(init_weights=False, modules_to_save=["lm_head"])),
    "joint": ("llama", joint_config),
    "joint head": ("llama", lambda: joint_config(modules_to_save=["lm_head"], task_type="CAUSAL_LM")),
    "joint tokens": ("qwen2", lambda: joint_config(trainable_token_indices=[3, 5], target_modules=["q_proj"])),
    "joint DoRA": ("llama", lambda: joint_config(use_dora=True, target_modules=["q_proj", "down_proj"])),
    "joint biases": ("gpt2", lambda: joint_config(bias="all", target_modules=["c_proj", "c_fc"])),
    "joint ranks": ("llama", lambda: joint_config(rank_pattern={"q_proj": 2}, use_rslora=True)),
    "joint PiSSA": ("llama", lambda: joint_config(init_lora_weights="pissa", target_modules=["q_proj", "up_proj"])),
    "joint OLoRA": ("llama", lambda: joint_config(init_lora_weights="olora", target_modules=["q_proj", "up_proj"])),
    "joint KaSA": ("llama", lambda: joint_config(kasa_config={}, target_modules=["q_proj", "up_proj"])),
}


def base_model(case: str) -> nn.Module:
    return tiny_model(CASES[case][0])


def adapted_model(case: str, seed: int = 0, adapter_name: str = "default") -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base_model(case), CASES[case][1](), adapter_name=adapter_name).eval()


# What may be wrong with a folder. Each takes the folder and a source of random numbers, and says what it did.

VALUES = [
    *(None, True, False, 0, -1, 3, 2.5, 1e400, float("nan"), 3000000, 2**70),
    *("", "x", "nonsense", "all-linear", ".*", "(", "é\ud800"),
    *([], [[]], [0], [-1], [0, 0], [3000000], ["x"], ["lm_head"], [None], [[0, 2], [1, 3]], [[0, 3000000]]),
    *({}, {"x": 3}, {"q_proj": 3000000}, {"q_proj": -1}, {"q_proj": None}, {"r": 3000000}, {"embed_tokens": [1]}),
    *("pissa", "olora", "eva", "corda", "loftq", "orthogonal", "gaussian", "vector", "low_rank", "silu", "pre_mlp"),
    *("SEQ_CLS", "CAUSAL_LM", "LORA", "POST_BLOCK_STEERING", "JOINT_STEERING", "all", "lora_only", "llama", "gpt2"),
]


def flip_bytes(folder: Path, rng: random.Random) -> str:
    data = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    last = rng.choice([8, header, len(data)])
    for _ in range(rng.choice([1, 1, 1, 20])):
        data[rng.randrange(last)] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(data)
    return f"flips bytes below {last}"


def change_length(folder: Path, rng: random.Random) -> str:
    data = (folder / WEIGHTS).read_bytes()
    cut = rng.choice([0, 4, 8, 9, 100, len(data) - 1, rng.randrange(len(data))])
    data = data[:cut] if rng.random() < 0.6 else data + bytes(rng.choice([1, 4, 128]))
    (folder / WEIGHTS).write_bytes(data)
    return f"makes the weights {len(data)} bytes long"


def edit_header(folder: Path, rng: random.Random) -> str:
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    edit, changed = rng.choice(
        [
            ("name", None),
            ("shape", [*entry["shape"], 1]),
            ("shape", entry["shape"][::-1]),
            ("shape", entry["shape"][:-1]),
            ("shape", [2**40, *entry["shape"][1:]]),
            ("shape", [2**63 + 5]),
            ("shape", [-1]),
            ("shape", []),
            ("shape", "32"),
            ("shape", [0, *entry["shape"]]),
            ("dtype", rng.choice(["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "x", 3])),
            ("data_offsets", [0, 2**50]),
            ("data_offsets", [4, 0]),
            ("data_offsets", [0, 4]),
            ("data_offsets", [entry["data_offsets"][0], entry["data_offsets"][1] - 4]),
            ("data_offsets", None),
        ]
    )
    if edit == "name":
        header[rng.choice(["", "x", name + ".weight", name[1:], name.replace(".1.", ".0."), "é"])] = header.pop(name)
    elif edit == "dtype" and changed == "F64" and rng.random() < 0.5:
        entry.update(dtype=changed, shape=[*entry["shape"][:-1], entry["shape"][-1] // 2])
    else:
        entry[edit] = changed
    if rng.random() < 0.1:
        header["__metadata__"] = rng.choice([None, 3, {"format": 3}, {"format": "tf"}, {}])
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])
    return f"header: {edit} of {name} becomes {changed!r}"


def edit_tensors(folder: Path, rng: random.Random) -> str:
    tensors = load_file(folder / WEIGHTS)
    keys = sorted(tensors)
    key, other = rng.choice(keys), rng.choice(keys)
    tensor = tensors[key]
    kind = rng.choice(
        ["missing", "extra", "renamed", "dtype", "value", "swapped", "block", "few", "half", "none", "slice", "base"]
    )
    if kind == "missing":
        del tensors[key]
    elif kind == "extra":
        head, _, tensor_name = key.rpartition(".")
        tensors[
            rng.choice(["x", f"{key}.x", f"{head}.default.{tensor_name}", f"{head}.second.{tensor_name}", f"{head}.x"])
        ] = tensor
    elif kind == "renamed":
        old, new = rng.choice([("base_model.model.", ""), ("layers", "blocks"), ("down", "up"), ("lora_A", "lora_B")])
        tensors[key.replace(old, new)] = tensors.pop(key)
    elif kind == "dtype":
        tensors[key] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
    elif kind == "value":
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30])
    elif kind == "swapped":
        tensors[key], tensors[other] = tensors[other], tensor
    elif kind == "block":
        tensors[key.replace(".1.", f".{rng.choice([0, 2, 3, -1, 'x'])}.")] = tensors.pop(key)
    elif kind == "few":
        tensors = {key: tensor}
    elif kind == "half":
        half = rng.random() < 0.5
        tensors = {k: t for k, t in tensors.items() if ("steering" in k) is half}
    elif kind == "none":
        tensors = {}
    elif kind == "slice":
        tensors[key] = tensor[:-1] if rng.random() < 0.5 else tensor[..., :-1]
    else:
        tensors[rng.choice(["base_model.model.model.norm.weight", "base_model.model.lm_head.weight"])] = torch.ones(32)
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / WEIGHTS)
    return f"tensors: {kind} {key}"


def edit_config(folder: Path, rng: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    part = config["steering"] if config.get("steering") and rng.random() < 0.4 else config
    name = rng.choice(sorted(part))
    if rng.random() < 0.1:
        del part[name]
        what = "nothing"
    else:
        part[name] = rng.choice(VALUES)
        what = repr(part[name])
    (folder / CONFIG).write_text(json.dumps(config))
    return f"config: {name} becomes {what}"


def edit_rank(folder: Path, rng: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    part = config["steering"] if config.get("steering") and rng.random() < 0.5 else config
    part["r"] = rng.choice([1, 3000000, 2**40])
    also = rng.choice([{}, {}, {"use_qalora": True}, {"use_bdlora": True}, {"layer_replication": [[0, 2], [1, 3]]}])
    config.update({name: value for name, value in also.items() if name in config})
    kind = rng.choice(["", "", edit_tensors(folder, rng)])
    (folder / CONFIG).write_text(json.dumps(config))
    return f"config: r becomes {part['r']} with {also}, {kind}"


def rewrite_config(folder: Path, rng: random.Random) -> str:
    good = (folder / CONFIG).read_bytes()
    bad = [
        *(b"", b"[]", b"null", b"3", b'"x"', b"{}", b"{", b"[" * 5000, b"\xff\xfe", b"\x00", good[: len(good) // 2]),
        *(b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"), good + good, b'{"peft_type": "LORA"}'),
        *(good.replace(b'"peft_type"', b'"type"'), b'{"peft_type": []}', b'{"peft_type": {}}', b'{"peft_type": 3}'),
    ]
    bad.append(b'{"peft_type": "POST_BLOCK_STEERING"}')
    data = rng.choice(bad)
    (folder / CONFIG).write_bytes(data)
    return f"config is {data[:40]!r}"


def change_files(folder: Path, rng: random.Random) -> str:
    kind = rng.choice(
        ["missing", "folder", "FIFO", "broken link", "loop", "link", "empty", "pickle", "both", "device"]
    )
    name = WEIGHTS if kind in ("pickle", "both") else rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    path = folder / name
    if kind in ("pickle", "both"):
        torch.save({"x": torch.ones(3)}, folder / "adapter_model.bin")
    if kind == "link":
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    elif kind != "both":
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind in ("broken link", "loop", "device"):
        path.symlink_to({"broken link": folder / "nothing", "loop": path, "device": "/dev/zero"}[kind])
    elif kind == "empty":
        path.touch()
    return f"{name}: {kind}"


MUTATIONS = [
    *(flip_bytes, change_length, edit_header, edit_header, edit_tensors, edit_tensors, edit_tensors),
    *(edit_config, edit_config, edit_config, edit_config, edit_rank, rewrite_config, change_files),
]


def broken_copy(good: Path, folder: Path, rng: random.Random) -> str:
    """Copies a folder, breaks the copy and says how."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return rng.choice(MUTATIONS)(folder, rng)


# What a model is


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All there is to a model by name: modules, their attributes and hooks, tensors bit for bit, configurations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = (id(module), type(module))
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                found[f"{name}.{attribute}"] = _plain(value)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[f"{name}: tensor"] = (id(tensor), tensor.requires_grad, tensor.device, tensor.dtype, tuple(tensor.shape))
        if not tensor.is_meta:
            found[f"{name}: bits"] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, PeftConfig):
        return copy.deepcopy(value.to_dict())
    if isinstance(value, dict):
        return [(key if isinstance(key, (str, int)) else id(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return type(value)(_plain(item) for item in value) if not isinstance(value, set) else sorted(map(str, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.to_dict() if hasattr(value, "to_dict") else id(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    missing = object()
    return [key for key in before.keys() | after.keys() if before.get(key, missing) != after.get(key, missing)]


def wrong_values(model: nn.Module, folder: Path, adapter_name: str) -> list[str]:
    """What of a folder is not in the adapter that was loaded from it."""
    prefix = "base_model.model."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    loaded = {
        key.removeprefix(prefix): tensor
        for key, tensor in get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        ).items()
    }
    wrong = sorted(tensors.keys() ^ loaded.keys())
    for key in tensors.keys() & loaded.keys():
        if loaded[key].is_meta or not torch.equal(loaded[key], tensors[key].to(loaded[key].dtype)):
            wrong.append(key)
        elif not torch.isfinite(loaded[key]).all():
            wrong.append(f"{key} is not finite")
    config = PeftConfig.from_pretrained(folder)
    steering = config.steering_config() if isinstance(config, JointSteeringConfig) else config
    for layer in model.modules():
        if isinstance(layer, SteeringLayer) and adapter_name in layer.adapters:
            adapter: Any = layer.adapters[adapter_name]
            fields = [name for name in ("scaling", "dropout") if hasattr(adapter, name)]
            wrong += [name for name in fields if getattr(adapter, name) != getattr(steering, name)]
    return wrong
