"""Registers our PEFT types when `peft` is imported, by whichever program imports it.

PEFT has no plugin interface. So that stock programs (`lm_eval`, `trl`, a notebook) load our adapter folders without
importing us, the installed package puts `trl_steer_autoload.pth` into site-packages. Its one line runs at every start
of the interpreter, twice in a virtual environment, and imports `trl_steer_autoload`, the finder beside it. A module's
bytecode is cached and runs once; code in the line itself would be compiled at each start. That finder compares two
strings for every import, and for `peft` gives the spec that the other finders give; only its loader's `exec_module` is
wrapped, so that [`register`] follows the real import, unless the environment variable `TRL_STEER_NO_AUTOLOAD=1` says
not to. `importlib.util.find_spec("peft")`, which transformers calls many times to see whether PEFT is there,
therefore changes nothing.

The finder also says why `import trl_steer` fails where the checkout of an editable install is gone.
"""

import sys


def install() -> None:
    """Registers now if `peft` is imported, and as soon as it is otherwise. Does nothing the second time."""
    if _is_imported("peft"):
        register()
    else:
        _finder().asked_for = True


def register() -> None:
    """Registers our types with PEFT, and warns where that fails."""
    try:
        from trl_steer.registration import register_peft_types

        register_peft_types()
    except Exception as error:
        # Another thread is importing our tuners, and waits for PEFT, which this one is importing. It will register.
        if type(error).__name__ == "_DeadlockError":
            return
        _finder().say(
            f"trl_steer could not register its PEFT types ({type(error).__name__}: {error}); adapters of these types "
            "will not load. Set TRL_STEER_NO_AUTOLOAD=1 to silence this."
        )


def _finder():
    try:
        import trl_steer_autoload
    except ModuleNotFoundError:  # not installed: a checkout on PYTHONPATH
        from trl_steer.site_packages import trl_steer_autoload
    return trl_steer_autoload


def _is_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)
