"""Checks that a model or an adapter exists, without importing PyTorch or transformers."""

from pathlib import Path

_SECONDS = 5
_KINDS = {"config.json": "model", "adapter_config.json": "adapter", "adapter_model.safetensors": "adapter"}


def check_folder(name: str, file: str = "config.json") -> None:
    """Checks that a name is either the folder of a checkpoint or can be a Hub id.

    Args:
        name (`str`): The name.
        file (`str`, defaults to `"config.json"`): A file that the folder must have; for an adapter,
            `"adapter_config.json"` or `"adapter_model.safetensors"`.

    Raises:
        FileNotFoundError: It is a path, but not that of a folder with the file.
    """
    path = Path(name).expanduser()
    if path.exists() and not (path / file).is_file():
        raise FileNotFoundError(f"{name} is not the folder of a saved {_KINDS[file]}: there is no {file}.")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {name}. A Hub id has the form OWNER/NAME.")


def check_on_hub(name: str, revision: str | None = None, config: str = "config.json") -> None:
    """Checks that a model or an adapter is in the Hub's cache or on the Hub, unless it is a local folder.

    Raises:
        FileNotFoundError: It is not, or the Hub cannot be reached.
    """
    if Path(name).expanduser().exists():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, config, revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, config, revision=revision), timeout=_SECONDS)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"There is no folder {name}, and no {_KINDS[config]} {name} on the Hub: {reason}"
        ) from error
