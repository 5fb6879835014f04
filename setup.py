"""The parts of the build that pyproject.toml cannot express: the packages, and the files at the root of site-packages.

`eval/` and `integrations/` are at the top of the checkout, but are installed inside the package, so that there is no
`eval` in site-packages. Wheels and editable installs contain the files of `trl_steer/site_packages`; see
`trl_steer/autoload.py`.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = {"trl_steer": "trl_steer", "trl_steer.eval": "eval", "trl_steer.integrations": "integrations"}


class BuildPyWithAutoload(build_py):
    def run(self):
        super().run()
        # An editable install ignores `build_lib`, and installs the files in this folder unchanged.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        for file in Path("trl_steer", "site_packages").glob("trl_steer_autoload.*"):
            shutil.copy(file, target)


class EditableWheel(editable_wheel):
    def finalize_options(self):
        super().finalize_options()
        if self.mode == "compat":
            raise ValueError(
                "editable_mode=compat is not supported: it adds the checkout to sys.path, so that `eval` could be "
                "imported, and trl_steer.eval could not. Leave it out, or pass editable_mode=strict."
            )


setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{found}" for found in find_packages(folder)))
    ],
    package_dir=FOLDERS,
    cmdclass={"build_py": BuildPyWithAutoload, "editable_wheel": EditableWheel},
)
