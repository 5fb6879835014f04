"""An adapter folder, read without a model: its configuration, and its tensors by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

PREFIX = "base_model.model."
# Stands for the hidden size where it is not known.
_ANY = -1

# Names of dtypes in a safetensors header. Others are no floating point formats that an adapter can have.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class AdapterFolder:
    """
    A folder with an adapter, on disk or on the Hub. Weights are read as safetensors only, never as a pickle.

    Attributes:
        path (`str`): What the user called it.
        weights (`Path`): The file with the tensors.
        download_kwargs (`dict`): What it was found with (`subfolder`, `revision`, `token`, ...).
    """

    path: str
    weights: Path
    download_kwargs: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike, **download_kwargs: Any) -> AdapterFolder:
        """
        Finds the weights of an adapter, and downloads them where they are on the Hub. Nothing is read yet.

        Args:
            path (`str` or `Path`): Folder or Hub id.
            download_kwargs: `subfolder`, and what `huggingface_hub.hf_hub_download` takes.

        Raises:
            ValueError: There are no weights, only a pickle, or what has their name is not a file.
        """
        kwargs = {name: value for name, value in download_kwargs.items() if value is not None}
        subfolder = kwargs.pop("subfolder", None)
        found = Path(path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if not os.path.lexists(found):
            if Path(path, subfolder or "", WEIGHTS_NAME).exists():
                raise ValueError(_pickle_only(str(path)))
            if Path(path).exists():
                raise ValueError(f"Can't find weights in {found.parent}: there is no {SAFETENSORS_WEIGHTS_NAME}.")
            found = _download(str(path), subfolder, kwargs)
        if not found.exists() or not stat.S_ISREG(found.stat().st_mode):
            raise ValueError(f"{found} is not a regular file, so no weights can be read from it.")
        return cls(str(path), found, {"subfolder": subfolder, **kwargs})

    @property
    def config(self) -> Any:
        """The adapter's configuration, of the class that its type is registered with.

        Raises:
            ValueError: There is none, or it cannot be read.
        """
        kwargs = dict(self.download_kwargs)
        try:
            return PeftConfig.from_pretrained(self.path, **kwargs)
        except Exception as error:  # the file may hold anything, and PEFT trusts it
            raise ValueError(
                f"{CONFIG_NAME} in {self.path} cannot be read: {type(error).__name__}: {error}"
            ) from error

    def header(self) -> dict[str, torch.Tensor]:
        """All tensors by name as empty ones on the meta device, of the shape and dtype that the file's header says.

        Raises:
            ValueError: The file cannot be read.
        """
        with self._opened() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {
                name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
                for name, part in slices.items()
            }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, on the CPU.

        Raises:
            ValueError: The file cannot be read.
        """
        with self._opened() as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.weights, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.weights} cannot be read, it may have been cut off: {error}") from error


def check_without_model(layer_cls: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Makes sure that tensors are whole adapters for a configuration, as far as that can be told without a model.

    Args:
        layer_cls (`type[SteeringLayer]`): The layer of the tuner.
        config ([`SteeringConfig`]): The steering part of the adapter's configuration.
        tensors (`Mapping[str, torch.Tensor]`): The steering tensors under the keys of a file.

    Raises:
        ValueError: There are none, some are missing, unknown, of a shape that does not fit, not floating point or not
            finite. Each is named.
    """
    container = f".{layer_cls.layer_name}.{layer_cls.adapter_layer_names[0]}."
    expected = layer_cls.adapter_class(config).shapes(config, _ANY)
    blocks: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        block, found, leaf = key.partition(container)
        if not found or not block.startswith(PREFIX) or leaf not in expected:
            problems.append(f"{key} has no place in this adapter")
        else:
            blocks.setdefault(block, {})[leaf] = tensor
    if not blocks:
        problems.append(f"there is no tensor whose name holds {container!r}")
    sizes: set[int] = set()
    for block, leaves in blocks.items():
        problems += [f"{block}{container}{leaf} is missing" for leaf in expected if leaf not in leaves]
        for leaf, tensor in leaves.items():
            shape = tuple(tensor.shape)
            fits = len(shape) == len(expected[leaf]) and all(
                wanted in (_ANY, size) for wanted, size in zip(expected[leaf], shape, strict=True)
            )
            sizes |= {size for wanted, size in zip(expected[leaf], shape, strict=False) if wanted == _ANY}
            if not fits:
                problems.append(f"{block}{container}{leaf} has shape {shape}, {_readable(expected[leaf])} is expected")
            elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                problems.append(f"{block}{container}{leaf} holds values that are not finite numbers")
    if len(sizes) > 1:
        problems.append(f"hidden sizes differ: {sorted(sizes)}")
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"The steering tensors do not fit their configuration: {'; '.join(problems[:8])}{more}.")


def _readable(shape: tuple[int, ...]) -> str:
    return f"({', '.join('d' if size == _ANY else str(size) for size in shape)})"


def _download(path: str, subfolder: str | None, kwargs: dict) -> Path:
    name = f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME
    try:
        return Path(hf_hub_download(path, name, **kwargs))
    except Exception as error:
        try:
            repository = {key: kwargs[key] for key in ("revision", "repo_type", "token") if key in kwargs}
            pickled = file_exists(path, name.replace(SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), **repository)
        except Exception:  # offline, for example; the first error says more
            pickled = False
        if pickled:
            raise ValueError(_pickle_only(path)) from error
        raise ValueError(f"Can't find weights for {path}, neither as a folder nor on the Hub: {error}") from error


def _pickle_only(path: str) -> str:
    return (
        f"{path} holds its weights as {WEIGHTS_NAME} only, a pickle, which can run any code when it is loaded. If you "
        f"trust it, convert it once: safetensors.torch.save_file(torch.load('{WEIGHTS_NAME}', weights_only=True), "
        f"'{SAFETENSORS_WEIGHTS_NAME}')."
    )
