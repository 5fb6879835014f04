"""A study at a tiny size: its rows on a model with random weights, which shows that all of them run."""

from dataclasses import replace
from pathlib import Path

from trl_steer.files import new_folder

from .study import Model, Row, Study, Task

MODEL = "tiny-model"
TASK = Task(
    "listops_synthetic",
    source={"train": 16, "validation": 4, "test": 4, "min_tokens": 4, "max_tokens": 6},
    scoring={"batch_size": 4, "gen_kwargs": {"max_gen_toks": 4}},
    training={
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "num_train_epochs": 1.0,
    },
)


def shrink(study: Study, folder: Path) -> Study:
    """All rows of a study on a tiny model and task, with two rates and two seeds at most.

    Args:
        study (`Study`): The study.
        folder (`Path`): Folder of the shrunk study, where the model is saved.
    """
    model = Model(str(folder.resolve() / MODEL), label="tiny")
    if not Path(model.name).is_dir():
        with new_folder(Path(model.name)) as partial:
            _save_model(partial)
    title = f"{study.title}, at a tiny size from random weights"
    rows = [_shrink_row(row) for row in study.rows]
    return replace(study, title=title, models=[model], tasks=[TASK], rows=rows, seeds=study.seeds[:2], guessed=())


def _shrink_row(row: Row) -> Row:
    steering = {name: value for name, value in row.steering.items() if name != "layers_to_transform"}
    return replace(row, rates=tuple(row.rates)[:: max(1, len(row.rates) - 1)], steering=steering)


def _save_model(folder: Path) -> None:
    """Saves a Llama with random weights, and a tokenizer with a token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|eos|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
