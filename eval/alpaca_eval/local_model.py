"""Answers of a local model."""

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
# Placeholder for the instruction in the description of a prompt.
PLACE = "{instruction}"
# The files of a model that determine its outputs.
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def alpaca_prompt(instruction: str) -> str:
    return alpaca.prompt({"instruction": instruction, "input": ""})


def messages(instruction: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": instruction}]


@dataclass(frozen=True)
class Sampling:
    """Options of generation. Temperature 0 is greedy."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def load(
    model: str, adapter: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Loads a model as `AutoPeftModelForCausalLM` does: with the tokenizer in the adapter's folder, if there is one,
    and with embeddings resized to it.

    Returns the model, its tokenizer, and a description with `model`, `adapter` and the number of `parameters` of each.

    Raises:
        ValueError, OSError: There is no model, or two adapters, or an adapter without a base model.
    """
    from peft import PeftConfig, PeftModel
    from transformers.utils import find_adapter_config_file

    if Path(model).is_dir() and not any(Path(model).glob("*config.json")):
        raise FileNotFoundError(
            f"{model} has neither config.json nor adapter_config.json. Pass the folder of a checkpoint or an adapter."
        )
    revision = "main"
    if find_adapter_config_file(model) is not None:
        config = PeftConfig.from_pretrained(model)
        if adapter is not None or not config.base_model_name_or_path:
            raise ValueError(f"{model} is an adapter. Pass its base model as --model and a single --adapter.")
        model, adapter, revision = config.base_model_name_or_path, model, config.revision or revision
    loaded, tokenizer = load_base(model, adapter, dtype=dtype, device=device, revision=revision)
    tokenizer.padding_side = "left"
    parameters: dict[str, int | None] = {"base": loaded.num_parameters(), "adapter": None}
    if adapter is not None:
        base = loaded.num_parameters()
        loaded = PeftModel.from_pretrained(loaded, adapter, torch_device=str(loaded.device))
        parameters["adapter"] = sum(each.numel() for each in loaded.parameters()) - base
    return loaded, tokenizer, {"model": model, "adapter": adapter, "parameters": parameters}


class LocalModel:
    """A checkpoint, with or without an adapter.

    Args:
        model (`str`), adapter (`str`, *optional*), dtype (`str`): See [`load`].
        prompt (`str`): `chat`, `alpaca`, or `auto`, which is chat if the tokenizer has a chat template.
        sampling (`Sampling`), pattern (`re.Pattern`, *optional*): Options of generation, and the pattern of thoughts.
        device (`str`, *optional*): Default: the accelerator, if there is one, else the CPU.
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
        from transformers import GenerationConfig

        self._seed, self._pattern = sampling.seed, pattern
        loaded, self.tokenizer, self.description = load(model, adapter, dtype, device)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if prompt == CHAT and not self.tokenizer.chat_template:
            raise ValueError("--prompt chat needs a tokenizer with a chat template. Use --prompt alpaca.")
        self._is_chat = prompt != ALPACA and bool(self.tokenizer.chat_template)
        self.model = loaded.eval()
        # Only the special tokens are those of the model's generation config. Its other options, such as a repetition
        # penalty, must not change the outputs.
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.model.generation_config = GenerationConfig(
            bos_token_id=loaded.generation_config.bos_token_id,
            eos_token_id=loaded.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=sampling.max_new_tokens,
            **(drawn if sampling.temperature > 0 else {}),
        )
        # The chat template may end in the opening tag of a thought.
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
        """The output for each instruction, which only depends on the seed and the batch."""
        import torch

        texts = [self.text(instruction) for instruction in instructions]
        # The chat template already adds the special tokens.
        batch = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not self._is_chat)
        # The seed depends on the batch only, so that a run that is continued gives the same outputs.
        identity = "\0".join([str(self._seed), *instructions])
        torch.manual_seed(int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) >> 1)
        with torch.no_grad():
            tokens = self.model.generate(**batch.to(self.model.device))
        return [self._read(ids) for ids in tokens[:, batch["input_ids"].shape[1] :]]

    def _read(self, ids: Any) -> Output:
        # Including special tokens, because the tags of thoughts are special tokens in some models.
        answer, thought = thoughts.split(self._opened + self.tokenizer.decode(ids), self._pattern)
        if not thought:
            return Output(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
        for token in self.tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return Output(answer.strip(), thought)


def _fingerprint(model: str, adapter: str, config: Any) -> str:
    """A hash that changes if the files of the model or the adapter change."""
    files = sorted(file for source in {model, adapter} for name in _WEIGHTS for file in Path(source).glob(name))
    state = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    commit = str(getattr(config, "_commit_hash", None))  # for a model from the Hub
    return hashlib.sha256("\n".join([commit, *state]).encode()).hexdigest()[:16]
