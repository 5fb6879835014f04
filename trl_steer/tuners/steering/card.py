"""The model card of an adapter folder."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

_BEGIN, _END = "<!-- adapter: begin -->", "<!-- adapter: end -->"
# In a card, this means that it is a template that has not been filled in.
_TEMPLATE_MARKER = "[More Information Needed]"
_PAPER = "https://arxiv.org/abs/2603.00425"
_CITATION = """```bibtex
@article{adila2026weight,
  title   = {Weight Updates as Activation Shifts: A Principled Framework for Steering},
  author  = {Adila, Dyah and Cooper, John and Yun, Alexander and Trost, Avi and Sala, Frederic},
  journal = {arXiv preprint arXiv:2603.00425},
  year    = {2026}
}
```"""


class ModelCardMixin:
    """Mixin for configurations that also saves the folder's model card. PEFT, TRL and transformers save the
    configuration of an adapter last."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in [`~peft.PeftConfig`], and writes the model card. A card that has been edited is kept, and a section
        about the adapter is added to it. The README of a folder without weights is left alone."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        # transformers saves the weights after the configuration.
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file() or not (folder / "README.md").exists():
            write_card(self, folder)

    def card_fields(self) -> dict[str, Any]:
        """The rows of the card's table: a name and a value each. Rows whose value is `None` are left out."""
        raise NotImplementedError


def write_card(config: Any, folder: Path) -> None:
    """Writes or updates the `README.md` of an adapter folder. One that cannot be read as a model card is left alone,
    with a warning.

    Args:
        config ([`~peft.PeftConfig`]): The adapter's configuration, a [`ModelCardMixin`].
        folder (`Path`): The folder. If it holds the weights, the card gives the number of parameters.
    """
    path = folder / "README.md"
    try:
        card: Any = ModelCard.load(path) if path.exists() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    except Exception as error:
        warnings.warn(f"{path} is not a model card, so nothing was added to it: {error}", stacklevel=3)
        return
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    base = public_id(config.base_model_name_or_path)
    card.data.library_name = "peft"
    card.data.base_model = base
    kept = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:") or public_id(tag.split(":")[-1])]
    card.data.tags = sorted({*kept, method.replace("_", "-"), "activation-steering", "trl-steer"})
    section = "\n".join([_BEGIN, *_section(config, method, base, _parameters(folder)), _END])
    before, begin, rest = card.text.partition(_BEGIN)
    if begin:
        card.text = before + section + rest.partition(_END)[2]
    elif _TEMPLATE_MARKER in card.text or not card.text.strip():
        card.text = section + "\n"
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    card.save(path)


def _section(config: Any, method: str, base: str | None, parameters: int | None) -> list[str]:
    name = method.replace("_", " ")
    facts: Mapping[str, Any] = {
        "base model": f"[{base}](https://huggingface.co/{base})" if base else None,
        **config.card_fields(),
        "parameters": None if parameters is None else f"{parameters:,}",
    }
    load = base or "BASE_MODEL"
    return [
        f"# {name[0].upper()}{name[1:]} adapter",
        "",
        f"A [PEFT](https://github.com/huggingface/peft) adapter made with `trl_steer`, after [the paper]({_PAPER}).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in facts.items() if value is not None),
        "",
        "## Use",
        "",
        "```bash",
        "pip install trl-steer",
        "```",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{load}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{load}")',
        'model = PeftModel.from_pretrained(base, "FOLDER_OR_HUB_ID_OF_THIS_ADAPTER")',
        "```",
        "",
        "## Citation",
        "",
        _CITATION,
    ]


def public_id(base: Any) -> str | None:
    """The base model's Hub id, or `None` for a local folder, whose path is of no use to others."""
    name = str(base or "")
    is_local = os.path.exists(name) or name.startswith((".", "/", "~", "\\")) or name.count("/") != 1
    return None if not name or is_local else name


def _parameters(folder: Path) -> int | None:
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError):
        return None
    return sum(math.prod(size) for size in sizes)
