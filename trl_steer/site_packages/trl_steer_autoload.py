"""Waits for `import peft`, and then lets `trl_steer.autoload` take part in it.

Lies at the root of site-packages, where `trl_steer_autoload.pth` imports it at every start of the interpreter: hence
one comparison for each import, and nothing else until somebody wants `peft`.
"""

import sys

# Package -> folder. An editable install writes them here, which stands in for setuptools' slower finder.
FOLDERS = {}  # type: dict[str, str]


def find_spec(name, path=None, target=None):
    """This module is a `sys.meta_path` finder, which leaves `peft` to the finders after it."""
    if name == "peft":
        _take_part()
    elif name in FOLDERS:
        from importlib.util import spec_from_file_location

        folder = FOLDERS[name]
        return spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])
    return None


def _take_part():
    import os
    import warnings

    if os.environ.get("TRL_STEER_NO_AUTOLOAD") != "1":
        try:
            import trl_steer.autoload  # noqa: F401
        except Exception as error:  # somebody's `import peft` must not fail because of us
            warnings.warn(f"trl_steer could not register its PEFT types: {error!r}", stacklevel=2)


sys.meta_path.insert(0, sys.modules[__name__])
