"""What cannot be served is refused by the load endpoint with the reason, and everything else goes on."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import fuzzed_folders
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from serving_cases import BASE, WHY, Server, is_different, joint, lora, post_block, sublayer, write_adapters
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import JolaConfig, LofitConfig, LoReftConfig

pytest.importorskip("vllm", reason=WHY)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
FIRST = "base_model.model.model.layers.0.post_block_steering.steering_adapter.down"
PROMPT = list(range(20, 40))


def write(folder: Path, **models) -> None:
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    write(folder, model=tiny_model(**SIZES), longer=tiny_model(num_hidden_layers=3, **SIZES))
    write(folder, wider=tiny_model(**SIZES | {"hidden_size": 96}), qwen2=tiny_model("qwen2", **SIZES))
    configs = {
        "good": post_block(r=4),
        "joint": joint({"r": 2}, r=2),
        "lora": lora(r=4),
        "sublayer": sublayer("post_mlp", r=2),
        "rank": post_block(r=9),
        "rank_of_lora": lora(r=9),
        "rank_in_joint": joint({"r": 9}, r=2),
        "dora": lora(r=2, use_dora=True),
        "some_tokens": post_block(r=2, positions="last_prompt"),
        "saved_modules": post_block(r=2, modules_to_save=["lm_head"]),
        "loreft": LoReftConfig(task_type="CAUSAL_LM", r=2),
        "lofit": LofitConfig(task_type="CAUSAL_LM"),
        "jola": JolaConfig(task_type="CAUSAL_LM"),
    }
    write_adapters(str(folder / "model"), folder, configs, size=0.5)
    for name in ("longer", "wider", "qwen2"):
        write_adapters(str(folder / name), folder, {f"for_{name}": post_block(r=2)}, size=0.5)
    unmatched = {"lora_elsewhere": LoraConfig(task_type="CAUSAL_LM", target_modules=["layers.2.mlp.up_proj"])}
    write_adapters(str(folder / "longer"), folder, unmatched, size=0.5)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    options = ["--max-loras", "2", "--max-lora-rank", "8", "--max-model-len", "256"]
    with Server(str(folder / "model"), {"good": folder / "good"}, *options) as started:
        yield started


@pytest.fixture
def steady(server):
    """Checks that the server gives the same answers before and after."""
    before = [server.complete(name, PROMPT) for name in (BASE, "good")]
    assert is_different(*before)
    yield
    assert [server.complete(name, PROMPT) for name in (BASE, "good")] == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rank", "rank 9 is larger than --max-lora-rank 8"),
        ("rank_of_lora", "rank 9 is greater than max_lora_rank 8"),
        ("rank_in_joint", "rank 9 is larger than --max-lora-rank 8"),
        ("dora", "does not yet support DoRA"),
        ("some_tokens", "positions='last_prompt' cannot be served"),
        ("saved_modules", "modules_to_save=['lm_head'] cannot be served"),
        ("loreft", "type LOREFT cannot be served"),
        ("lofit", "Merge it into a base model whose attention output has a bias"),
        ("jola", "Merge it into a base model whose attention output has a bias"),
        ("for_longer", "unexpected ones for model.layers.2"),
        ("for_wider", "for hidden states of size 96, but those of the model have 64"),
        ("for_qwen2", "trained on a model of type 'qwen2', but the base model is of type 'llama'"),
        ("lora_elsewhere", "No module of the model matches the LoRA adapter"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(name, reason, server, folder, steady):
    status, said = server.load("new", folder / name)
    assert (status, reason in said) == (400, True), said


def test_a_folder_that_is_not_there_is_not_found(server, folder, steady):
    status, said = server.load("new", folder / "nothing")
    assert (status, "No adapter found" in said) == (404, True)


def change_tensors(change: Callable) -> Callable:
    def apply(broken: Path) -> None:
        tensors = load_file(broken / WEIGHTS)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, broken / WEIGHTS)

    return apply


def change_config(**fields) -> Callable:
    def apply(broken: Path) -> None:
        config = json.loads((broken / CONFIG).read_text())
        (broken / CONFIG).write_text(json.dumps({**config, **fields}))

    return apply


def first_value(value: float) -> Callable:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[0]].view(-1)[0] = value

    return change_tensors(change)


BROKEN = {
    "missing": ("good", change_tensors(lambda tensors: tensors.pop(FIRST)), f"{FIRST} is missing"),
    "extra": ("good", change_tensors(lambda tensors: tensors.update(x=torch.ones(2))), "x is unexpected"),
    "block missing": (
        "good",
        change_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if ".1." in key]),
        "weights are missing for model.layers.1",
    ),
    "shape": (
        "good",
        change_tensors(lambda tensors: tensors.update({FIRST: tensors[FIRST][:3]})),
        f"{FIRST} has shape (3, 64), expected (4, d)",
    ),
    "width": (
        "good",
        change_tensors(lambda tensors: tensors.update({FIRST: tensors[FIRST][:, :-1]})),
        "different hidden sizes",
    ),
    "NaN": ("good", first_value(float("nan")), f"{FIRST} contains values that are not finite"),
    "infinite": ("good", first_value(float("inf")), f"{FIRST} contains values that are not finite"),
    "NaN in the LoRA half": ("joint", first_value(float("nan")), "NaN or infinite values"),
    "half a joint adapter": (
        "joint",
        change_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if "steering" in key]),
        "no steering weights",
    ),
    "dtype": (
        "good",
        change_tensors(lambda tensors: tensors.update({FIRST: tensors[FIRST].int()})),
        f"{FIRST} contains values that are not finite numbers",
    ),
    "truncated": (
        "good",
        lambda broken: (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:-100]),
        "may be truncated",
    ),
    "no weights": ("good", lambda broken: (broken / WEIGHTS).unlink(), "there is no adapter_model.safetensors"),
    "no JSON": ("good", lambda broken: (broken / CONFIG).write_text("{"), "line 1"),
    "no type": ("good", lambda broken: (broken / CONFIG).write_text("{}"), "Missing required configuration fields"),
    "rank": ("good", change_config(r="four"), "r must be an integer"),
    "activation": ("good", change_config(activation="none"), "Expected activation to be None"),
    "scaling": ("good", change_config(scaling=None), "scaling must be a number"),
    "blocks": ("good", change_config(layers_to_transform=[7]), "layers_to_transform contains [7]"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused_with_the_reason(what, server, folder, steady, tmp_path):
    good, break_it, reason = BROKEN[what]
    broken = shutil.copytree(folder / good, tmp_path / "broken")
    break_it(broken)
    status, said = server.load("new", broken)
    assert (status, reason in said) == (400, True), said


@pytest.mark.parametrize("good", ["good", "joint", "sublayer"])
def test_whatever_is_wrong_with_a_folder_the_server_goes_on(good, server, folder, steady, tmp_path):
    for seed in range(40):
        did = fuzzed_folders.broken_copy(folder / good, tmp_path / f"{seed}", random.Random(f"{good} {seed}"))
        status, said = server.load(f"{good}-{seed}", tmp_path / f"{seed}")
        assert status in (200, 400, 404), (did, said)
        if status == 200:
            server.complete(f"{good}-{seed}", PROMPT, 2)
            assert server.unload(f"{good}-{seed}")[0] == 200
