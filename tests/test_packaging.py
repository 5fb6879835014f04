"""Wheels and editable installs hold the same things, and uninstalling leaves nothing behind. Nothing is downloaded."""

import importlib.util
import os
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
    # Bytecode that is written while something runs has to go with it too.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    words = [str(part) for part in command]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, source: Path, output: Path) -> Path:
    """Builds with the project's own backend. Returns the archive."""
    call(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_{kind}({str(output)!r})", cwd=source)
    (archive,) = output.iterdir()
    return archive


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

    def contents(self) -> set[Path]:
        return set(self.folder.rglob("*"))

    def pip(self, *arguments) -> str:
        options = ("--disable-pip-version-check", "--no-input")
        return call(sys.executable, "-m", "pip", "--python", self.python, *arguments, *options, cwd=self.folder)

    def install(self, how: str, source: Path, wheel: Path | None = None) -> None:
        what = {
            "wheel": [wheel],
            "editable": ["--editable", source],
            "strict": ["--editable", source, "--config-settings", "editable_mode=strict"],
        }
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *what[how])

    def run(self, *arguments: str) -> str:
        return call(self.python, *arguments, cwd=self.folder)


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
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable", "strict"])
def installed(request, source, wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp(request.param))
    environment.install(request.param, source, wheel)
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
    setuptools_own = {name for name in added if name.startswith("__editable__")}
    assert added - {dist_info} - {"trl_steer"} - setuptools_own == AUTOLOAD


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
    installed.run("-c", code)


def test_yaml_files_are_found_as_resources(installed, source, request):
    kind = request.node.callspec.params["installed"]
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
    if kind != "editable":  # which shows the whole folder
        expected = {name for name in expected if not name.startswith("trl_steer/eval/results/")}
    assert set(installed.run("-c", code).splitlines()) == expected


def test_peft_knows_our_types_without_importing_trl_steer(installed):
    code = """
import sys
finders = [getattr(finder, "__name__", "") for finder in sys.meta_path]
assert finders.count("trl_steer_autoload") == 1, finders
assert [name for name in sys.modules if name.startswith("trl_steer")] == ["trl_steer_autoload"]
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.POST_BLOCK_STEERING].__name__)
import trl_steer
print(trl_steer.__file__)
"""
    name, file = installed.run("-c", code).splitlines()
    assert name == "PostBlockSteeringConfig"
    assert not Path(file).is_relative_to(CHECKOUT)


def test_wheel_adds_one_module_to_a_bare_start(source, wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    names = ("-c", "import sys; print(*sys.modules)")
    before = set(environment.run(*names).split())
    environment.install("wheel", source, wheel)
    assert set(environment.run(*names).split()) - before == {"trl_steer_autoload"}


def test_commands_run(installed):
    command = installed.folder / "bin" / "trl-steer"
    assert call(command, "--version", cwd=installed.folder).startswith("trl-steer 0")
    tasks = call(command, "tasks", cwd=installed.folder).strip()
    assert (Path(tasks) / "steer" / "steer_six.yaml").is_file()
    assert installed.run("-m", "trl_steer.integrations.trl.sft", "--dry_run", "--method", "vector")


def test_pickled_class_opens_in_another_process(installed):
    code = "import pickle; from trl_steer.eval.settings import Settings; print(pickle.dumps(Settings).hex())"
    data = installed.run("-c", code).strip()
    code = f"import pickle; print(pickle.loads(bytes.fromhex({data!r})).__module__)"
    assert installed.run("-c", code) == "trl_steer.eval.settings\n"


def test_editable_install_follows_the_checkout(source, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install("editable", source)
    for folder in ("eval", "integrations"):
        (source / folder / "written_later.py").write_text("value = 7")
        try:
            code = f"from trl_steer.{folder}.written_later import value; print(value)"
            assert environment.run("-c", code) == "7\n"
        finally:
            (source / folder / "written_later.py").unlink()


@pytest.mark.parametrize("how", ["editable", "strict"])
def test_missing_checkout_is_an_error_of_importing_trl_steer_only(how, tmp_path):
    source = copy_checkout(tmp_path / "source")
    environment = Environment(tmp_path / "env")
    environment.install(how, source)
    (environment.site_packages / "peft.py").touch()  # a stand-in, before the real one
    source.rename(tmp_path / "moved")
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
print(len(caught), "pip install --editable" in str(caught[0].message))
try:
    import trl_steer
except ImportError as error:
    print(error)
"""
    warned, said = environment.run("-c", code).splitlines()
    assert warned == "1 True"
    assert "was moved or deleted. Install it again" in said


def test_compat_mode_which_would_install_something_else_is_refused(source, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r}, {{'editable_mode': 'compat'}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "ValueError: editable_mode=compat is not supported" in result.stderr


def test_wheel_without_its_metadata_registers_and_runs(source, wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install("wheel", source, wheel)
    (dist_info,) = environment.site_packages.glob("trl_steer-*.dist-info")
    shutil.rmtree(dist_info)
    assert environment.run("-c", "import peft; print('POST_BLOCK_STEERING' in list(peft.PeftType))") == "True\n"
    assert environment.run("-m", "trl_steer.cli", "--version").startswith("trl-steer 0")


@pytest.mark.parametrize("how", ["wheel", "editable", "strict"])
def test_uninstalling_leaves_nothing_behind(how, source, wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.install(how, source, wheel)
    assert environment.run("-m", "trl_steer.cli", "--version")
    assert environment.contents() != environment.empty
    environment.pip("uninstall", "--yes", "trl-steer")
    assert environment.contents() == environment.empty
    assert "trl_steer" not in environment.run("-c", "import sys; print(sys.meta_path)")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME", "HF_ASSETS_CACHE", "HOME"])
def test_clean_removes_what_was_made_here_and_nothing_that_is_the_users(variable, tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), variable: str(tmp_path / "a cache")}
    code = """
from pathlib import Path
from trl_steer.eval import models
models.importlib.metadata.version = lambda _: "1"
models._convert = lambda gguf, folder: (folder / "config.json").touch()
print(models._converted(Path("model.gguf"), lambda _: None))
"""
    checkout = copy_checkout(tmp_path / "checkout")
    shutil.copy(CHECKOUT / "Makefile", checkout)
    with_path = environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=with_path, capture_output=True, text=True, check=True)
    model = Path(ran.stdout.strip())
    judged = model.parents[2] / "alpaca_eval"
    for folder in ("demo-run", "demo-run-2", "outputs", "eval/__pycache__", "my-runs"):
        (checkout / folder).mkdir()
    judged.mkdir(parents=True)
    assert (model / "config.json").is_file()
    subprocess.run(["make", "clean"], cwd=checkout, env=environment, check=True)
    assert not model.exists()
    assert judged.is_dir()
    assert (checkout / "my-runs").is_dir()
    left = {path.name for path in checkout.rglob("*")}
    assert not left & {"demo-run", "demo-run-2", "outputs", "__pycache__"}


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
    archive = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        assert all(first.read(name) == second.read(name) for name in AUTOLOAD)
