"""`trl-steer serve` finds out what the adapters need, and says in one line what is wrong."""

import importlib.util

import pytest
from peft import LoraConfig, get_peft_model
from serving_cases import WHY, joint, lora, post_block, sublayer, write_adapters
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import LofitConfig
from trl_steer.integrations.vllm import serve

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    configs = {
        "low_rank": post_block(r=4, rank_pattern={"layers.1": 9}),
        "silu": post_block(r=2, activation="silu"),
        "vector": post_block(steering_type="vector", r=64),
        "sublayer": sublayer("pre_mlp", r=3),
        "joint": joint({"r": 2, "activation": "gelu"}, r=12, rank_pattern={"down_proj": 17}),
        "lora": lora(r=8),
        "last": post_block(r=2, positions="last_prompt"),
        "lofit": LofitConfig(task_type="CAUSAL_LM"),
    }
    return write_adapters(str(folder / "model"), folder, configs, size=0.1)


@pytest.mark.parametrize(
    ("names", "needs"),
    [
        ([], serve.Needs(1, [], [])),
        (["vector"], serve.Needs(1, ["post_block"], [])),
        (["low_rank", "silu", "vector"], serve.Needs(9, ["post_block"], ["silu"])),
        (["silu", "sublayer", "lora"], serve.Needs(8, ["post_block", "pre_mlp"], ["silu"])),
        (["joint", "silu"], serve.Needs(17, ["post_block"], ["gelu", "silu"])),
    ],
)
def test_needs_are_those_of_all_adapters(names, needs, folder):
    assert serve.needs_of({name: str(folder / name) for name in names}) == needs


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--adapter", "low_rank"], "Expected --adapter NAME=FOLDER, got 'low_rank'."),
        (["--adapter", "=low_rank"], "Expected --adapter NAME=FOLDER, got '=low_rank'."),
        (["--adapter", "a=low_rank", "--adapter", "a=silu"], "two adapters of the name 'a'"),
        (["--adapter", "a=./nothing"], "There is no folder ./nothing."),
        (["--adapter", "a=model"], "is not the folder of a saved adapter"),
        (["--lora-modules", "a=silu"], "--lora-modules follows from --adapter NAME=FOLDER"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, reason, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert serve.main(["model", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("trl-steer serve: error: ")
    assert reason in said
    assert said.count("\n") == 1


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here")
def test_without_vllm_it_says_where_to_read_how_to_install_it(folder, capsys):
    assert serve.main([str(folder / "model"), "--adapter", f"a={folder / 'silu'}"]) == 1
    assert "vLLM is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [("last", "positions='last_prompt' cannot be served"), ("lofit", "An adapter of type LOFIT cannot be served")],
)
def test_adapters_that_cannot_be_served_are_refused_by_name(name, reason, folder):
    with pytest.raises(ValueError, match=f"The adapter 'a' in .*{name} cannot be served: {reason}"):
        serve.needs_of({"a": str(folder / name)})


@pytest.mark.skipif(not HAS_VLLM, reason=WHY)
@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_ranks_are_rounded_up_to_those_that_vllm_has(rank, room):
    given = serve.options({"a": "folder", "b": "OWNER/NAME"}, rank)
    assert given == [
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", str(room)),
        *("--lora-modules", "a=folder", "b=OWNER/NAME"),
    ]


@pytest.mark.skipif(not HAS_VLLM, reason=WHY)
def test_a_rank_that_vllm_has_no_room_for_is_an_error(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(r=513, target_modules=["down_proj"])).save_pretrained(tmp_path)
    rank = serve.needs_of({"a": str(tmp_path)}).rank
    with pytest.raises(ValueError, match="An adapter has rank 513, but vLLM serves ranks up to 512"):
        serve.options({"a": str(tmp_path)}, rank)
