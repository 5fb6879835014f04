"""Wheels and editable installs hold the same things, and uninstalling leaves nothing behind. Nothing is downloaded."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pages
import pytest
from checkout import CHECKOUT, copy_checkout

SITE_PACKAGES = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
AUTOLOAD = {"trl_steer_autoload.pth", "trl_steer_autoload.py"}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="paths of a POSIX virtual environment")


def call(*command, cwd) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, source: Path, output: Path) -> tuple[Path, str]:
    """Builds with the project's own backend. Returns the archive, and what was printed on the error stream."""
    code = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(output)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (archive,) = output.iterdir()
    return archive, result.stderr


class Environment:
    """A virtual environment that sees the packages of the running one, but not our installation in it."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site_packages = folder / SITE_PACKAGES
        # A line with a path: it extends sys.path, and the .pth files there are not run.
        outside = Path(importlib.util.find_spec("peft").origin).parents[1]
        (self.site_packages / "dependencies.pth").write_text(f"{outside}\n")
        self.empty = self.contents()

    def contents(self) -> set[str]:
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if not path.is_dir())
        return {str(path) for path in files if "__pycache__" not in path.parts}

    def pip(self, *arguments) -> str:
        options = ("--disable-pip-version-check", "--no-input")
        return call(sys.executable, "-m", "pip", "--python", self.python, *arguments, *options, cwd=self.folder)

    def install(self, *what) -> None:
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *what)

    def run(self, code: str) -> str:
        return call(self.python, "-c", code, cwd=self.folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that nothing is written to the checkout."""
    target = copy_checkout(tmp_path_factory.mktemp("source"))
    cache = target / "eval" / "__pycache__"  # which must stay out of every archive
    cache.mkdir()
    (cache / "stale.cpython-311.pyc").touch()
    return target


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp(request.param))
    if request.param == "wheel":
        environment.install(request.getfixturevalue("wheel"))
    else:
        environment.install("--editable", source)
    return environment


def modules(source: Path) -> set[str]:
    """Names of all modules, as they are imported once installed."""
    found = set()
    for package, folder in (("", "trl_steer"), ("trl_steer.", "eval"), ("trl_steer.", "integrations")):
        for path in (source / folder).rglob("*.py"):
            if (path.parent / "__init__.py").is_file():  # the rest is data, as functions beside lm-eval's tasks are
                parts = path.relative_to(source).with_suffix("").parts
                found.add(package + ".".join(parts).removesuffix(".__init__"))
    return found


def data_files(source: Path) -> set[str]:
    return {
        f"trl_steer/{path.relative_to(source)}"
        for folder in ("eval", "integrations")
        for path in (source / folder).rglob("*.yaml")
    }


def test_top_of_site_packages_holds_our_package_and_the_autoload_files_alone(installed):
    added = {path.name for path in installed.site_packages.iterdir()} - {"dependencies.pth", "__pycache__"}
    (dist_info,) = (name for name in added if name.endswith(".dist-info"))
    assert dist_info.startswith("trl_steer-")
    assert added - {dist_info} - {"trl_steer"} == AUTOLOAD


def test_every_module_is_found_under_our_name(installed, source):
    names = sorted(modules(source))
    assert {"trl_steer.eval.benchmarks", "trl_steer.integrations.trl", "trl_steer.tuners.steering.sites"} <= set(names)
    code = f"""
import importlib.util
from importlib.machinery import PathFinder
for name in {names!r}:
    parts, spec = name.split("."), None
    for depth in range(1, len(parts) + 1):
        # like an import, but nothing runs below the packages that are empty anyway
        part = ".".join(parts[:depth])
        path = None if spec is None else spec.submodule_search_locations
        if part in ("trl_steer", "trl_steer.eval", "trl_steer.integrations"):
            spec = importlib.util.find_spec(part)
        else:
            spec = PathFinder.find_spec(part, path)
        assert spec is not None, part
    assert spec.origin and spec.loader.get_code(name) is not None
for name in ("eval", "integrations", "tests"):
    assert importlib.util.find_spec(name) is None, name
"""
    installed.run(code)


