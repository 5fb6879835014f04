"""Registers our PEFT types when `peft` is imported, by whichever program imports it.

PEFT has no plugin interface. So that stock programs (`lm_eval`, `trl`, a notebook) load our adapter folders without
importing us, the installed package carries `trl_steer_autoload.pth`. Its one line puts a finder on `sys.meta_path`
that costs one string comparison for every import and calls [`find_spec`] below for `peft` alone, unless the environment
variable `TRL_STEER_NO_AUTOLOAD=1` turns it off.

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
    for finder in sys.meta_path:
        if finder is sys.modules[__name__] or getattr(finder, "__name__", "") == "TrlSteerAutoload":
            continue
        spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
        if spec is not None:
            if spec.loader is not None:
                _register_after_exec(spec.loader)
            return spec
    return None


def install() -> None:
    """Registers now if `peft` is imported, and as soon as it is otherwise. Does nothing the second time."""
    if _is_imported("peft"):
        _register()
    elif sys.modules[__name__] not in sys.meta_path:
        sys.meta_path.insert(0, sys.modules[__name__])


def _register_after_exec(loader) -> None:
    exec_module = loader.exec_module

    def exec_module_and_register(module):
        exec_module(module)
        _register()

    loader.exec_module = exec_module_and_register


def _register() -> None:
    # Whatever is wrong with us must not break somebody's `import peft`.
    try:
        from trl_steer.registration import register_peft_types

        register_peft_types()
    except Exception as error:
        warnings.warn(
            f"trl_steer could not register its PEFT types ({type(error).__name__}: {error}); adapters of these types "
            "will not load. Set TRL_STEER_NO_AUTOLOAD=1 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)
