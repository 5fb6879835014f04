"""Waits for `import peft`, and then lets `trl_steer.autoload` register our types with it.

Lies at the root of site-packages, where `trl_steer_autoload.pth` imports it at every start of the interpreter: hence
two comparisons for each import, and nothing else until somebody wants `peft` or `trl_steer`.

While somebody looks for a module, the interpreter holds its one import lock. So nothing is imported here until `peft`
has been executed: a thread in the middle of importing the same thing would wait for that lock, and we for the thread.
"""

import sys

# While the interpreter starts, this has what PYTHONPATH names, and not yet the folder of the script or the working
# directory, which come first afterwards. What lies there by chance under our name is not to be run.
PATH_AT_START = list(sys.path)

# Somebody imported `trl_steer`, which means registration, whatever TRL_STEER_NO_AUTOLOAD says.
asked_for = False


def find_spec(name, path=None, target=None):
    """This module is a `sys.meta_path` finder: for `peft`, what the others find, with registration after it."""
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
        if not asked_for:
            _check_found()
        from trl_steer.autoload import register
    except Exception as error:
        say(f"trl_steer could not register its PEFT types: {error!r}")
    else:
        register()


def _check_found():
    """Raises `ImportError` where `import trl_steer` would run something else than what is installed.

    Finding runs nothing.
    """
    import importlib.util
    import os

    specs = importlib.util.find_spec("trl_steer"), _spec_of_others("trl_steer", PATH_AT_START)
    found, installed = (os.path.realpath(getattr(spec, "origin", None) or "") for spec in specs)
    if found != installed or not os.path.isfile(f"{os.path.dirname(found)}/site_packages/trl_steer_autoload.py"):
        what = getattr(specs[0], "origin", None) or getattr(specs[0], "submodule_search_locations", "nothing")
        raise ImportError(f"`import trl_steer` should find the installed package, and finds {what}")


def say(message):
    """Warns, and does not raise where warnings are errors: somebody's `import peft` must not fail because of us."""
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Warning:
        print(message, file=sys.stderr)


sys.meta_path.insert(0, sys.modules[__name__])
