"""What users switch on in `SFTTrainer`: packing, loss masks, saved modules, new tokens, resuming, dtypes, 4-bit."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_chat import tiny_model, tiny_tokenizer
from transformers import BitsAndBytesConfig
from trl_cases import (
    STEERING,
    assert_only_adapter_changed,
    assistant,
    dataset_for,
    logged,
    make_trainer,
    snapshot,
    trained_peft_model,
    user,
)

from trl_steer import PostBlockSteeringConfig


def low_rank(**fields) -> PostBlockSteeringConfig:
    return PostBlockSteeringConfig(task_type="CAUSAL_LM", r=4, **fields)


def prompt_completion(rows: int = 16) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [user(f"{i} + {i}?") for i in range(rows)],
            "completion": [assistant(f"it is {2 * i}") for i in range(rows)],
        }
    )


@torch.no_grad()
def logits(model, text: str = "2 + 2?") -> torch.Tensor:
    ids = torch.tensor([tiny_tokenizer()(text).input_ids])
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("steering_type", STEERING)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_trains_only_the_adapter(strategy, steering_type, tmp_path):
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type])
    trainer = make_trainer("sft", tmp_path, peft_config=config, packing=True, packing_strategy=strategy, max_length=96)
    assert len(trainer.train_dataset) < len(dataset_for("sft"))
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)


@pytest.mark.parametrize("steering_type", STEERING)
def test_padding_free_batches_train_as_padded_ones_do(steering_type, tmp_path):
    data = Dataset.from_dict({"messages": [user("a" * n) + assistant("b" * (12 - n)) for n in (1, 3, 7, 11)] * 4})

    def train(padding_free):
        torch.manual_seed(0)
        model = trained_peft_model(steering_type)
        arguments = {"padding_free": padding_free, "max_length": None, "bf16": False, "max_steps": 3}
        trainer = make_trainer("sft", tmp_path, model=model, train_dataset=data, **arguments)
        trainer.train()
        return logged(trainer, "loss"), snapshot(trainer.model)

    padded_losses, padded = train(padding_free=False)
    losses, free = train(padding_free=True)
    assert losses == pytest.approx(padded_losses, rel=1e-5)
    for name, tensor in padded.items():
        torch.testing.assert_close(free[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_completion_only_loss_sees_the_completion_alone(tmp_path):
    def train(**arguments):
        trainer = make_trainer(
            "sft", tmp_path, peft_config=low_rank(), train_dataset=prompt_completion(), bf16=False, **arguments
        )
        before = snapshot(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.train()
        assert_only_adapter_changed(trainer.model, before)
        row = batch["input_ids"][0][batch["labels"][0] != -100]
        return tiny_tokenizer().decode(row), logged(trainer, "loss")[0]

    text, loss = train()
    whole_text, whole_loss = train(completion_only_loss=False)
    assert text.startswith("it is ")
    assert whole_text.startswith("<|im_start|>user")
    assert whole_text.endswith(text)
    assert loss != pytest.approx(whole_loss, rel=1e-4)


def test_assistant_only_loss_trains_only_the_adapter(tmp_path):
    trainer = make_trainer("sft", tmp_path, peft_config=low_rank(), assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    text = tiny_tokenizer().decode(batch["input_ids"][0][batch["labels"][0] != -100])
    assert text.removesuffix("<|im_end|>").isdigit()
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [1]}], ids=str)
@pytest.mark.parametrize("steering_type", STEERING)
def test_saved_adapter_gives_equal_logits(steering_type, fields, tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base_dir)
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type], **fields)
    trainer = make_trainer("sft", tmp_path, model=str(base_dir), peft_config=config, bf16=False)
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)
    trainer.save_model(str(adapter_dir))
    expected = logits(trainer.model)
    assert not torch.equal(expected, logits(tiny_model()))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), str(adapter_dir))), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(str(adapter_dir))), expected)


def test_tokens_of_a_cloned_chat_template_are_trained_and_saved(tmp_path):
    source = tiny_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|done|>"]})
    source.chat_template = source.chat_template.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|done|>")
    source.save_pretrained(tmp_path / "source")
    new_ids = source.convert_tokens_to_ids(["<|turn|>", "<|done|>"])
    trainer = make_trainer(
        "sft", tmp_path, peft_config=low_rank(), bf16=False, chat_template_path=str(tmp_path / "source")
    )
    config = trainer.model.peft_config["default"]
    assert set(new_ids) <= set(config.trainable_token_indices["embed_tokens"])
    assert "lm_head" in config.modules_to_save
    grown = tiny_model()
    grown.resize_token_embeddings(trainer.model.config.vocab_size, mean_resizing=False)
    embeddings = trainer.model.get_base_model().model.embed_tokens.token_adapter.base_layer
    grown.get_input_embeddings().load_state_dict(embeddings.state_dict())

    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)

    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(grown, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[*new_ids, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, trainer.model.eval()(ids).logits)


def test_best_checkpoint_is_loaded_at_the_end(tmp_path):
    data = dataset_for("sft")
    arguments = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    worst_is_best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(
        "sft",
        tmp_path,
        peft_config=low_rank(),
        bf16=False,
        max_steps=3,
        extra={"eval_dataset": data},
        **arguments,
        **worst_is_best,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "checkpoint-1"))
    last = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(trainer.model), logits(first))
    assert not torch.equal(logits(first), logits(last))


@pytest.mark.parametrize("steering_type", STEERING)
def test_bf16_base_trains_an_adapter_kept_in_fp32(steering_type, tmp_path):
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type])
    trainer = make_trainer("sft", tmp_path, tiny_model().to(torch.bfloat16), config)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trainable
    assert {p.dtype for p in trainable} == {torch.float32}
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)
    assert trainer.model.dtype == torch.bfloat16


@pytest.mark.parametrize("steering_type", STEERING)
@pytest.mark.parametrize("trainer_name", ["sft", "dpo"])
def test_four_bit_base_trains_only_the_adapter(trainer_name, steering_type, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **STEERING[steering_type])
    trainer = make_trainer(
        trainer_name,
        tmp_path,
        model=str(tmp_path / "base"),
        peft_config=config,
        extra={"quantization_config": quantization},
    )
    assert type(trainer.model.get_base_model().model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}  # as TRL does it
    before = snapshot(trainer.model)
    trainer.train()
    assert_only_adapter_changed(trainer.model, before)


def test_config_of_a_checkpoint_names_our_type_and_base(tmp_path):
    trainer = make_trainer("sft", tmp_path, peft_config=low_rank(), save_strategy="steps", save_steps=2)
    trainer.train()
    config = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["peft_type"] == "POST_BLOCK_STEERING"
    assert config["inference_mode"] is True
