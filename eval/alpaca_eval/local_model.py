"""Answers of a model on this machine: a checkpoint, an adapter on top, or a folder that a TRL script wrote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import load_base
from . import prompts

ADAPTER_CONFIG = "adapter_config.json"
_READ_AT_MOST = 256 * 2**20
# What decides a model's outputs in its folder.
_READ = ("*.safetensors", "*.bin", "config.json", ADAPTER_CONFIG)


@dataclass(frozen=True)
class Sampling:
    """How to write. Greedy at temperature 0."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def arguments(self) -> dict[str, Any]:
        """For `generate`. What is not given is switched off, whatever the model's own settings say."""
        if self.temperature == 0:
            chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**chosen, "max_new_tokens": self.max_new_tokens}


class LocalModel:
    """A model with its tokenizer, loaded.

    Args:
        model (`str`): Hub id or folder of a checkpoint, or folder of an adapter, whose base model is then taken.
        adapter (`str`, *optional*): Folder or Hub id of a PEFT adapter.
        form (`str`): One of [`prompts.FORMS`].
        dtype (`str`), device (`str`, *optional*): As transformers takes them; by default the accelerator, if any.

    Raises:
        ValueError: if there are two adapters, or no chat template for the chat form.
    """

    def __init__(self, model: str, adapter: str | None, form: str, dtype: str = "auto", device: str | None = None):
        from transformers import GenerationConfig

        if (Path(model) / ADAPTER_CONFIG).is_file():
            if adapter is not None:
                raise ValueError(f"{model} is an adapter, and --adapter {adapter} another; name the base by --model.")
            model, adapter = _base_of(model), model
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(
                f"{model} has neither config.json nor {ADAPTER_CONFIG}; expected a checkpoint or an adapter folder, "
                "such as the output_dir of a finished training, or a checkpoint-N in it."
            )
        loaded, self.tokenizer = load_base(model, adapter, dtype=dtype, device=device)
        self.tokenizer.padding_side = "left"
        # The tokens that begin and end a text are the model's; how it writes is for `Sampling` alone to say, and what
        # that leaves open `generate` would take from the model: a repetition penalty, a number of beams.
        theirs = loaded.generation_config
        loaded.generation_config = GenerationConfig(
            **{name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        total = sum(parameter.numel() for parameter in loaded.parameters())
        self.parameters = {"base": total, "adapter": None}
        self.source = {"model": model, "adapter": adapter}
        self.weights = _fingerprint([model, *([adapter] if adapter else [])], loaded.config)
        if adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, adapter)
            self.parameters["adapter"] = sum(parameter.numel() for parameter in loaded.parameters()) - total
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model, self.form = loaded.eval(), prompts.resolve(form, self.tokenizer)

    def encode(self, instructions: list[str]) -> Any:
        """Left-padded token ids and attention mask, each (batch, longest)."""
        if self.form == prompts.CHAT:
            return self.tokenizer.apply_chat_template(
                [prompts.messages(instruction) for instruction in instructions],
                add_generation_prompt=True,
                tokenize=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
        texts = [prompts.alpaca_prompt(instruction) for instruction in instructions]
        return self.tokenizer(texts, padding=True, return_tensors="pt")

    @property
    def prompt_text(self) -> str:
        """The prompt as text, with `{instruction}` in the place of the instruction."""
        if self.form == prompts.ALPACA:
            return prompts.alpaca_prompt("{instruction}")
        chat = prompts.messages("{instruction}")
        return str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    def answer(self, instructions: list[str], sampling: Sampling) -> list[str]:
        """What the model writes for each instruction; for one seed and one batch always the same."""
        import torch

        batch = self.encode(instructions).to(self.model.device)
        # Seeded by what is in the batch, so that a run that was cut off draws the same numbers when it goes on.
        text = "\0".join([str(sampling.seed), *instructions])
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1)
        with torch.no_grad():
            tokens = self.model.generate(**batch, **sampling.arguments(), pad_token_id=self.tokenizer.pad_token_id)
        new = tokens[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _fingerprint(sources: list[str], config: Any) -> str:
    """Tells apart what was loaded from the same place at another time, after a new training for example."""
    state = [str(getattr(config, "_commit_hash", None))]  # of what came from the Hub
    for source in sources:
        files = [file for pattern in _READ for file in Path(source).glob(pattern)] if Path(source).is_dir() else []
        for file in sorted(files):
            status = file.stat()
            # A large file is not read a second time.
            large = status.st_size > _READ_AT_MOST
            content = str(status.st_mtime_ns) if large else hashlib.sha256(file.read_bytes()).hexdigest()
            state.append(f"{file.name} {status.st_size} {content}")
    return hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]


def _base_of(adapter: str) -> str:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say which model it is for; give that by --model and it by --adapter.")
    return base
