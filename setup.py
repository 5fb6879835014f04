"""What pyproject.toml cannot say: which packages there are, and the files at the root of site-packages.

Those of `trl_steer/site_packages` go into wheels and editable installs alike; see `trl_steer/autoload.py`. In an
editable install the finder there also maps our packages to the checkout. That stands in for setuptools' own finder,
which imports `pathlib` and more at every start of the interpreter, whether or not we are used, and nearly doubles its
time.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

SITE_PACKAGES = sorted(Path("trl_steer", "site_packages").glob("trl_steer_autoload.*"))

# `eval/` and `integrations/` stay at the top of the checkout and install inside the package, so that nothing named
# `eval` lands in site-packages.
FOLDERS = {"trl_steer": "trl_steer", "trl_steer.eval": "eval", "trl_steer.integrations": "integrations"}

# What an editable install fills in.
NO_FOLDERS = "FOLDERS = {}"


class BuildPyWithAutoload(build_py):
    """The root of `build_lib` becomes the root of site-packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for file in SITE_PACKAGES:
                shutil.copy(file, self.build_lib)

    def get_outputs(self, include_bytecode=True):
        copied = [] if self.editable_mode else [str(Path(self.build_lib, file.name)) for file in SITE_PACKAGES]
        return [*super().get_outputs(include_bytecode), *copied]


class EditableWheelWithAutoload(editable_wheel):
    """An editable wheel holds only what its strategy writes and what lies in its unpacked folder."""

    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):
        outputs = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        if self.mode:  # what a user asks for with `--config-settings editable_mode=strict`
            for file in SITE_PACKAGES:
                shutil.copy(file, unpacked_wheel)
        return outputs

    def _select_strategy(self, name, tag, build_lib):
        return super()._select_strategy(name, tag, build_lib) if self.mode else MappedFolders()


class MappedFolders:
    """How setuptools wants an editable install to be done: a context manager that writes into the wheel."""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        return None

    def __call__(self, wheel, files, mapping):
        for file in SITE_PACKAGES:
            text = file.read_text(encoding="utf-8")
            wheel.writestr(file.name, text if file.suffix == ".pth" else with_folders(text))


def with_folders(source: str) -> str:
    """The source of the finder, with the folders of the checkout."""
    if source.count(NO_FOLDERS) != 1:
        raise ValueError(f"The finder should hold {NO_FOLDERS!r} once, so that an editable install can fill it in.")
    folders = {package: str(Path(folder).resolve()) for package, folder in FOLDERS.items()}
    return source.replace(NO_FOLDERS, f"FOLDERS = {folders!r}")


def packages() -> list[str]:
    found = []
    for package, folder in FOLDERS.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


setup(
    packages=packages(),
    package_dir=FOLDERS,
    cmdclass={"build_py": BuildPyWithAutoload, "editable_wheel": EditableWheelWithAutoload},
)
