"""Checks for optional packages, and names the extra that installs them."""

import importlib.util


def require(extra: str, *modules: str) -> None:
    """Checks that modules are installed, without importing them.

    Args:
        extra (`str`): The extra of `pip install 'trl-steer[...]'` that installs them.
        modules (`str`): Names of top-level modules.

    Raises:
        ModuleNotFoundError: A module is not installed.
    """
    for name in modules:
        if not _is_there(name):
            raise ModuleNotFoundError(f"The package {name} is not installed: pip install 'trl-steer[{extra}]'")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
