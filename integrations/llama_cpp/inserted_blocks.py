r"""A low-rank adapter in a GGUF file, in blocks of its own.

llama.cpp has no operation `h + s * act(h @ W_down.T) @ W_up.T`, and no block whose MLP reads the residual stream
without a norm. But a norm does nothing where its scale is a known constant:

- The stream gets more coordinates, which stay zero: matrices get columns or rows of zeros. A norm over `D` instead of
  `d` coordinates is the same with its weight times `sqrt(d / D)` and its epsilon times `d / D`.
- After a steered block, a bias writes a constant `C` to the first new coordinate. Then an inserted block follows,
  which has no attention.
- Its norm divides by `sqrt((||h||^2 + C^2) / D)`, which is `C / sqrt(D)` up to the factor `1 + (||h||/C)^2 / 2`.
  With the weight `C / sqrt(D)` on `h` and `1 / sqrt(D)` on the constant, its MLP reads `(h, 1)`.
- Its MLP has `r` neurons, `down(silu(gate(x)) * up(x))`. Without an activation, `gate` is the constant 1, `up` is
  `W_down`, and `down` is `s W_up / silu(1)`. For SiLU, `gate` is `W_down`, `up` is 1, and `down` is `s W_up`.
- A bias of `-C` clears the coordinate.

This is architecture "deci" in llama.cpp, whose blocks may lack the attention. The tensors of the base model stay
quantized as they are, since the appended zeros are blocks of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ..export.adapter import PostBlockAdapter
from .families import ADDS, FLEXIBLE, NORM, READS, WRITES, Family, role_of
from .gguf_file import BaseFile, Tensor, Value, count, counts, number

# The new coordinates, rounded up to whole blocks of the quantized types. Fewer would be slower to compute with.
LEAST_PADDING = 32
# llama.cpp's limit, LLAMA_MAX_LAYERS.
MOST_BLOCKS = 512
_SILU_OF_ONE = 1 / (1 + math.exp(-1))


@dataclass(frozen=True)
class Layout:
    """
    Where blocks and coordinates of the base model are in the new file.

    Attributes:
        width (`int`): `d`.
        padding (`int`): Number of new coordinates, `D - d`.
        position (`dict[int, int]`): Index of each block of the base model.
        ranks (`dict[int, int]`): Rank of the block that is inserted after a block of the base model.
    """

    width: int
    padding: int
    position: dict[int, int]
    ranks: dict[int, int]

    @property
    def padded(self) -> int:
        return self.width + self.padding


def plan_layout(base: BaseFile, ranks: dict[int, int]) -> Layout:
    """The layout for inserted blocks of some ranks.

    Args:
        base ([`BaseFile`]): The base model.
        ranks (`dict[int, int]`): Rank by index of the block. May be empty, which pads nothing.

    Raises:
        ValueError: There would be too many blocks, or a type cannot express zeros.
    """
    blocks = base.get(f"{base.architecture}.block_count")
    if blocks + len(ranks) > MOST_BLOCKS:
        raise ValueError(
            f"{blocks} blocks and {len(ranks)} for the adapter are more than llama.cpp allows, {MOST_BLOCKS}."
        )
    position, inserted = {}, 0
    for index in range(blocks):
        position[index] = index + inserted
        inserted += index in ranks
    types = {tensor.type for name, tensor in base.tensors.items() if role_of(name) in (READS, WRITES)}
    for kind in types:
        _check_zeros(kind)
    sizes = [gguf.GGML_QUANT_SIZES[kind][0] for kind in types]
    padding = math.lcm(LEAST_PADDING, *sizes) if ranks else 0
    return Layout(base.get(f"{base.architecture}.embedding_length"), padding, position, ranks)


def metadata(base: BaseFile, layout: Layout) -> dict[str, Value]:
    """The metadata of the base model for architecture `deci`.

    Raises:
        ValueError: The attention has a form that this architecture does not have.
    """
    prefix = f"{base.architecture}."
    values = {
        f"{FLEXIBLE}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: value
        for key, value in base.metadata().items()
    }
    heads, kv_heads, mlp = (
        _per_block(base, name) for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    size = _head_size(base, heads[0])
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        values[f"{FLEXIBLE}.{name}"] = count(size)
    total = len(layout.position) + len(layout.ranks)
    of_blocks = np.zeros((3, total), dtype=int)
    for index, position in layout.position.items():
        of_blocks[:, position] = heads[index], kv_heads[index], mlp[index]
        if index in layout.ranks:
            of_blocks[2, position + 1] = layout.ranks[index]
    for name, entries in zip(
        ("attention.head_count", "attention.head_count_kv", "feed_forward_length"), of_blocks, strict=True
    ):
        values[f"{FLEXIBLE}.{name}"] = counts(entries.tolist())
    epsilon = f"{FLEXIBLE}.attention.layer_norm_rms_epsilon"
    values[epsilon] = number(values[epsilon].value * layout.width / layout.padded)
    values[f"{FLEXIBLE}.embedding_length"] = count(layout.padded)
    values[f"{FLEXIBLE}.block_count"] = count(total)
    return values


def base_tensors(base: BaseFile, family: Family, layout: Layout) -> dict[str, Tensor]:
    """The tensors of the base model under their new names, padded."""
    tensors = {}
    for name, tensor in base.tensors.items():
        role, parts = role_of(name), name.split(".")
        if parts[0] == "blk":
            parts[1] = str(layout.position[int(parts[1])])
        if family.pairs_halves and parts[0] == "blk" and parts[2] in ("attn_q", "attn_k"):
            tensor = replace(
                tensor, data=_neighbours(tensor.data, _head_size(base, _per_block(base, "attention.head_count")[0]))
            )
        if role == NORM and layout.padding:
            scaled = tensor.values() * math.sqrt(layout.width / layout.padded)
            tensor = Tensor(np.pad(scaled.astype(np.float32), (0, layout.padding)))
        elif role == READS:
            tensor = replace(tensor, columns=layout.padding)
        elif role == WRITES:
            tensor = replace(tensor, rows=layout.padding)
        elif role == ADDS:
            tensor = Tensor(np.pad(tensor.values(), (0, layout.padding)))
        tensors[".".join(parts)] = tensor
    return tensors


def inserted_tensors(base: BaseFile, adapter: PostBlockAdapter, layout: Layout, constant: float) -> dict[str, Tensor]:
    """The tensors of the inserted blocks, and the biases that write the constant.

    Args:
        base ([`BaseFile`]): The base model.
        adapter ([`PostBlockAdapter`]): A low-rank adapter without activation or with SiLU.
        layout ([`Layout`]): The layout.
        constant (`float`): `C`.
    """
    width, root = layout.width, math.sqrt(layout.padded)
    tensors: dict[str, Tensor] = {}
    for index, rank in layout.ranks.items():
        down, up = (adapter.tensors[index][name].numpy() for name in ("down", "up"))
        position = layout.position[index]
        existing = base.tensors.get(f"blk.{index}.ffn_down.bias")
        writes, clears = np.zeros((2, layout.padded), dtype=np.float32)
        if existing is not None:
            writes[:width] = existing.values()
        writes[width], clears[width] = constant, -constant
        norm = np.zeros(layout.padded, dtype=np.float32)
        norm[:width], norm[width] = constant / root, 1 / root
        one = np.zeros((rank, layout.padded), dtype=np.float32)
        one[:, width] = 1
        reads, scaling = _padded(down, (0, layout.padding)), adapter.config.scaling
        if adapter.config.activation is None:
            gate, read, scaling = one, reads, scaling / _SILU_OF_ONE
        else:
            gate, read = reads, one
        block = f"blk.{position + 1}."
        tensors |= {
            f"blk.{position}.ffn_down.bias": Tensor(writes),
            f"{block}ffn_norm.weight": Tensor(norm),
            f"{block}ffn_gate.weight": Tensor(gate),
            f"{block}ffn_up.weight": Tensor(read),
            f"{block}ffn_down.weight": Tensor(_padded(scaling * up.astype(np.float64), (layout.padding, 0))),
            f"{block}ffn_down.bias": Tensor(clears),
        }
    return tensors


def _padded(matrix: np.ndarray, after: tuple[int, int]) -> np.ndarray:
    return np.pad(matrix, [(0, size) for size in after]).astype(np.float32)


def _neighbours(data: np.ndarray, size: int) -> np.ndarray:
    """Rows of queries or keys in another order, so that the pairs that are rotated are neighbours."""
    heads = data.reshape(-1, 2, size // 2, *data.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(data.shape)


def _per_block(base: BaseFile, name: str) -> list[int]:
    """A hyperparameter of each block, which may be one number for all."""
    value: Any = base.get(f"{base.architecture}.{name}")
    if value is None and name == "attention.head_count_kv":
        return _per_block(base, "attention.head_count")
    blocks = base.get(f"{base.architecture}.block_count")
    return list(value) if isinstance(value, list) else [value] * blocks


def _head_size(base: BaseFile, heads: int) -> int:
    """The size of a head.

    Raises:
        ValueError: Keys, values and rotary embeddings do not have the same size.
    """
    width = base.get(f"{base.architecture}.embedding_length")
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {base.get(f"{base.architecture}.{name}", width // heads) for name in names}
    if len(sizes) != 1:
        raise ValueError(
            f"{base.path.name} has keys, values and rotary embeddings of different sizes, {sorted(sizes)}, which "
            f"architecture {FLEXIBLE!r} of llama.cpp does not have."
        )
    return sizes.pop()


def _check_zeros(kind: GGMLQuantizationType) -> None:
    """Checks that a block of zero bytes stands for zeros.

    Raises:
        ValueError: It does not, or this is not known.
    """
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        is_zero = not dequantize(np.zeros((1, size), dtype=np.uint8), kind).any()
    except NotImplementedError:
        is_zero = False
    if not is_zero:
        raise ValueError(
            f"The base model has tensors of type {kind.name}, which cannot be extended by zeros. Quantize it to "
            "another type, such as Q4_K_M or Q8_0."
        )
