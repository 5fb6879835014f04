"""What pyproject.toml cannot say: which packages there are, and the files at the root of site-packages.

`eval/` and `integrations/` stay at the top of the checkout and install inside the package, so that nothing named
`eval` lands in site-packages. The files of `trl_steer/site_packages` go into wheels and editable installs alike; see
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
        # In an editable install `build_lib` is ignored, and what is to be installed as it is goes here.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        for file in Path("trl_steer", "site_packages").glob("trl_steer_autoload.*"):
            shutil.copy(file, target)


class EditableWheel(editable_wheel):
    def finalize_options(self):
        super().finalize_options()
        if self.mode == "compat":
            raise ValueError(
                "editable_mode=compat was given, which puts the checkout on sys.path: `eval` would be importable, and "
                "trl_steer.eval would not. Leave it out, or give editable_mode=strict."
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
