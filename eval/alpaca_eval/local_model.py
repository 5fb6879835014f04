"""Answers of a model on this machine."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_steer.tasks import alpaca

from ..models import load_base
from . import thoughts
from .thoughts import Output

AUTO, CHAT, ALPACA = "auto", "chat", "alpaca"
# Stands for the instruction where a prompt is shown.
PLACE = "{instruction}"
# What decides a model's outputs in its folder.
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def alpaca_prompt(instruction: str) -> str:
    return alpaca.prompt({"instruction": instruction, "input": ""})


def messages(instruction: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": instruction}]


@dataclass(frozen=True)
class Sampling:
    """How to write. Greedy at temperature 0."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def load(model: str, adapter: str | None = None, dtype: str = "auto") -> tuple[Any, Any, dict[str, Any]]:
    """Loads a model as `AutoPeftModelForCausalLM` does: with the tokenizer in the adapter's folder, where there is
    one, and as many embeddings as that needs.

    Returns the model, its tokenizer, and what was loaded: `model`, `adapter` and the numbers of `parameters` of each.
    Raises `ValueError` or `OSError` if there are two adapters, one that names no base model, or no model.
    """
    from peft import PeftConfig, PeftModel
    from transformers.utils import find_adapter_config_file

    if Path(model).is_dir() and not any(Path(model).glob("*config.json")):
        raise FileNotFoundError(
            f"{model} has neither config.json nor adapter_config.json; expected a checkpoint or an adapter folder, "
            "the output_dir of a finished training for example."
        )
    revision = "main"
    if find_adapter_config_file(model) is not None:
        config = PeftConfig.from_pretrained(model)
        if adapter is not None or not config.base_model_name_or_path:
            raise ValueError(f"{model} is an adapter; name its base model by --model and one adapter by --adapter.")
        model, adapter, revision = config.base_model_name_or_path, model, config.revision or revision
    loaded, tokenizer = load_base(model, adapter, dtype=dtype, revision=revision)
    tokenizer.padding_side = "left"
    parameters: dict[str, int | None] = {"base": loaded.num_parameters(), "adapter": None}
    if adapter is not None:
        base = loaded.num_parameters()
        loaded = PeftModel.from_pretrained(loaded, adapter)
        parameters["adapter"] = sum(each.numel() for each in loaded.parameters()) - base
    return loaded, tokenizer, {"model": model, "adapter": adapter, "parameters": parameters}


class LocalModel:
    """A checkpoint, an adapter on top, or a folder that a TRL script wrote.

    Args:
        model (`str`), adapter (`str`, *optional*), dtype (`str`): See [`load`].
        prompt (`str`): `chat`, `alpaca`, or `auto`, which is chat where the tokenizer has a template.
        sampling (`Sampling`), pattern (`re.Pattern`, *optional*): How to write, and what is a thought.
        device (`str`, *optional*): By default the accelerator, if there is one.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        prompt: str = AUTO,
        sampling: Sampling = Sampling(),
        pattern: re.Pattern[str] | None = None,
        dtype: str = "auto",
        device: str | None = None,
    ):
        import torch
        from transformers import GenerationConfig

        self._seed, self._pattern = sampling.seed, pattern
        loaded, self.tokenizer, self.description = load(model, adapter, dtype)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if prompt == CHAT and not self.tokenizer.chat_template:
            raise ValueError("--prompt chat was given, but the tokenizer has no chat template; use --prompt alpaca.")
        self._is_chat = prompt != ALPACA and bool(self.tokenizer.chat_template)
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model = loaded.to(device or found or "cpu").eval()
        # The tokens that begin and end a text are the model's; how it writes is for `sampling` alone to say, and what
        # that leaves open `generate` would take from the model: a repetition penalty, a number of beams.
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.model.generation_config = GenerationConfig(
            bos_token_id=loaded.generation_config.bos_token_id,
            eos_token_id=loaded.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=sampling.max_new_tokens,
            **(drawn if sampling.temperature > 0 else {}),
        )
        # A template may have opened a thought already.
        self._opened = thoughts.OPENING if self.text(PLACE).rstrip().endswith(thoughts.OPENING) else ""
        self.description |= {
            "weights": _fingerprint(self.description["model"], adapter or model, loaded.config),
            "prompt_form": CHAT if self._is_chat else ALPACA,
            "prompt": self.text(PLACE),
        }

    def text(self, instruction: str) -> str:
        """The prompt for an instruction."""
        if not self._is_chat:
            return alpaca_prompt(instruction)
        return self.tokenizer.apply_chat_template(messages(instruction), add_generation_prompt=True, tokenize=False)

    def answer(self, instructions: list[str]) -> list[Output]:
        """What the model writes for each instruction; for one seed and one batch always the same."""
        import torch

        texts = [self.text(instruction) for instruction in instructions]
        # A chat template writes the tokens that begin a text itself.
        batch = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not self._is_chat)
        # Seeded by what is in the batch, so that a run that was cut off draws the same numbers when it goes on.
        identity = "\0".join([str(self._seed), *instructions])
        torch.manual_seed(int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) >> 1)
        with torch.no_grad():
            tokens = self.model.generate(**batch.to(self.model.device))
        return [self._read(ids) for ids in tokens[:, batch["input_ids"].shape[1] :]]

    def _read(self, ids: Any) -> Output:
        # Tags of thoughts are special tokens in some models.
        answer, thought = thoughts.split(self._opened + self.tokenizer.decode(ids), self._pattern)
        if not thought:
            return Output(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
        for token in self.tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return Output(answer.strip(), thought)


def _fingerprint(model: str, adapter: str, config: Any) -> str:
    """Tells apart what was loaded from the same place at another time, after a new training for example."""
    files = sorted(file for source in {model, adapter} for name in _WEIGHTS for file in Path(source).glob(name))
    state = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    commit = str(getattr(config, "_commit_hash", None))  # of what came from the Hub
    return hashlib.sha256("\n".join([commit, *state]).encode()).hexdigest()[:16]
