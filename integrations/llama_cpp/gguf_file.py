"""Reads a GGUF model, and writes a changed copy, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

SPLIT = "split.count"
# Written by the writer itself: the architecture, and the alignment, which may be another one in the copy.
_OF_THE_WRITER = ("general.architecture", "general.alignment")


class Value(NamedTuple):
    """A value of the metadata, with its type, and for arrays that of the entries."""

    value: Any
    type: GGUFValueType
    entries: GGUFValueType | None = None


@dataclass(frozen=True)
class Tensor:
    """
    A tensor to write.

    Args:
        data (`np.ndarray`): As in the file: (rows, columns), of a quantized tensor (rows, bytes); or (size,).
        type (`GGMLQuantizationType`): The type.
        rows (`int`, defaults to `0`): Number of rows of zeros to append.
        columns (`int`, defaults to `0`): Number of zeros to append to each row, a multiple of the size of a block.
    """

    data: np.ndarray
    type: GGMLQuantizationType = GGMLQuantizationType.F32
    rows: int = 0
    columns: int = 0

    @property
    def padding(self) -> list[tuple[int, int]]:
        """Number of entries of `data` to append in each dimension."""
        if self.data.ndim == 1:
            return [(0, 0)]
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        columns = self.columns if self.data.dtype != np.uint8 else self.columns // values * size
        return [(0, self.rows), (0, columns)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size + after for size, (_, after) in zip(self.data.shape, self.padding, strict=True))

    def padded(self) -> np.ndarray:
        return np.ascontiguousarray(np.pad(self.data, self.padding))

    def values(self) -> np.ndarray:
        """The numbers, without padding, in float32."""
        return dequantize(np.asarray(self.data), self.type).astype(np.float32)


class BaseFile:
    """
    The GGUF file of a model.

    Args:
        path (`Path`): The file. It is mapped into memory, and not read as a whole.

    Attributes:
        path (`Path`): The file.
        tensors (`dict[str, Tensor]`): Its tensors by name, in the order of the file.

    Raises:
        ValueError: It is not a GGUF file with a model, or one part of several.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is not a GGUF file that can be read: {error}") from error
        if (self.get(SPLIT) or 0) > 1:
            raise ValueError(f"{path} is one of several parts. Merge them first: llama-gguf-split --merge.")
        if self.get("general.architecture") is None or not self._reader.tensors:
            raise ValueError(f"{path} has no model: no general.architecture, or no tensors.")
        self.tensors = {tensor.name: Tensor(tensor.data, tensor.tensor_type) for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        return self.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata by its full name."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def metadata(self) -> dict[str, Value]:
        """All metadata, without what the writer adds by itself."""
        return {
            field.name: Value(
                field.contents(), field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            )
            for field in self._reader.fields.values()
            if field.name not in _OF_THE_WRITER and not field.name.startswith("GGUF.")
        }


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a GGUF file, and holds one tensor at a time in memory.

    Args:
        path (`Path`): The file.
        architecture (`str`): `general.architecture`.
        metadata (`Mapping[str, Value]`): All other metadata.
        tensors (`Mapping[str, Tensor]`): The tensors by name.
        progress (`Callable`, *optional*): Called with the number of tensors that are written, and that of all.
    """
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            if value.type != GGUFValueType.ARRAY or len(value.value):  # which the writer cannot write
                writer.add_key_value(key, value.value, value.type, sub_type=value.entries)
        for name, tensor in tensors.items():
            size = int(np.prod(tensor.shape)) * tensor.data.dtype.itemsize
            writer.add_tensor_info(name, tensor.shape, tensor.data.dtype, size, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors.values(), 1):
            writer.write_tensor_data(tensor.padded())
            if progress is not None:
                progress(done, len(tensors))
    finally:
        writer.close()


def text(value: str) -> Value:
    return Value(value, GGUFValueType.STRING)


def number(value: float) -> Value:
    return Value(float(value), GGUFValueType.FLOAT32)


def count(value: int) -> Value:
    return Value(int(value), GGUFValueType.UINT32)


def counts(values: Sequence[int]) -> Value:
    return Value([int(value) for value in values], GGUFValueType.ARRAY, GGUFValueType.UINT32)
