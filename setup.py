"""What pyproject.toml cannot say: which packages there are, and the `.pth` file at the root of site-packages.

`trl_steer_autoload.pth` goes into wheels and editable installs alike; see `trl_steer/autoload.py`. In an editable
install its finder also maps our packages to the checkout. That stands in for setuptools' own finder, which imports
`pathlib` and more at every start of the interpreter, whether or not we are used, and nearly doubles its time.
"""

import json
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH = Path("trl_steer", "trl_steer_autoload.pth")

# `eval/` and `integrations/` stay at the top of the checkout and install inside the package, so that nothing named
# `eval` lands in site-packages.
FOLDERS = {"trl_steer": "trl_steer", "trl_steer.eval": "eval", "trl_steer.integrations": "integrations"}

FIND_FOLDER = (
    "__import__('importlib.util').util.spec_from_file_location("
    "name, folders[name] + '/__init__.py', submodule_search_locations=[folders[name]])"
)


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
    """An editable wheel holds only what its strategy writes and what lies in its unpacked folder."""

    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):
        outputs = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        if self.mode:  # what a user asks for with `--config-settings editable_mode=strict`
            shutil.copy(PTH, unpacked_wheel)
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
        wheel.writestr(PTH.name, editable_pth(PTH.read_text(encoding="ascii")))


def editable_pth(line: str) -> str:
    """The line of the .pth file with a finder that knows our folders, besides what it does for `peft`."""
    folders = {package: str(Path(folder).resolve()) for package, folder in FOLDERS.items()}
    start, end = line.index("eval(") + len("eval("), line.rindex(", {}")
    code = json.loads(line[start:end])
    for old, new in (
        ("lambda name, *_:", f"lambda name, *_, folders={folders!a}:"),
        ("else None", f"else eval({FIND_FOLDER!a}) if name in folders else None"),
    ):
        if code.count(old) != 1:
            raise ValueError(f"{PTH} should hold {old!r} once, so that an editable install can extend it: {code}")
        code = code.replace(old, new)
    return line[:start] + json.dumps(code) + line[end:]


def packages() -> list[str]:
    found = []
    for package, folder in FOLDERS.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


setup(
    packages=packages(),
    package_dir=FOLDERS,
    cmdclass={"build_py": BuildPyWithPth, "editable_wheel": EditableWheelWithPth},
)
