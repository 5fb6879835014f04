"""What a model is trained on is what it is asked: TRL's token ids of the prompt are lm-eval's, every one of them."""

import pytest
from lm_eval.models.huggingface import HFLM
from scripted_models import SIX, evaluate
from tiny_chat import CHAT_TEMPLATE, EOS, tiny_model, tiny_tokenizer
from tokenizers import processors
from trl import SFTConfig, SFTTrainer

from trl_steer import PostBlockSteeringConfig
from trl_steer.tasks import get_task, load_task

BENCHMARKS = [task.removeprefix("steer_") for task in SIX]


def with_bos(tokenizer, template_writes_it: bool = False):
    """As Llama's: the tokenizer puts a first token before every text, and the chat template writes the same one."""
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    if template_writes_it:
        tokenizer.chat_template = "{{ '<|bos|>' }}" + CHAT_TEMPLATE
    return tokenizer


# name -> (tokenizer, whether the model chats)
SETUPS = {
    "base": (lambda: tiny_tokenizer(), False),
    "base with a first token": (lambda: with_bos(tiny_tokenizer()), False),
    "chat": (lambda: tiny_tokenizer(), True),
    "chat with a first token": (lambda: with_bos(tiny_tokenizer(), template_writes_it=True), True),
}


class Recording(HFLM):
    """Keeps the token ids that it would continue, and stops there."""

    asked: list[list[int]]

    def _model_generate(self, context, max_length, stop, **kwargs):
        self.asked.append(context[0].tolist())
        return context


def asked_ids(tokenizer, benchmark: str, chat: bool) -> dict[str, list[int]]:
    """Prompt -> the ids that lm-eval gives the model for it, one prompt at a time, so that nothing is padding."""
    model = tiny_model(max_position_embeddings=4096, vocab_size=len(tokenizer))
    lm = Recording(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    lm.asked = []
    prompts: list[str] = []
    generate = lm.generate_until

    def generate_one_by_one(requests, disable_tqdm=False):
        prompts.extend(request.doc["prompt"] for request in requests)
        return [generate([request], disable_tqdm=True)[0] for request in requests]

    lm.generate_until = generate_one_by_one
    evaluate(lm, [f"steer_{benchmark}_val"], apply_chat_template=chat)
    return dict(zip(prompts, lm.asked, strict=True))


def trained_rows(tokenizer, benchmark: str, chat: bool, folder) -> list[dict]:
    """What TRL makes of the validation rows, had they been training rows: their ids and labels."""
    trainer = SFTTrainer(
        model=tiny_model(max_position_embeddings=4096, vocab_size=len(tokenizer)),
        args=SFTConfig(output_dir=str(folder), report_to=[], max_length=None, use_cpu=True, bf16=False),
        train_dataset=load_task(benchmark, conversational=chat)["validation"],
        processing_class=tokenizer,
        peft_config=PostBlockSteeringConfig(task_type="CAUSAL_LM"),
    )
    return list(trainer.train_dataset)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompt_has_the_same_token_ids_in_training_and_in_evaluation(hub, benchmark, setup, tmp_path):
    make_tokenizer, chat = SETUPS[setup]
    asked = asked_ids(make_tokenizer(), benchmark, chat)
    task = get_task(benchmark)
    rows = list(task.rows()["validation"])
    trained = trained_rows(make_tokenizer(), benchmark, chat, tmp_path)
    assert len(trained) == len(rows) == len(asked) > 0
    tokenizer = make_tokenizer()
    for row, example in zip(rows, trained, strict=True):
        ids = example["input_ids"]
        length = example["labels"].count(-100)  # TRL leaves the prompt out of the loss
        assert example["labels"][length:] == ids[length:]
        assert ids[:length] == asked[task.prompt(row)]
        assert tokenizer.decode(ids[length:]).startswith(task.completion(row))
        assert EOS in tokenizer.decode(ids[length:]) or chat
