"""Waits for `import peft`, and then lets `trl_steer.autoload` register our types with it.

Lies at the root of site-packages, where `trl_steer_autoload.pth` imports it at every start of the interpreter: hence
one comparison for each import, and nothing else until somebody wants `peft`.

While somebody looks for a module, the interpreter holds its one import lock. So nothing is imported here until `peft`
has been executed: a thread in the middle of importing the same thing would wait for that lock, and we for the thread.
"""

import sys

# Package -> folder. An editable install writes them here, which stands in for setuptools' slower finder.
FOLDERS = {}  # type: dict[str, str]

# Somebody imported `trl_steer`, which means registration, whatever TRL_STEER_NO_AUTOLOAD says.
asked_for = False


def find_spec(name, path=None, target=None):
    """This module is a `sys.meta_path` finder: for `peft`, what the others find, with registration after it."""
    if name == "peft":
        spec = _spec_of_others(name, path, target)
        if spec is not None:
            _register_after(spec.loader)
        return spec
    if name in FOLDERS:
        return _spec_of_others(name, path, target) or _spec_in_checkout(name, path)
    return None


def _spec_of_others(name, path, target):
    for finder in list(sys.meta_path):
        if finder is not sys.modules[__name__] and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _spec_in_checkout(name, path):
    folder = FOLDERS[name]
    if path:  # beside the package in use, which the working directory or PYTHONPATH may have put before this one
        folder = path[0].removesuffix("trl_steer") + name.rpartition(".")[2]
    new_spec = sys.modules["_frozen_importlib_external"].spec_from_file_location
    return new_spec(name, f"{folder}/__init__.py", submodule_search_locations=[folder])


def _register_after(loader):
    execute = getattr(loader, "exec_module", None)
    # Without a `__dict__` nothing can be wrapped; importing `trl_steer` still registers.
    if execute is None or getattr(execute, "registers", False) or not hasattr(loader, "__dict__"):
        return

    def exec_module(module):
        execute(module)
        # One loader can serve many modules: that of a zip file does.
        if module.__name__ == "peft":
            _register()

    exec_module.registers = True  # type: ignore[attr-defined]
    loader.exec_module = exec_module


def _register():
    import os

    if not asked_for and os.environ.get("TRL_STEER_NO_AUTOLOAD") == "1":
        return
    try:
        from importlib.util import find_spec as find

        # Finding runs nothing: a user's own `trl_steer.py` in the working directory is none of our business.
        spec = find("trl_steer")
        if spec is None or not os.path.isfile(f"{os.path.dirname(spec.origin or '')}/autoload.py"):
            found = (spec and (spec.origin or spec.submodule_search_locations)) or "nothing"
            raise ImportError(f"`import trl_steer` should find the installed package, and finds {found}")
        from trl_steer.autoload import register
    except Exception as error:
        say(f"trl_steer could not register its PEFT types: {error!r}")
    else:
        register()


def say(message):
    """Warns, and does not raise where warnings are errors: somebody's `import peft` must not fail because of us."""
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Warning:
        print(message, file=sys.stderr)


sys.meta_path.insert(0, sys.modules[__name__])
