"""The tuners. Importing any of them registers all of them with PEFT."""

# PEFT must be fully imported before any tuner module starts: the import hook of `trl_steer.autoload` imports the
# tuners, and must not find one of them half initialised.
import peft  # noqa: F401

from trl_steer.registration import register_peft_types

register_peft_types()
