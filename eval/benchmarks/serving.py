"""The throughput of vLLM with steering: `python -m trl_steer.eval.benchmarks.serving`.

Not one of `python -m trl_steer.eval.benchmarks`, because it needs the environment in which vLLM is installed. Two
engines of one model run in one process: vLLM as it is, and vLLM with our plugin. Requests alternate between them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import report
from .harness import CLOCKS, Result, alternate, compare, use_clock

NAME = "serving"
STOCK, BASE, LORA = "base model, vLLM alone", "base model", "LoRA r=8 all-linear"
STEERING: dict[str, dict[str, Any]] = {
    "low rank r=8": {"r": 8},
    "SiLU r=8": {"r": 8, "activation": "silu"},
    "vector": {"steering_type": "vector"},
}
REQUESTS, TOKENS = 16, 64
SLOTS = {"max_loras": 4, "max_lora_rank": 8}


def run(model: str, repeats: int, requests: int = REQUESTS, tokens: int = TOKENS) -> Iterator[Result]:
    """Yields the ratios of throughputs, tokens per second.

    Args:
        model (`str`): Folder or Hub id of the model.
        repeats (`int`): Number of rounds.
        requests (`int`), tokens (`int`): Number of requests at once, and of tokens in a prompt and in an answer.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # In GiB. On a CPU, the first engine would take nearly all of the memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        adapters = _write_adapters(model, Path(folder))
        stock, ours = _engines(model, 2 * tokens)
        prompts = torch.randint(10, 1000, (requests, tokens), generator=torch.Generator().manual_seed(0)).tolist()
        sides = {STOCK: _generate(stock, prompts, None), BASE: _generate(ours, prompts, None)}
        sides |= {name: _generate(ours, prompts, adapters[name]) for name in (*STEERING, LORA)}
        case = f"{requests} requests, {tokens} + {tokens} tokens, float32, {SLOTS['max_loras']} slots of rank 8"
        # What is compared runs one right after the other, since the speed of a machine drifts within a long round.
        for names in ((STOCK, BASE), *((STOCK, name, LORA) for name in STEERING)):
            seconds = alternate({name: sides[name] for name in names}, repeats)
            throughput = {name: [2 * requests * tokens / one for one in each] for name, each in seconds.items()}
            bound = None if names[1] == BASE else ">= 0.95"
            yield compare(NAME, case, throughput, names[1], STOCK, "tokens/s", bound=bound)
            if LORA in names:
                yield compare(NAME, case, throughput, names[1], LORA, "tokens/s", bound=">= 1.0")


def _write_adapters(model: str, folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    from trl_steer import PostBlockSteeringConfig

    configs: dict[str, Any] = {
        name: PostBlockSteeringConfig(task_type="CAUSAL_LM", init_weights=False, init_scale=1e-3, **fields)
        for name, fields in STEERING.items()
    }
    configs[LORA] = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    for number, config in enumerate(configs.values()):
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder / str(number))
    return {name: LoRARequest(name, number + 1, str(folder / str(number))) for number, name in enumerate(configs)}


def _engines(model: str, length: int) -> tuple[Any, Any]:
    """One without our plugin, then one with it."""
    os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM

    from trl_steer.integrations.vllm import plugin

    options: Any = {"dtype": "float32", "enable_lora": True, "enable_prefix_caching": False, **SLOTS}
    stock = LLM(model, max_model_len=length, **options)
    plugin.register()
    return stock, LLM(model, max_model_len=length, **options)


def _generate(engine: Any, prompts: list[list[int]], adapter: Any) -> Callable[[], object]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=len(prompts[0]), ignore_eos=True)
    inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
    return lambda: engine.generate(inputs, sampling, lora_request=adapter, use_tqdm=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name if __spec__ else __name__}", description=__doc__)
    parser.add_argument("--model", default="embedded", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or CPU time (default: wall)")
    parsed = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    use_clock(parsed.clock)
    from trl_steer.eval.models import resolve

    results = list(run(resolve(parsed.model), parsed.repeats))
    print(f"\n{report.table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
