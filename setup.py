"""Puts `trl_steer_autoload.pth` at the root of site-packages, for wheels and editable installs alike.

Everything else is declared in pyproject.toml; what the .pth line does is explained in `trl_steer/autoload.py`.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH = Path("trl_steer", "trl_steer_autoload.pth")


class BuildPyWithPth(build_py):
    """The root of `build_lib` becomes the root of site-packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copy(PTH, self.build_lib)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / PTH.name)]


class EditableWheelWithPth(editable_wheel):
    """An editable wheel holds only what lies in its unpacked folder, so the .pth file is put there."""

    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):
        outputs = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        shutil.copy(PTH, unpacked_wheel)
        return outputs


setup(cmdclass={"build_py": BuildPyWithPth, "editable_wheel": EditableWheelWithPth})
