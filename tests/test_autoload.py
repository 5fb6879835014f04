"""Our PEFT types are there as soon as `peft` is, whoever imports it and in whatever order."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fork_server import ForkServer

import trl_steer

NO_AUTOLOAD = 'import os; os.environ["TRL_STEER_NO_AUTOLOAD"] = "1"\n'

# Our type is registered once, completely, and without a word.
REGISTERED = """
import sys
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
assert PeftType._member_names_.count("POST_BLOCK_STEERING") == 1
import trl_steer
from trl_steer.tuners.post_block_steering import PostBlockSteeringConfig, PostBlockSteeringModel
peft_type = PeftType.POST_BLOCK_STEERING
assert PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is PostBlockSteeringConfig is trl_steer.PostBlockSteeringConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[peft_type] is PostBlockSteeringModel
assert PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] == PostBlockSteeringModel.prefix
assert PostBlockSteeringConfig().peft_type is peft_type
"""

IMPORTS_OF_OTHERS = {
    "peft": "import peft",
    "a name from peft": "from peft import PeftModel",
    "a submodule of peft": "import peft.tuners.lora",
    "the enum itself": "from peft.utils.peft_types import PeftType",
    "transformers, then peft": "import transformers; transformers.AutoModel; import peft",
    "transformers' own use of peft": (
        "import transformers.integrations.peft\n"
        "assert transformers.utils.is_peft_available()\n"
        "from peft import PeftConfig"
    ),
    "peft in a thread": (
        "import threading\nt = threading.Thread(target=__import__, args=['peft']); t.start(); t.join()"
    ),
}

IMPORTS_OF_OURS = {
    "trl_steer, then peft": "import trl_steer, peft",
    "peft, then trl_steer": "import peft, trl_steer",
    "a tuner": "import trl_steer.tuners.post_block_steering",
    "a module of a tuner": "from trl_steer.tuners.post_block_steering.config import PostBlockSteeringConfig",
    "a public name": "from trl_steer import PostBlockSteeringConfig",
    "registration": "import trl_steer.registration",
    "registration, called": "from trl_steer.registration import register_peft_types; register_peft_types()",
    "transformers, then trl_steer": "import transformers, trl_steer",
    "trl_steer in a thread": (
        "import threading\n"
        "t = threading.Thread(target=__import__, args=['trl_steer.tuners.post_block_steering']); t.start(); t.join()"
    ),
    "both at once, in threads": (
        "import threading\n"
        "names = ['peft', 'trl_steer.tuners.post_block_steering', 'peft.tuners.lora', 'trl_steer.registration']\n"
        "threads = [threading.Thread(target=__import__, args=[name]) for name in names]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()"
    ),
}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as fork_server:
        yield fork_server


@pytest.fixture
def adapter_folder(tmp_path):
    config = {"peft_type": "POST_BLOCK_STEERING", "r": 3, "base_model_name_or_path": "somewhere"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.parametrize("order", IMPORTS_OF_OTHERS)
def test_types_are_registered_in_programs_that_do_not_import_trl_steer(order, server):
    mentions = "import sys; assert 'POST_BLOCK_STEERING' in sys.modules['peft'].PeftType.__members__\n"
    assert server.run(IMPORTS_OF_OTHERS[order] + "\n" + mentions + REGISTERED) == ""


@pytest.mark.parametrize("switch", ["", NO_AUTOLOAD], ids=["autoload", "no autoload"])
@pytest.mark.parametrize("order", IMPORTS_OF_OURS)
def test_importing_trl_steer_in_any_order_registers(order, switch, server):
    assert server.run(switch + IMPORTS_OF_OURS[order] + REGISTERED) == ""


def test_looking_for_peft_many_times_before_importing_it_changes_nothing(server):
    code = """
import importlib.util, sys
from transformers.utils import is_peft_available
specs = [importlib.util.find_spec("peft") for _ in range(5)]
assert len({spec.origin for spec in specs}) == 1
assert specs[0].submodule_search_locations
assert is_peft_available()
assert importlib.util.find_spec("not_a_module") is None
assert not {"peft", "trl_steer.registration", "trl_steer.tuners"} & set(sys.modules)
import peft
assert peft.__spec__.origin == specs[0].origin
"""
    assert server.run(code + REGISTERED) == ""


def test_adapter_folder_loads_in_a_program_that_does_not_import_trl_steer(server, adapter_folder):
    code = f"from peft import PeftConfig; print(PeftConfig.from_pretrained({str(adapter_folder)!r}))"
    assert server.run(code).startswith("PostBlockSteeringConfig(")
    assert "r=3" in server.run(code)


def test_without_autoload_peft_raises_its_own_error_until_trl_steer_is_imported(server, adapter_folder):
    code = f"""
import sys
from peft import PeftConfig, PeftType
assert "trl_steer" not in sys.modules
assert "POST_BLOCK_STEERING" not in list(PeftType)
try:
    PeftConfig.from_pretrained({str(adapter_folder)!r})
