"""Loading an adapter, and replacing a loaded adapter by another."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel
from peft.utils import hotswap as peft_hotswap

from trl_steer import hotswap_adapter

from . import models
from .harness import Result, alternate, compare

NAME = "loading"
OURS, LORA = "low rank r=8", "LoRA r=8 all-linear"
SWAP, RELOAD, LORA_SWAP = "hotswap_adapter", "delete and load", "PEFT's LoRA hot swap"


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratios for loading, then for replacing."""
    config = models.tiny() if quick else models.smollm2_135m()
    name = "tiny Llama" if quick else "SmolLM2-135M"
    base = models.build(config, device)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = {adapter: _save(base, adapter, Path(scratch)) for adapter in ("low_rank", "lora")}
        loads = {OURS: _load(base, folders["low_rank"]), LORA: _load(base, folders["lora"])}
        times = alternate(loads, repeats, device)
        yield compare(NAME, f"PeftModel.from_pretrained, {name}", times, OURS, LORA)
        times = alternate(_replacements(base, folders, device), repeats, device)
        case = f"replacing an adapter, {name}"
        yield compare(NAME, case, times, SWAP, RELOAD)
        yield compare(NAME, case, times, SWAP, LORA_SWAP)


def _save(base, adapter: str, scratch: Path) -> Path:
    folder = scratch / adapter
    models.adapted(base, adapter).save_pretrained(str(folder))
    return folder


def _load(base, folder: Path) -> Callable[[], object]:
    """Loads into a new copy of the modules. Copying takes little time, the same on both sides."""
    return lambda: PeftModel.from_pretrained(models.share(base), folder)


def _replacements(base, folders: dict[str, Path], device: str) -> dict[str, Callable[[], object]]:
    swapped = PeftModel.from_pretrained(models.share(base), folders["low_rank"])
    reloaded = PeftModel.from_pretrained(models.share(base), folders["low_rank"])
    lora = PeftModel.from_pretrained(models.share(base), folders["lora"])

    def delete_and_load() -> None:
        reloaded.delete_adapter("default")
        reloaded.load_adapter(folders["low_rank"], "default")

    return {
        SWAP: lambda: hotswap_adapter(swapped, folders["low_rank"]),
        RELOAD: delete_and_load,
        LORA_SWAP: lambda: peft_hotswap.hotswap_adapter(lora, str(folders["lora"]), "default", torch_device=device),
    }
