"""Registers our PEFT types when `peft` is imported, by whichever program imports it.

PEFT has no plugin interface. So that stock programs (`lm_eval`, `trl`, a notebook) load our adapter folders without
importing us, the installed package puts `trl_steer_autoload.pth` into site-packages. Its one line runs at every start
of the interpreter, twice in a virtual environment, and imports `trl_steer_autoload`, the finder beside it. A module's
bytecode is cached and runs once; code in the line itself would be compiled at each start. That finder compares one
string for every import, and for `peft` alone imports this module, which puts itself next to it, unless the
environment variable `TRL_STEER_NO_AUTOLOAD=1` says not to.

The spec that is returned is the one that every other finder would have given; only its loader's `exec_module` is
wrapped, so that registration follows the real import. `importlib.util.find_spec("peft")`, which transformers calls
many times to see whether PEFT is there, therefore changes nothing.
"""

import sys
import warnings


def find_spec(name, path=None, target=None):
    """A `sys.meta_path` finder for `peft`: what the other finders say, with registration after `exec_module`."""
    if name != "peft":
        return None
    for finder in list(sys.meta_path):
        if finder is sys.modules[__name__]:
            continue
        spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
        if spec is not None:
            if hasattr(spec.loader, "exec_module"):
                _register_after_exec(spec.loader)
            return spec
    return None


def install() -> None:
    """Registers now if `peft` is imported, and as soon as it is otherwise. Does nothing the second time."""
    ours = sys.modules[__name__]
    if _is_imported("peft"):
        _register()
    elif ours not in sys.meta_path:
        names = [getattr(finder, "__name__", "") for finder in sys.meta_path]
        # Directly after the finder that the .pth file has put there: the search that has called it comes to us next.
        sys.meta_path.insert(names.index("trl_steer_autoload") + 1 if "trl_steer_autoload" in names else 0, ours)


def _register_after_exec(loader) -> None:
    exec_module = loader.exec_module

    def exec_module_and_register(module):
        exec_module(module)
        # One loader can serve many modules: that of a zip file does.
        if module.__name__ == "peft":
            _register()

    try:
        loader.exec_module = exec_module_and_register
    except (AttributeError, TypeError) as error:  # a loader without a `__dict__`
        _warn(error)


def _register() -> None:
    # Whatever is wrong with us must not break somebody's `import peft`.
    try:
        from trl_steer.registration import register_peft_types

        register_peft_types()
    except Exception as error:
        # Another thread is importing our tuners, and waits for PEFT, which this one is importing. It will register.
        if type(error).__name__ != "_DeadlockError":
            _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"trl_steer could not register its PEFT types ({type(error).__name__}: {error}); adapters of these types "
        "will not load. Set TRL_STEER_NO_AUTOLOAD=1 to silence this.",
        RuntimeWarning,
        stacklevel=3,
    )


def _is_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)
