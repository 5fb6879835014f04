"""Optional packages: which extra of ours brings one that is missing, said in a line."""

import importlib.util


def require(extra: str, *modules: str) -> None:
    """Looks whether modules are installed, without importing them.

    Args:
        extra (`str`): The extra of `pip install 'trl-steer[...]'` that installs them.
        modules (`str`): Names of top-level modules.

    Raises:
        ModuleNotFoundError: One is not.
    """
    for name in modules:
        if not _is_there(name):
            raise ModuleNotFoundError(f"The package {name} is not installed: pip install 'trl-steer[{extra}]'")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
