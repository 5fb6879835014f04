"""The tuners, one folder each. Importing any of them registers all of them with PEFT."""

import importlib
import pkgutil

# PEFT must be fully imported before any tuner: the import hook of `trl_steer.autoload` imports the tuners when PEFT is
# imported, and must not find one of them partially initialized.
import peft  # noqa: F401

for _folder in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_folder.name}")
