"""Whether there is a model or an adapter of a name, told before anything heavy is imported."""

from pathlib import Path

_SECONDS = 5


def check_folder(name: str, config: str = "config.json") -> None:
    """Looks whether a name can be that of a model (of an adapter, with `config="adapter_config.json"`): a folder with
    that configuration, or a Hub id.

    Raises:
        FileNotFoundError: It is a file or a folder without that configuration, or looks like a folder and is none.
    """
    path = Path(name).expanduser()
    if path.exists() and not (path / config).is_file():
        kind = "a checkpoint" if config == "config.json" else "an adapter"
        raise FileNotFoundError(f"{name} has no {config}; it is no folder of {kind}.")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: there is no such folder.")


def check_on_hub(name: str, revision: str | None = None, config: str = "config.json") -> None:
    """Asks the Hub, or its cache, for the configuration of a model or an adapter that is no folder.

    Raises:
        FileNotFoundError: There is none, or the Hub cannot be reached.
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
            f"There is no folder {name}, and no {config} of that name on the Hub: {reason}"
        ) from error
