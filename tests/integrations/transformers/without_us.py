"""Run as a program where `trl_steer` cannot be imported: loads exported checkpoints, and compares them with what was
recorded.

Arguments: a folder of checkpoints, each with `recorded.safetensors`; a file for the results, JSON; and the names of
those whose features are tried as well: attention implementations, `device_map`, the static cache, training.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

torch.set_num_threads(1)


def forbid_us() -> None:
    """Makes an import of `trl_steer` fail, as where it is not installed."""
    assert not any(name.partition(".")[0] == "trl_steer" for name in sys.modules)
    sys.modules["trl_steer"] = None
    try:
        import trl_steer  # noqa: F401
    except ImportError:
        return
    raise AssertionError("trl_steer can be imported.")


@torch.no_grad()
def compare(folder: Path, is_tried: bool) -> dict[str, float]:
    recorded = load_file(folder / "recorded.safetensors")
    ids = recorded["input_ids"]

    def error(found: torch.Tensor) -> float:
        return (found - recorded["logits"]).abs().max().item()

    def load(kind=AutoModelForCausalLM, **kwargs):
        return kind.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()

    model = load()
    errors = {"logits": error(model(input_ids=ids).logits)}
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    errors["hidden_states"] = max(
        (found - recorded[f"hidden_states.{index}"]).abs().max().item() for index, found in enumerate(states)
    )
    headless = load(AutoModel)(input_ids=ids).last_hidden_state
    errors["headless"] = (headless - states[-1]).abs().max().item()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for name in (None, "static") if is_tried else (None,):
        cache = {"cache_implementation": name} if name else {}
        chosen = model.generate(input_ids=ids[:1], **settings, **cache)[0, ids.shape[1] :]
        errors[f"cache {name}"] = float((chosen != recorded["chosen"]).sum())
    if not is_tried:
        return errors
    for name in ("eager", "sdpa"):
        errors[name] = error(load(attn_implementation=name)(input_ids=ids).logits)
    errors["device_map"] = error(load(device_map={"": "cpu"})(input_ids=ids).logits)
    model.train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    steering = [parameter for name, parameter in model.named_parameters() if "post_block_steering" in name]
    errors["without gradient"] = float(sum(parameter.grad is None for parameter in steering))
    return errors


def answer(folder: Path) -> str:
    """What the pipeline writes."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert type(generate.model).__name__ == config.architectures[0]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    return generate("ab c", **settings)[0]["generated_text"]


if __name__ == "__main__":
    forbid_us()
    folders = sorted(Path(sys.argv[1]).iterdir())
    results = {
        folder.name: {"errors": compare(folder, folder.name in sys.argv[3:]), "answer": answer(folder)}
        for folder in folders
    }
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