except KeyError as error:
    assert error.args == ("POST_BLOCK_STEERING",)
else:
    raise AssertionError("loaded")
import trl_steer
assert PeftConfig.from_pretrained({str(adapter_folder)!r}).r == 3
"""
    assert server.run(NO_AUTOLOAD + code + REGISTERED) == ""


def test_only_the_value_1_switches_autoload_off(server):
    code = 'import os; os.environ["TRL_STEER_NO_AUTOLOAD"] = "0"; import peft\n'
    assert server.run(code + REGISTERED) == ""


def test_registering_again_is_harmless(server):
    code = """
import importlib, sys, peft, trl_steer
from trl_steer import autoload, registration
before = list(sys.meta_path)
for _ in range(2):
    registration.register_peft_types()
    autoload.install()
    importlib.reload(trl_steer)
    importlib.reload(peft)
assert sys.meta_path == before
"""
    assert server.run(code + REGISTERED) == ""


RAISES_WHEN_FOUND = (
    'import sys; sys.meta_path.insert(0, type("Broken", (), '
    '{"find_spec": lambda name, *_: 1 / 0 if name == "trl_steer" else None}))'
)


@pytest.mark.parametrize(
    "damage",
    [
        RAISES_WHEN_FOUND,
        'import sys; sys.modules["trl_steer"] = None',
        'import sys; sys.modules["trl_steer.autoload"] = None',
        'import sys; sys.modules["trl_steer.registration"] = None',
        'import sys; sys.modules["trl_steer.tuners.post_block_steering.model"] = None',
    ],
    ids=["package raises", "package missing", "hook missing", "registration missing", "tuner missing"],
)
def test_broken_package_never_breaks_peft(damage, server):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
ours = [str(w.message) for w in caught if "trl_steer could not register" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
assert peft.LoraConfig(r=2).r == 2
print(ours[0])
"""
    assert server.run(f"{damage}\n{code}").startswith("trl_steer could not register its PEFT types")


def test_type_that_peft_has_itself_is_left_alone_with_a_warning(server):
    code = """
import warnings
import peft
from peft import PeftType, LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

class TheirConfig(LoraConfig):
    pass

class TheirModel(peft.LoraModel):
    prefix = "theirs_"

import ast, pathlib
source = pathlib.Path(SOURCE).read_text()
function = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "add_member")
names = {"enum": __import__("enum"), "Any": object}
exec(compile(ast.Module([function], []), "add_member", "exec"), names)
names["add_member"](PeftType, "POST_BLOCK_STEERING")
register_peft_method(name="post_block_steering", config_cls=TheirConfig, model_cls=TheirModel, prefix="theirs_")

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import trl_steer
messages = [str(w.message) for w in caught if "trl_steer" in str(w.message)]
assert len(messages) == 1 and "has its own method POST_BLOCK_STEERING" in messages[0], messages
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.POST_BLOCK_STEERING] is TheirConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.POST_BLOCK_STEERING] is TheirModel
"""
    import trl_steer.registration

    assert server.run(NO_AUTOLOAD + f"SOURCE = {trl_steer.registration.__file__!r}\n" + code) == ""


def test_peft_type_is_a_member_like_any_other():
    import copy

    from peft import PeftType

    ours, theirs = PeftType.POST_BLOCK_STEERING, PeftType.LORA

    def facts(member, name):
        return [
            type(member) is PeftType,
            isinstance(member, str),
            (member.name, member.value) == (name, name),
            PeftType(name) is PeftType[name] is getattr(PeftType, name) is member,
            member in PeftType,
            member in list(PeftType),
            name in list(PeftType),
            name in PeftType.__members__,
            name in dir(PeftType),
            member == name,
            {name: 1}[member] == 1,
            copy.copy(member) is copy.deepcopy(member) is member,
            pickle.loads(pickle.dumps(member)) is member,
            json.dumps(member) == f'"{name}"',
            repr(member) == f"<PeftType.{name}: {name!r}>",
            f"{member}" == str(member) == f"PeftType.{name}",
        ]

    assert all(facts(theirs, "LORA"))
    assert all(facts(ours, "POST_BLOCK_STEERING"))
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert sorted(PeftType, key=lambda member: member._sort_order_) == list(PeftType)
    with pytest.raises(AttributeError):
        PeftType.POST_BLOCK_STEERING = "something else"
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")


def test_pickled_member_opens_in_a_process_that_has_imported_nothing(server):
    from peft import PeftType

    data = pickle.dumps(PeftType.POST_BLOCK_STEERING)
    assert server.run(f"import pickle; print(pickle.loads({data!r}).value)") == "POST_BLOCK_STEERING\n"


