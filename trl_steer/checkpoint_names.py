"""Whether there is a model of a name, told before anything heavy is imported."""

from pathlib import Path

_SECONDS = 5


def check_folder(name: str) -> None:
    """Looks whether a name can be that of a model: the folder of a checkpoint, or a Hub id.

    Raises:
        FileNotFoundError: It is a file or folder without a checkpoint, or looks like a folder and is none.
    """
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json; it is no folder of a checkpoint.")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: there is no such folder.")


def check_on_hub(name: str, revision: str | None = None) -> None:
    """Asks the Hub, or its cache, for the configuration of a model that is no folder.

    Raises:
        FileNotFoundError: There is none, or the Hub cannot be reached.
    """
    if Path(name).expanduser().exists():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_SECONDS)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"There is no folder {name}, and no model of that name was found: {reason}") from error
