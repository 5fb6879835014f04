"""What the tests of serving share: adapters, what PEFT says about an engine's answers, and vLLM in other processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig, SublayerSteeringConfig

WHY = "vLLM is not installed here; make test-serving makes an environment with it"
# Of log-probabilities in float32.
TOLERANCE = 1e-3
BASE = "base"
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class Answer(NamedTuple):
    """The token ids of a prompt, and those that an engine added, with its log-probabilities of these."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def post_block(**fields: Any) -> PeftConfig:
    return PostBlockSteeringConfig(task_type="CAUSAL_LM", **fields)


def sublayer(site: str, **fields: Any) -> PeftConfig:
    return SublayerSteeringConfig(task_type="CAUSAL_LM", site=site, **fields)


def joint(steering: dict[str, Any], **fields: Any) -> PeftConfig:
    return JointSteeringConfig(task_type="CAUSAL_LM", steering=steering, **fields)


def lora(**fields: Any) -> PeftConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **fields)


def write_adapters(model: str, folder: Path, configs: Mapping[str, PeftConfig], size: float, seed: int = 0) -> Path:
    """Writes an adapter for each configuration, whose updates are about `size` times as large as hidden states."""
    for index, (name, config) in enumerate(configs.items()):
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(1000 * seed + index)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if parameter.requires_grad and (key.endswith((".up", ".vector")) or ".lora_B." in key):
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(size * drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else size * drawn)
        adapted.save_pretrained(folder / name)
    return folder


def assert_is_of_peft(answers: Sequence[Answer], model: PreTrainedModel, adapter: Path | None) -> None:
    """Checks that answers are the greedy ones of the model that PEFT loads, and the probabilities too.

    Where the two best tokens are closer than twice the tolerance, either may be chosen. The next token is compared
    after the one that was.
    """
    steered: Any = model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()
    try:
        for answer in answers:
            ids = torch.tensor([answer.prompt + answer.tokens])
            with torch.no_grad():
                expected = steered(ids).logits[0, len(answer.prompt) - 1 : -1].float().log_softmax(-1)
            assert len(answer.tokens) == len(answer.logprobs) == len(expected) > 0
            for token, logprob, row in zip(answer.tokens, answer.logprobs, expected, strict=True):
                assert abs(row[token].item() - logprob) <= TOLERANCE
                assert row[token] >= row.max() - 2 * TOLERANCE
    finally:
        if adapter is not None:
            steered.unload()


def is_different(answer: Answer, other: Answer) -> bool:
    """Whether two answers to the same prompt differ by more than rounding."""
    pairs = zip(answer.logprobs, other.logprobs, strict=True)
    return answer.tokens != other.tokens or any(abs(one - two) > 10 * TOLERANCE for one, two in pairs)


def run_engine(
    model: str,
    requests: Sequence[tuple[list[int], str | None]],
    variables: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Answer]:
    """Runs requests in an engine in another process, all at once.

    Args:
        model (`str`): Folder of the model.
        requests (`Sequence[tuple[list[int], str | None]]`): Token ids, and the folder of the adapter or `None`.
        variables (`Mapping[str, str]`, *optional*): Variables of its environment.
        options: Arguments of `vllm.LLM`, and `new_tokens`.
    """
    job = json.dumps({"model": model, "requests": requests, **options})
    environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(variables or {})}
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.json")
        command = [sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(answers)]
        ran = subprocess.run(command, input=job, capture_output=True, text=True, env=environment, timeout=600)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-8000:]
        return [Answer(*fields) for fields in json.loads(answers.read_text())]


class Server:
    """`trl-steer serve` in a process of its own, as a context manager.

    Args:
        model (`str`): Folder of the model.
        adapters (`Mapping[str, Path]`): Folders by name.
        options (`str`): vLLM's options.
    """

    def __init__(self, model: str, adapters: Mapping[str, Path], *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        named = [word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")]
        mine = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", BASE, "--dtype", "float32"]
        self.command = [sys.executable, "-m", "trl_steer.cli", "serve", model, *named, *mine, *options]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.folder: Path | None = None  # the working directory
        self.environment: Mapping[str, str] = ENVIRONMENT
        self.lines: list[str] = []

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop(signal.SIGTERM)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self._reader.start()
        assert ready.wait(300), "\n".join(self.lines[-50:])
        assert self.process.poll() is None, "\n".join(self.lines[-50:])

    def _read(self, ready: threading.Event) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line.rstrip())
            if "Application startup complete" in line:
                ready.set()
        self.process.wait()
        ready.set()

    def stop(self, number: signal.Signals) -> None:
        """Sends a signal to the server and to the processes of its engine, and waits until they are gone."""
        os.killpg(self.process.pid, number)
        self._reader.join(timeout=120)
        assert not self._reader.is_alive()

    def client(self) -> Any:
        import openai

        return openai.OpenAI(api_key="none", base_url=self.url, max_retries=0, timeout=300)

    def complete(self, name: str, prompt: list[int], new_tokens: int = 16) -> Answer:
        """The greedy answer under the name of an adapter or the base."""
        answered = self.client().completions.create(
            model=name,
            prompt=prompt,
            max_tokens=new_tokens,
            temperature=0,
            logprobs=1,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
        )
        found = answered.choices[0].logprobs
        tokens = [int(token.removeprefix("token_id:")) for token in found.tokens]
        return Answer(prompt, tokens, found.token_logprobs)

    def load(self, name: str, folder: Path, **options: Any) -> tuple[int, str]:
        """The status and the message of the load endpoint."""
        return self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **options})

    def unload(self, name: str) -> tuple[int, str]:
        return self._post("unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        import httpx

        answered = httpx.post(f"{self.url}/{path}", json=body, timeout=300)
        said = answered.text if answered.status_code == 200 else answered.json()["error"]["message"]
        return answered.status_code, said