@pytest.mark.parametrize(
    "other",
    [
        "torch",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("importlib.metadata", "email.message", "trl_steer")),
    ],
)
def test_importing_peft_while_another_thread_imports_our_dependencies_does_not_deadlock(other):
    # In a process of its own, since what the fork server has imported no thread waits for.
    code = f"""
import threading
threads = [threading.Thread(target=__import__, args=[name]) for name in ({other!r}, "peft")]
for thread in threads: thread.start()
for thread in threads: thread.join()
import peft
print("POST_BLOCK_STEERING" in peft.PeftType.__members__)
"""
    assert run_python(code).stdout == "True\n"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param('sys.modules["trl_steer"] = None', marks=pytest.mark.slow),
        'sys.modules["trl_steer.registration"] = None',
    ],
)
def test_broken_package_does_not_break_peft_if_warnings_are_errors(damage):
    code = f"import sys, warnings; {damage}; warnings.simplefilter('error', RuntimeWarning); import peft; print(peft)"
    ran = run_python(code)
    assert "<module 'peft'" in ran.stdout
    assert "trl_steer could not register its PEFT types" in ran.stderr


def import_peft(folder, python_path="") -> subprocess.CompletedProcess:
    """Imports `peft` with `folder` as the working directory; a stand-in, since it is about what follows."""
    (folder / "peft.py").touch()
    environment = os.environ | ({"PYTHONPATH": str(python_path)} if python_path else {})
    command = [sys.executable, "-c", "import peft; print('went on')"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=120
    )


def plant(folder, *names) -> None:
    """Files that say when they are run."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("print('run')")


USERS_OWN = ["trl_steer.py"], ["trl_steer/notes.txt"], ["trl_steer/__init__.py", "trl_steer/autoload.py"]
LIKE_OURS = ["trl_steer/__init__.py", "trl_steer/site_packages/trl_steer_autoload.py"]


@pytest.mark.parametrize("names", [*USERS_OWN, LIKE_OURS], ids=lambda names: names[-1])
def test_trl_steer_file_in_the_working_directory_is_not_run(names, tmp_path):
    plant(tmp_path, *names)
    result = import_peft(tmp_path)
    assert result.stdout == "went on\n"
    # A folder that is no package stands behind an installed one, but before the finder of an editable install.
    if "notes" not in names[-1]:
        assert "should find the installed package" in result.stderr
        assert f"finds {tmp_path}" in result.stderr


def test_trl_steer_file_on_pythonpath_is_run_only_if_it_is_the_package(tmp_path):
    users, ours = tmp_path / "users", tmp_path / "ours"
    plant(users, "trl_steer.py")
    plant(ours, *LIKE_OURS)
    assert import_peft(users, users).stdout == "went on\n"
    assert import_peft(ours, ours).stdout == "run\nwent on\n"


def test_script_named_trl_steer_runs_once(tmp_path):
    script = tmp_path / "trl_steer.py"
    script.write_text("print('run')\nimport peft\n")
    (tmp_path / "peft.py").touch()
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "run\n"


def test_finder_imports_nothing_when_it_is_made_nor_when_it_is_asked(tmp_path):
    (tmp_path / "peft.py").touch()
    folder = Path(trl_steer.__file__).parent / "site_packages"
    code = f"""
import sys
before = set(sys.modules)
sys.path += [{str(folder)!r}, {str(tmp_path)!r}]
import trl_steer_autoload
assert trl_steer_autoload.find_spec("json") is None
assert trl_steer_autoload.find_spec("peft").origin
try:
    trl_steer_autoload.find_spec("trl_steer")
except ImportError as error:
    assert "was moved or deleted" in str(error)
print(set(sys.modules) - before)
"""
    assert run_python(code, "-I", "-S").stdout == "{'trl_steer_autoload'}\n"


def test_start_of_the_interpreter_imports_the_finder_alone():
    result = run_python("import sys; print([n for n in sys.modules if n.startswith('trl')])")
    assert result.stdout == "['trl_steer_autoload']\n"
    finders = run_python("import sys; print([getattr(f, '__name__', '') for f in sys.meta_path])").stdout
    assert finders.count("trl_steer_autoload") == 1


def test_importing_the_package_alone_is_light():
    code = "import trl_steer, sys; print(sorted({'torch', 'peft', 'transformers', 'numpy', 'trl'} & set(sys.modules)))"
    assert run_python(code).stdout == "[]\n"


def test_dir_and_unknown_names_of_the_package():
    assert "PostBlockSteeringConfig" in dir(trl_steer)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = trl_steer.no_such_name
    for name in trl_steer.__all__:
        assert getattr(trl_steer, name) is not None


def test_loader_that_serves_many_modules_registers_only_after_peft(tmp_path):
    # A stand-in for PEFT in a zip file, whose one loader also loads submodules while PEFT is half imported.
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        archive.writestr("peft/__init__.py", "import peft.early; complete = True")
        archive.writestr("peft/early.py", "")
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path / "site.zip")!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
assert peft.complete
print(len([w for w in caught if "trl_steer could not register" in str(w.message)]))
"""
    assert run_python(code).stdout == "1\n"
