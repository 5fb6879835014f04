"""The one way to load a model with an adapter, and which models can be named."""

import pytest
import tiny_runs
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_steer import PostBlockSteeringConfig
from trl_steer.eval import models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.save_checkpoint(tmp_path_factory.mktemp("model"))


def adapter(model, folder, tokenizer=None):
    base = AutoModelForCausalLM.from_pretrained(model)
    if tokenizer is not None:
        base.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(folder)
    get_peft_model(base, PostBlockSteeringConfig(task_type="CAUSAL_LM", init_weights=False)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("new_tokens", [None, [], ["<tool>", "</tool>"]])
def test_an_adapter_is_loaded_as_peft_itself_does(new_tokens, model, tmp_path):
    tokenizer = None if new_tokens is None else tiny_tokenizer()
    if new_tokens:
        tokenizer.add_tokens(new_tokens)
    folder = adapter(model, tmp_path, tokenizer)
    ours, loaded_tokenizer = models.load(model, folder, device="cpu")
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert len(loaded_tokenizer) == len(tokenizer or tiny_tokenizer())
    ids = torch.arange(len(loaded_tokenizer))[None]
    assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)
    assert not ours.training


def test_loading_without_an_adapter_gives_the_model(model):
    loaded, _ = models.load(model, device="cpu")
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits)


def test_a_model_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        models.resolve(str(tmp_path / "absent"))


def test_a_hub_id_and_a_checkpoint_folder_are_taken_as_they_are(model):
    assert models.resolve("owner/name") == "owner/name"
    assert models.resolve(model) == model


@pytest.mark.parametrize("there", [True, False])
def test_conversion_is_announced_only_if_it_happens(there, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "embedded_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(models.importlib.metadata, "version", lambda _: "1")
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_, **__: tmp_path)
    monkeypatch.setattr(models, "_convert", lambda gguf, folder: (folder / "config.json").touch())
    if there:
        (tmp_path / "checkpoint").mkdir()
    said = []
    assert models.resolve(models.EMBEDDED, said.append) == str(tmp_path / "checkpoint")
    assert len(said) == (not there)


def test_the_embedded_model_is_taken_from_the_hub_where_its_package_is_not_there(monkeypatch):
    monkeypatch.setattr(models, "embedded_gguf", lambda: None)
    said = []
    assert models.resolve(models.EMBEDDED, said.append) == models.HUB_ID
    assert "is not installed" in said[0]
