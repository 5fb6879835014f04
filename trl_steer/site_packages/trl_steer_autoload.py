"""Registers our PEFT types after `import peft`, with `trl_steer.autoload`.

This file is at the root of site-packages, and `trl_steer_autoload.pth` imports it whenever the interpreter starts. So
it only makes two comparisons for each import, until `peft` or `trl_steer` is imported.

The interpreter holds its global import lock while it looks for a module. Nothing is imported here before `peft` has
been executed: another thread that imports the same module could wait for that lock while we wait for the thread.
"""

import sys

# When the interpreter starts, this contains PYTHONPATH, but not yet the folder of the script or the working directory,
# which are inserted at the front later. Do not run a file that happens to have our name there.
PATH_AT_START = list(sys.path)

# Whether `trl_steer` was imported, which always registers, whatever the value of TRL_STEER_NO_AUTOLOAD.
asked_for = False


def find_spec(name, path=None, target=None):
    """Makes this module a `sys.meta_path` finder: returns what others find for `peft`, and registers after it."""
    if name == "peft":
        spec = _spec_of_others(name, path, target)
        if spec is not None:
            _register_after(spec.loader)
        return spec
    if name == "trl_steer":
        spec = _spec_of_others(name, path, target)
        if spec is None:
            raise ImportError(
                "trl_steer is installed, but its files are gone: the checkout of an editable install was moved or "
                "deleted. Install it again with `pip install --editable CHECKOUT` from where it is now, or remove it "
                "with `pip uninstall trl-steer`.",
                name=name,
            )
        return spec
    return None


def _spec_of_others(name, path=None, target=None):
    for finder in list(sys.meta_path):
        if finder is not sys.modules[__name__] and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _register_after(loader):
    execute = getattr(loader, "exec_module", None)
    # A loader without `__dict__` cannot be wrapped. Importing `trl_steer` still registers.
    if execute is None or getattr(execute, "registers", False) or not hasattr(loader, "__dict__"):
        return

    def exec_module(module):
        execute(module)
        # One loader can load many modules, for example that of a zip file.
        if module.__name__ == "peft":
            _register()

    exec_module.registers = True  # type: ignore[attr-defined]
    loader.exec_module = exec_module


def _register():
    import os

    if not asked_for and os.environ.get("TRL_STEER_NO_AUTOLOAD") == "1":
        return
    try:
        if not asked_for:
            _check_found()
        from trl_steer.autoload import register
    except Exception as error:
        say(f"trl_steer could not register its PEFT types: {error!r}")
    else:
        register()


def _check_found():
    """Checks that `import trl_steer` would import the installed package, without running any of its code.

    Raises:
        ImportError: It would import something else.
    """
    import importlib.util
    import os

    specs = importlib.util.find_spec("trl_steer"), _spec_of_others("trl_steer", PATH_AT_START)
    found, installed = (os.path.realpath(getattr(spec, "origin", None) or "") for spec in specs)
    if found != installed or not os.path.isfile(f"{os.path.dirname(found)}/site_packages/trl_steer_autoload.py"):
        what = getattr(specs[0], "origin", None) or getattr(specs[0], "submodule_search_locations", "nothing")
        raise ImportError(f"`import trl_steer` should find the installed package, but finds {what}")


def say(message):
    """Warns. Does not raise if warnings are errors, because `import peft` must not fail because of this package."""
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Warning:
        print(message, file=sys.stderr)


sys.meta_path.insert(0, sys.modules[__name__])
