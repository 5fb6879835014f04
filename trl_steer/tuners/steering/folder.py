"""Reading the configuration and the tensors of an adapter folder without a model."""

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

from .sites import Site

PREFIX = "base_model.model."
# In a shape, the hidden size where it is not known.
_UNKNOWN_SIZE = -1

# Names of dtypes in a safetensors header. An adapter cannot have any other floating point dtype.
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
    A folder with an adapter, local or on the Hub. Weights are read from safetensors files only, never from a pickle.

    Attributes:
        path (`str`): The path or Hub id given by the user.
        weights (`Path`): The safetensors file.
        download_kwargs (`dict`): The download options given by the user (`subfolder`, `revision`, `token`, ...).
    """

    path: str
    weights: Path
    download_kwargs: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike, **download_kwargs: Any) -> AdapterFolder:
        """
        Finds the weights of an adapter, and downloads them if they are on the Hub. Does not read them.

        Args:
            path (`str` or `Path`): Folder or Hub id.
            download_kwargs: `subfolder` and the arguments of `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: There are no weights, or only a pickle, or the path of the weights is not a regular file.
        """
        kwargs = {name: value for name, value in download_kwargs.items() if value is not None}
        subfolder = kwargs.pop("subfolder", None)
        found = Path(path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if not os.path.lexists(found):
            if Path(path, subfolder or "", WEIGHTS_NAME).exists():
                raise ValueError(_pickle_only(str(path)))
            if Path(path).exists():
                raise ValueError(
                    f"Can't find weights in {found.parent}: there is no {SAFETENSORS_WEIGHTS_NAME}. Pass the folder "
                    "that `save_pretrained` wrote."
                )
            found = _download(str(path), subfolder, kwargs)
        if not found.exists() or not stat.S_ISREG(found.stat().st_mode):
            raise ValueError(f"Can't read weights from {found}: it is not a regular file.")
        return cls(str(path), found, {"subfolder": subfolder, **kwargs})

    @property
    def config(self) -> Any:
        """The adapter's configuration, an instance of the class registered for its `peft_type`.

        Raises:
            ValueError: There is no configuration, or it cannot be read.
        """
        kwargs = dict(self.download_kwargs)
        try:
            return PeftConfig.from_pretrained(self.path, **kwargs)
        except Exception as error:  # PEFT does not validate the file, so this can be any exception
            raise ValueError(f"Can't read {CONFIG_NAME} in {self.path}: {type(error).__name__}: {error}") from error

    def header(self) -> dict[str, torch.Tensor]:
        """All tensors by name on the meta device, with the shapes and dtypes in the file's header.

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
            raise ValueError(f"Can't read {self.weights}, which may be truncated: {error}") from error


def check_steering_tensors(layer_cls: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Checks steering tensors against their configuration, as far as possible without a model.

    Args:
        layer_cls (`type[SteeringLayer]`): The layer class of the tuner.
        config ([`SteeringConfig`]): The steering part of the adapter's configuration.
        tensors (`Mapping[str, torch.Tensor]`): The steering tensors by their keys in the file.

    Raises:
        ValueError: There are no tensors, or tensors are missing, unexpected, of the wrong shape, not floating point or
            not finite. The message lists them.
    """
    container = f".{layer_cls.layer_name}.{layer_cls.adapter_layer_names[0]}."
    adapter_class, site = layer_cls.adapter_class(config), Site(config.site, "", False, _UNKNOWN_SIZE)
    names = adapter_class.shapes(config, _UNKNOWN_SIZE)
    blocks: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        block, separator, tensor_name = key.partition(container)
        if not separator or not block.startswith(PREFIX) or tensor_name not in names:
            problems.append(f"{key} is unexpected")
        else:
            blocks.setdefault(block, {})[tensor_name] = tensor
    if not blocks:
        problems.append(f"no tensor has {container!r} in its name")
    sizes: set[int] = set()
    for block, named in blocks.items():
        expected = adapter_class.shapes(config.for_block(block.removeprefix(PREFIX), site), _UNKNOWN_SIZE)
        problems += [f"{block}{container}{name} is missing" for name in expected if name not in named]
        for tensor_name, tensor in named.items():
            key, shape, wanted = f"{block}{container}{tensor_name}", tuple(tensor.shape), expected[tensor_name]
            fits = len(shape) == len(wanted) and all(
                size in (_UNKNOWN_SIZE, found) for size, found in zip(wanted, shape, strict=True)
            )
            sizes |= {found for size, found in zip(wanted, shape, strict=False) if size == _UNKNOWN_SIZE}
            if not fits:
                problems.append(f"{key} has shape {shape}, expected {_shape_text(wanted)}")
            elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                problems.append(f"{key} contains values that are not finite numbers")
    if len(sizes) > 1:
        problems.append(f"the tensors have different hidden sizes: {sorted(sizes)}")
    if problems:
        raise ValueError(f"The steering tensors do not match the configuration: {listed(problems, '; ')}.")


def listed(problems: list[str], separator: str = "\n- ") -> str:
    """The first eight problems, and how many more there are."""
    more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
    return separator.join([*problems[:8], *more])


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"({', '.join('d' if size == _UNKNOWN_SIZE else str(size) for size in shape)})"


def _download(path: str, subfolder: str | None, kwargs: dict) -> Path:
    name = f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME
    try:
        return Path(hf_hub_download(path, name, **kwargs))
    except Exception as error:
        try:
            repository = {key: kwargs[key] for key in ("revision", "repo_type", "token") if key in kwargs}
            pickled = file_exists(path, name.replace(SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), **repository)
        except Exception:  # for example offline, where the first error is the useful one
            pickled = False
        if pickled:
            raise ValueError(_pickle_only(path)) from error
        raise ValueError(f"Can't find weights for {path}, neither in a folder nor on the Hub: {error}") from error


def _pickle_only(path: str) -> str:
    return (
        f"{path} has its weights in {WEIGHTS_NAME} only, a pickle file, which can run arbitrary code when it is "
        f"loaded. If you trust it, convert it: safetensors.torch.save_file(torch.load('{WEIGHTS_NAME}', "
        f"weights_only=True), '{SAFETENSORS_WEIGHTS_NAME}')."
    )
