"""What the page tells a reader to run in vLLM's environment runs as it is written, with tiny models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import alpaca_rows
import pages
import pytest
from serving_cases import ENVIRONMENT, WHY, Server, post_block, write_adapters
from tiny_chat import tiny_model, tiny_tokenizer

pytest.importorskip("vllm", reason=WHY)
pytest.importorskip("lm_eval")

PAGE = "integrations/vllm/README.md"
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
LIMITS = "--limit 3 --gen_kwargs max_gen_toks=4"
# What is added to command lines, which are for models and data of real sizes.
ADDED = [
    (r"(lm_eval run)", rf"\1 {LIMITS}"),
    (r"(alpaca-eval generate)", r"\1 --limit 3 --max-new-tokens 4 --reference $REFERENCE"),
]
FEW_LISTS = '{"listops_synthetic": {"train": 16, "validation": 8, "test": 8}}'


def blocks(heading: str) -> list[pages.Block]:
    return [block for block in pages.blocks(PAGE) if block.heading == heading]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with `MODEL` and `ADAPTER`, and the environment of a shell there."""
    folder = tmp_path_factory.mktemp("reader")
    tiny_model(max_position_embeddings=2048, **SIZES).save_pretrained(folder / "MODEL")
    tiny_tokenizer().save_pretrained(folder / "MODEL")
    write_adapters(str(folder / "MODEL"), folder, {"ADAPTER": post_block(r=2)}, size=0.5)
    # What the package of a build for GPUs has: that for CPUs has another name, by which lm-eval does not find it.
    metadata = folder / "packages" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "packages"),
        "REFERENCE": str(alpaca_rows.write_reference(folder / "reference", 24)),
        "TRL_STEER_DATASETS": FEW_LISTS,
    }
    return folder, {**ENVIRONMENT, **variables}


def paste(block: pages.Block, reader, port: int = 8000) -> str:
    folder, environment = reader
    code = block.code.replace("8000", str(port))
    for pattern, added in ADDED:
        code = re.sub(pattern, added, code)
    if block.language == "python":
        (folder / "pasted.py").write_text(code)
        command = [sys.executable, "pasted.py"]
    else:
        command = ["/bin/bash", "-euo", "pipefail", "-c", code]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, f"{block.place}\n{code}\n{ran.stdout[-3000:]}\n{ran.stderr[-6000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def server(reader):
    """The server of the page, on another port."""
    started = Server("MODEL", {})
    (block, *_) = blocks("Serve")
    started.folder, environment = reader
    started.environment = {**environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    options = "--dtype float32 --max-model-len 1024"
    started.command = ["/bin/bash", "-c", f"exec {block.code.strip().replace('8000', str(started.port))} {options}"]
    with started:
        yield started


def test_the_server_answers_and_changes_its_adapters(server, reader):
    _, call, change, _ = blocks("Serve")
    assert paste(call, reader, server.port)
    assert paste(change, reader, server.port).count("Success") == 2


def test_lm_eval_and_alpaca_eval_ask_the_server(server, reader):
    scored = paste(blocks("Evaluate")[0], reader, server.port)
    assert "steer_listops_synthetic" in scored
    assert "Wrote outputs/model_outputs.json (3 rows)." in scored


def test_the_engine_answers_without_a_server(reader):
    assert paste(blocks("Serve")[-1], reader)


def test_lm_eval_runs_the_engine(reader):
    assert "steer_listops_synthetic" in paste(blocks("Evaluate")[-1], reader)
