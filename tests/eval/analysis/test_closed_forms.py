"""`trl-steer analyze oracle`, `distill`, `lora` and `extract`: files, folders that load, and errors of one line."""

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import PostBlockSteeringConfig
from trl_steer.eval.analysis import cli

WORDS = ("tea", "rain", "music", "bread", "snow", "rivers", "horses", "chess", "trains", "clouds")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, two that were made from it, an adapter, texts and pairs."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder / "short")
    tiny_model("qwen2").save_pretrained(folder / "another")
    for name in ("base", "short", "another", "tuned"):
        tiny_tokenizer().save_pretrained(folder / name)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    base.save_pretrained(folder / "tuned")
    config = PostBlockSteeringConfig(r=2, task_type="CAUSAL_LM", init_weights=False)
    steered = get_peft_model(tiny_model(), config)
    steered.save_pretrained(folder / "adapter")
    texts = [f"{one} and {other} are what I like {number}" for number, one in enumerate(WORDS) for other in WORDS[:4]]
    (folder / "texts.txt").write_text("\n".join(texts))
    pairs = [{"positive": f"I love {word}", "negative": f"I hate {word}"} for word in WORDS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def analyze(files, tmp_path, monkeypatch, capsys):
    """Runs a measure in the folder of the files. Returns its status, its error and its results."""
    monkeypatch.chdir(files)

    def run(*arguments: str):
        output = tmp_path / "out"
        status = cli.main([*arguments, "--output", str(output)])
        found = list(output.glob("*.json")) if output.is_dir() else []
        return status, capsys.readouterr().err, json.loads(found[0].read_text()) if found else None

    return run


TEXT = ("--text", "texts.txt", "--device", "cpu")


def test_oracle_writes_the_shares_of_every_site(analyze, tmp_path):
    status, _, results = analyze("oracle", "--model", "base", "--tuned", "tuned", *TEXT, "--rank", "3")
    assert status == 0
    assert [row["block"] for row in results["blocks"]] == [0, 1]
    assert set(results["blocks"][0]["sites"]) == {"post_block", "post_mlp", "post_attn", "pre_mlp"}
    assert "3" in results["blocks"][0]["sites"]["post_mlp"]["ranks"]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png"]


def test_oracle_takes_an_adapter(analyze):
    status, _, results = analyze("oracle", "--model", "base", "--tuned", "adapter", *TEXT, "--sites", "post_block")
    assert status == 0
    assert results["blocks"][0]["sites"]["post_block"]["ranks"]["2"] > 0.999


@pytest.mark.parametrize("extra", [(), ("--choose_rank", "--tolerance", "0.01"), ("--steering_type", "vector")])
def test_distill_writes_an_adapter_that_loads(extra, analyze, tmp_path):
    save = tmp_path / "adapter"
    status, _, results = analyze("distill", "--model", "base", "--tuned", "tuned", *TEXT, "--save", str(save), *extra)
    assert status == 0
    assert results["blocks"][-1]["after"] < results["blocks"][-1]["before"]
    assert PeftConfig.from_pretrained(save).peft_type.value == "POST_BLOCK_STEERING"
    PeftModel.from_pretrained(tiny_model(), save)


def test_lora_writes_a_stock_adapter_and_says_its_error(analyze, tmp_path):
    save = tmp_path / "lora"
    status, _, results = analyze("lora", "--model", "base", "--adapter", "adapter", *TEXT, "--save", str(save))
    assert status == 0
    assert type(PeftConfig.from_pretrained(save)) is LoraConfig
    assert f"the distance is {results['blocks'][-1]['after']:.3g}" in (tmp_path / "out" / "lora.md").read_text()
    PeftModel.from_pretrained(tiny_model(), save)


@pytest.mark.parametrize("is_chat", [False, True])
def test_extract_writes_a_vector_adapter(is_chat, analyze, files, tmp_path):
    pairs = files / "pairs.jsonl"
    if is_chat:
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        chats = [{side: [{"role": "user", "content": text}] for side, text in row.items()} for row in rows]
        pairs = tmp_path / "chats.jsonl"
        pairs.write_text("\n".join(map(json.dumps, chats)))
    save = tmp_path / "vectors"
    status, _, results = analyze("extract", "--model", "base", "--pairs", str(pairs), "--save", str(save))
    assert status == 0
    assert results["pairs"] == len(WORDS)
    model = PeftModel.from_pretrained(tiny_model(), save)
    for row, (_, layer) in zip(results["blocks"], model.base_model.named_steering_layers(), strict=True):
        assert layer.adapters["default"].vector.norm().item() == pytest.approx(0.1 * row["norm"], rel=1e-4)


SAVE = ("--save", "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--model", "base", "--tuned", "short", *TEXT, *SAVE], "The models have different shapes"),
        (["oracle", "--model", "base", "--tuned", "short", *TEXT], "The models have different shapes"),
        (
            ["distill", "--model", "another", "--tuned", "adapter", *TEXT, *SAVE],
            "not an adapter of this base",
        ),
        (["lora", "--model", "another", "--adapter", "adapter", *TEXT, *SAVE], "not an adapter of this base"),
        (["distill", "--model", "base", "--tuned", "tuned", *TEXT, *SAVE, "--rows", "5"], "expected at least 10"),
        (["distill", "--model", "base", "--tuned", "tuned", *TEXT, "--save", "base"], "exists and is not empty"),
        (["distill", "--model", "base", "--tuned", "tuned", *TEXT, *SAVE, "--blocks", "7"], "contains [7]"),
        (["extract", "--model", "base", "--pairs", "none.jsonl", *SAVE], "There is no file none.jsonl"),
        (["extract", "--model", "base", "--pairs", "texts.txt", *SAVE], "texts.txt, line 1: invalid JSON"),
        (
            ["extract", "--model", "base", "--pairs", "pairs.jsonl", *SAVE, "--position", "99"],
            "position 99",
        ),
    ],
)
def test_bad_input_is_an_error_of_one_line_and_writes_nothing(arguments, message, analyze, files):
    before = sorted(path.name for path in files.iterdir())
    status, said, results = analyze(*arguments)
    assert status == 1
    assert message in said
    assert said.count("\n") == 1
    assert results is None
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"positive": "a"}, "expected `positive` and `negative`"),
        ({"positive": "a", "negative": [{"role": "user", "content": "b"}]}, "expected `positive` and `negative`"),
        ({"positive": "", "negative": "b"}, "expected `positive` and `negative`"),
        ([1], "expected `positive` and `negative`"),
    ],
)
def test_rows_that_are_no_pairs_are_named(row, message, analyze, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"positive": "a", "negative": "b"}) + "\n\n" + json.dumps(row))
    status, said, _ = analyze("extract", "--model", "base", "--pairs", str(file), *SAVE)
    assert status == 1
    assert "line 3" in said
    assert message in said


def test_a_file_without_pairs_is_an_error(analyze, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n")
    status, said, _ = analyze("extract", "--model", "base", "--pairs", str(file), *SAVE)
    assert status == 1
    assert "has no pairs" in said
