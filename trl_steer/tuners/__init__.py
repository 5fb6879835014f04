"""The tuners, a folder each. Importing any of them registers all of them with PEFT."""

import importlib
import pkgutil

# PEFT must be fully imported before any tuner starts: the import hook of `trl_steer.autoload` imports the tuners, and
# must not find one of them half initialised.
import peft  # noqa: F401

for _folder in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_folder.name}")
