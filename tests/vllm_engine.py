"""Answers requests with an engine of vLLM. Reads them as JSON, and writes the answers to a file."""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    requests, new_tokens = job.pop("requests"), job.pop("new_tokens", 12)
    folders = {folder: number for number, (_, folder) in enumerate(requests, 1) if folder is not None}
    loras = {folder: LoRARequest(folder, number, folder) for folder, number in folders.items()}
    engine = LLM(**{"dtype": "float32", "enable_lora": True, "skip_tokenizer_init": True, **job})
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=1, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": ids} for ids, _ in requests]
    outputs = engine.generate(prompts, greedy, lora_request=[loras.get(folder) for _, folder in requests])
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        answers.append([list(output.prompt_token_ids), tokens, logprobs])
    Path(sys.argv[1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
