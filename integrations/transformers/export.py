"""The format `transformers` of `trl-steer export`: a checkpoint that loads where this package is not installed."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_steer.choices import ALL
from trl_steer.files import write_text
from trl_steer.tuners.joint_steering import JointSteeringConfig
from trl_steer.tuners.joint_steering.folders import split_adapter
from trl_steer.tuners.post_block_steering import PostBlockSteeringConfig
from trl_steer.tuners.steering import AdapterFolder, SteeringConfig
from trl_steer.tuners.steering.card import public_id
from trl_steer.tuners.steering.matching import find_blocks

from ..export.output import output_folder
from ..export.progress import Progress

CODE = "modeling_steered"
# Which fields of a configuration give the linear layers next to a site biases, where it has them.
_BIASES = {"post_attn": "attention_bias", "heads": "attention_bias"}
_BIAS = "mlp_bias"
# Largest difference between logits of the adapter and of the checkpoint, relative to the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_TOLERANCE_16_BIT = 5e-2


def export_checkpoint(name: str, output: Path, base: str | None, overwrite: bool, progress: Progress) -> str:
    """Writes a checkpoint of the base model with the adapter.

    What can be merged is merged. Other adapters at the blocks' outputs become modules of a model class of their own,
    whose code is part of the checkpoint. The checkpoint is loaded again and compared with the adapter.

    Args:
        name (`str`): Folder or Hub id of the adapter.
        output (`Path`): The folder to write.
        base (`str`, *optional*): Folder or Hub id of the base model. Default: that of the adapter.
        overwrite (`bool`): Whether to replace an existing folder.
        progress ([`Progress`]): Receives the progress.

    Returns:
        `str`: What was written, in one line.

    Raises:
        ValueError: The adapter can be neither merged nor expressed by code, or the checkpoint differs from it.
    """
    with _halves(name) as (steering, lora), output_folder(output, overwrite) as partial:
        config = AdapterFolder.open(steering).config
        source = base or config.base_model_name_or_path
        _check_config(name, config, source)
        if Path(source).exists() and output.exists() and output.samefile(source):
            raise FileExistsError(f"{output} is the base model. Choose another --output.")
        progress.step("Loading the base model")
        model, tokenizer = _load_base(source, name, config)
        if lora is not None:
            progress.step("Merging LoRA")
            model = PeftModel.from_pretrained(model, lora).merge_and_unload()
        steered = PeftModel.from_pretrained(model, steering).eval()
        expected = _probe(steered)
        progress.step("Writing")
        try:
            plain: Any = steered.merge_and_unload()
        except ValueError as error:
            if not isinstance(config, PostBlockSteeringConfig):
                raise ValueError(f"{name} cannot be exported: {error}") from error
            plain = None
        model = _with_code(steered, config, partial) if plain is None else plain
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _write_card(partial, source, plain is None)
        model_class, is_merged = type(model), plain is not None
        del model, plain, steered
        progress.step("Checking")
        _check_logits(model_class, partial, expected)
    how = "without code" if is_merged else f"with its code in {CODE}.py, for which trust_remote_code=True is needed"
    return f"Wrote {output}, {how}."


@contextmanager
def _halves(name: str) -> Iterator[tuple[str, str | None]]:
    """Context manager that gives the folder of a steering adapter, and that of the LoRA half of a joint adapter."""
    if not isinstance(AdapterFolder.open(name).config, JointSteeringConfig):
        yield name, None
        return
    with tempfile.TemporaryDirectory() as temporary:
        lora, steering = (str(Path(temporary, half)) for half in ("lora", "steering"))
        split_adapter(name, lora, steering)
        yield steering, lora


def _check_config(name: str, config: Any, source: str | None) -> None:
    """Checks what can be checked without the base model.

    Raises:
        ValueError: The adapter cannot be exported.
    """
    if not isinstance(config, SteeringConfig):
        raise ValueError(f"{name} has a {type(config).__name__}, expected a steering or a joint adapter.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{name} is of task type {config.task_type}, and only causal language models can be exported."
        )
    if config.positions != ALL:
        raise ValueError(
            f"{name} has positions={config.positions!r}, so that it edits some tokens only, which a checkpoint cannot "
            "express. Use it with PEFT."
        )
    if not source:
        raise ValueError(f"{name} does not name its base model. Pass --base.")


def _load_base(source: str, adapter: str, config: Any) -> tuple[Any, Any]:
    """The base model, with biases if the adapter needs some and the configuration has them, and the tokenizer."""
    base_config = AutoConfig.from_pretrained(source)
    field = _BIASES.get(config.site, _BIAS)
    if getattr(config, "steering_type", None) != "low_rank" and getattr(base_config, field, None) is False:
        setattr(base_config, field, True)
    model: Any = AutoModelForCausalLM.from_pretrained(source, config=base_config, dtype="auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError):  # the adapter was saved without one
        tokenizer = AutoTokenizer.from_pretrained(source)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as PEFT does
    return model, tokenizer


def _with_code(steered: Any, config: PostBlockSteeringConfig, folder: Path) -> Any:
    """The model with steering as modules, on a class whose code is written to the folder.

    Raises:
        ValueError: The base model's classes are not such that this is possible.
    """
    tuner = steered.base_model
    layers = {name.rpartition(".")[0]: layer for name, layer in tuner.named_steering_layers()}
    updates = {block: next(iter(layer.adapters.values())) for block, layer in layers.items()}
    for layer in layers.values():
        layer.remove()
    base = steered.merge_and_unload()  # takes the trained copies of `modules_to_save`
    blocks = find_blocks(base)
    write_text(folder / f"{CODE}.py", _code(base, blocks))
    module = _imported(folder / f"{CODE}.py")
    is_vector = config.steering_type == "vector"
    ranks = {block: 1 if is_vector else len(update.down) for block, update in updates.items()}
    model_config = module.SteeredConfig.from_dict(
        {
            **{key: value for key, value in base.config.to_dict().items() if key not in _OF_THE_CLASS},
            "steering_ranks": [ranks.get(block, 0) for block in blocks],
            "steering_type": config.steering_type,
            "steering_activation": config.activation,
            "steering_scaling": config.scaling,
            "auto_map": {
                "AutoConfig": f"{CODE}.SteeredConfig",
                "AutoModel": f"{CODE}.SteeredModel",
                "AutoModelForCausalLM": f"{CODE}.SteeredForCausalLM",
            },
        }
    )
    state = base.state_dict()
    for block, update in updates.items():
        for tensor_name, tensor in update.named_parameters():
            suffix = "" if is_vector else ".weight"
            state[f"{block}.post_block_steering.{tensor_name}{suffix}"] = tensor.data
    with torch.device("meta"):
        model = module.SteeredForCausalLM(model_config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = base.generation_config
    return model


_OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "auto_map")


def _code(base: Any, blocks: list[str]) -> str:
    """The code of the model, for the classes of a base model.

    Raises:
        ValueError: They are not those of transformers, or the blocks are of several classes.
    """
    decoder_name = base.base_model_prefix
    decoder = getattr(base, decoder_name)
    kinds = {type(base.get_submodule(block)) for block in blocks}
    classes = {"BaseConfig": type(base.config), "BaseForCausalLM": type(base), "BaseModel": type(decoder)}
    if len(kinds) == 1:
        classes["BaseBlock"] = kinds.pop()
    names = [f"{kind.__module__}.{kind.__name__}" for kind in classes.values()]
    inside = all(block.startswith(f"{decoder_name}.") for block in blocks)
    if kinds or not inside or not all(name.startswith("transformers.models.") for name in names):
        raise ValueError(
            f"There is no code for {type(base).__name__}: expected a model of transformers with blocks of one class. "
            "Use the adapter with PEFT."
        )
    code = (resources.files(__package__) / f"{CODE}.py").read_text(encoding="utf-8")
    for alias, kind in classes.items():
        line = f"from {kind.__module__} import {kind.__name__} as {alias}"
        code = _replace_line(rf"from \S+ import \w+ as {alias}", line, code)
    lists = blocks[0].removeprefix(f"{decoder_name}.").rpartition(".")[0]
    return _replace_line(r'BLOCKS = "\S+"', f'BLOCKS = "{lists}"', code)


def _replace_line(pattern: str, line: str, code: str) -> str:
    replaced, found = re.subn(rf"^{pattern}$", line, code, flags=re.MULTILINE)
    if found != 1:
        raise RuntimeError(f"Expected one line like {pattern} in {CODE}.py, found {found}.")
    return replaced


def _imported(file: Path) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(f"{CODE}_{file.parent.name.strip('.')}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """The logits for a few tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (2, 16), generator=generator)
    return model.eval()(input_ids=ids.to(model.device)).logits


def _check_logits(model_class: Any, folder: Path, expected: torch.Tensor) -> None:
    """Checks that a checkpoint gives the logits of the adapter.

    Raises:
        ValueError: It does not.
    """
    found = _probe(model_class.from_pretrained(folder, dtype="auto"))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BIT):
        raise ValueError(
            f"The checkpoint differs from the adapter: its logits have a relative error of {error:.2g}. Use the "
            "adapter with PEFT."
        )


def _write_card(folder: Path, source: str, has_code: bool) -> None:
    data = ModelCardData(library_name="transformers", base_model=public_id(source), tags=["activation-steering"])
    load = f"AutoModelForCausalLM.from_pretrained({'FOLDER, trust_remote_code=True' if has_code else 'FOLDER'})"
    ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# Steered model\n\nThe base model with a steering adapter, exported by "
        f"`trl_steer`. It loads without this package: `{load}`.\n"
    ).save(folder / "README.md")