def test_yaml_files_are_found_as_resources(installed, source):
    expected = data_files(source)
    assert any(name.startswith("trl_steer/eval/tasks/") for name in expected)
    assert any(name.startswith("trl_steer/integrations/trl/recipes/") for name in expected)
    code = """
import importlib.resources
def walk(folder, name):
    for item in folder.iterdir():
        if item.is_dir():
            walk(item, f"{name}/{item.name}")
        elif item.name.endswith(".yaml") and item.read_text():
            print(f"{name}/{item.name}")
for name in ("eval", "integrations"):
    walk(importlib.resources.files(f"trl_steer.{name}"), f"trl_steer/{name}")
"""
    assert set(installed.run(code).splitlines()) == expected


def test_peft_knows_our_types_without_importing_us(installed):
    code = """
import sys
finders = [getattr(finder, "__name__", "") for finder in sys.meta_path]
assert finders.count("trl_steer_autoload") == 1, finders
assert [name for name in sys.modules if "steer" in name] == ["trl_steer_autoload"]
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.POST_BLOCK_STEERING].__name__)
import trl_steer
print(trl_steer.__file__)
"""
    name, file = installed.run(code).splitlines()
    assert name == "PostBlockSteeringConfig"
    assert not Path(file).is_relative_to(CHECKOUT)


def test_bare_start_imports_nothing_more(installed):
    code = "import sys; print(sorted(sys.modules))"
    without = call(sys.executable, "-I", "-S", "-c", code, cwd=installed.folder)
    for name in ("pathlib", "importlib.util", "importlib.metadata", "re", "typing", "warnings"):
        expected = f"'{name}'" in without
        assert (f"'{name}'" in installed.run(code)) == expected, name


def test_console_command_is_installed(installed):
    assert (installed.folder / "bin" / "trl-steer").is_file()


def test_editable_install_follows_the_checkout(source, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install("--editable", source)
    for folder in ("eval", "integrations"):
        (source / folder / "written_later.py").write_text("value = 7")
        try:
            code = f"from trl_steer.{folder}.written_later import value; print(value)"
            assert environment.run(code) == "7\n"
        finally:
            (source / folder / "written_later.py").unlink()


def test_another_checkout_on_the_path_goes_before_an_editable_install(source, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install("--editable", source)
    other = shutil.copytree(source, tmp_path / "other")
    code = f"""
import sys
sys.path.insert(0, {str(other)!r})
import trl_steer, trl_steer.eval, trl_steer.integrations.trl
for module in (trl_steer, trl_steer.eval, trl_steer.integrations.trl):
    print(module.__file__)
"""
    files = environment.run(code).splitlines()
    expected = ["trl_steer/__init__.py", "eval/__init__.py", "integrations/trl/__init__.py"]
    assert files == [str(other / name) for name in expected]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalling_leaves_nothing_behind(kind, source, wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install(*([wheel] if kind == "wheel" else ["--editable", source]))
    assert environment.contents() != environment.empty
    environment.pip("uninstall", "--yes", "trl-steer")
    assert environment.contents() == environment.empty
    assert "trl_steer" not in environment.run("import sys; print(sys.meta_path)")


def test_wheel_holds_no_bytecode_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".pyc") or "tests" in name]
    assert "trl_steer/py.typed" in names


def test_wheel_holds_the_guides(wheel):
    guides = {page for page in pages.pages() if page != "README.md" and not page.startswith("eval/results/")}
    with zipfile.ZipFile(wheel) as archive:
        assert {f"trl_steer/{page.removeprefix('trl_steer/')}" for page in guides} <= set(archive.namelist())


def test_wheel_from_the_source_archive_is_the_same(source, wheel, tmp_path):
    archive, _ = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again, _ = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        assert all(first.read(name) == second.read(name) for name in AUTOLOAD)


def test_editable_build_prints_no_warning(source, tmp_path):
    _, messages = build("editable", source, tmp_path)
    assert "warning" not in messages.lower(), messages
