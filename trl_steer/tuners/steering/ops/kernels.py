"""Triton kernels of the low-rank update `h' = h + scaling * a @ up.T`, `a = dropout(act(z))`, `z = h @ down.T`.

The forward pass reads `h` and writes `h'` in one kernel. The backward pass has two: `backward_rows` writes `dh` and
`dz`, and `backward_columns` sums the gradients of the factors over the tokens, without atomic additions, so that the
results are deterministic.

Matrices are (tokens, features) in any floating point format of 16 or 32 bits. They are converted in registers to the
dtype of `z`, in which the other implementations of the update compute as well, and products are summed in float32.
Constants of the kernels: `T` tokens, `D` features and `R` >= r bottleneck units per tile, and `PRECISION`, how tensor
cores multiply float32.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """`x` in `DTYPE`. In Triton's interpreter, which truncates bfloat16 and multiplies it as integers, in float32."""
    if _INTERPRETED:
        x = x.to(tl.float32)
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.uint32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
        else:
            x = x.to(DTYPE).to(tl.float32)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The activation and its derivative, in float32. PyTorch's results for NaN and infinity are kept."""
    if ACTIVATION == "relu":
        value = tl.where(z <= 0, 0.0, z)
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(z)
        value = z * gate
        slope = gate * (1 + z * (1 - gate))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        value = z * cdf
        slope = cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(x)) is sigmoid(2 * x), which stays exact where tanh is close to -1.
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        value = z * gate
        slope = gate + z * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        value = z
        slope = tl.full(z.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def _bottleneck(z, rows, rank, seed, dropout, r, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr):
    """`a` and `da / dz`, in float32, zero in the padding from `r` to `R`."""
    value, slope = _activate(z.to(tl.float32), ACTIVATION)
    if DROPOUT:
        keep = tl.rand(tl.load(seed), rows[:, None] * r + rank[None, :]) >= dropout
        value = tl.where(keep, value / (1 - dropout), 0.0)
        slope = tl.where(keep, slope / (1 - dropout), 0.0)
    inside = rank[None, :] < r
    return tl.where(inside, value, 0.0), tl.where(inside, slope, 0.0)


@triton.jit
def _load_matrix(matrix, rows, columns, n_rows, n_columns, stride_row, stride_column):
    """A tile of a matrix, zero outside of it."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(matrix + offsets, mask=inside, other=0.0)


@triton.jit
def _store_matrix(matrix, tile, rows, columns, n_rows, n_columns):
    """Writes a tile of a contiguous matrix."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
    tl.store(matrix + offsets, _round(tile, matrix.dtype.element_ty).to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    h, down, up, seed, output, z_output, n, d, r, stride_row, stride_column, scaling, dropout,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`h'` and `z` of `T` tokens. The tokens are read twice, the second time from the cache."""
    COMPUTE = z_output.dtype.element_ty
    rows, rank = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, R)
    z = tl.zeros((T, R), tl.float32)
    for first in range(0, d, D):
        columns = first + tl.arange(0, D)
        tokens = _round(_load_matrix(h, rows, columns, n, d, stride_row, stride_column), COMPUTE)
        factor = _round(_load_matrix(down, columns, rank, d, r, 1, d), COMPUTE)
        z = tl.dot(tokens, factor, z, input_precision=PRECISION)
    z = _round(z, COMPUTE)
    _store_matrix(z_output, z, rows, rank, n, r)
    a, _ = _bottleneck(z, rows, rank, seed, dropout, r, ACTIVATION, DROPOUT)
    a = _round(a, COMPUTE)
    for first in range(0, d, D):
        columns = first + tl.arange(0, D)
        tokens = _load_matrix(h, rows, columns, n, d, stride_row, stride_column).to(tl.float32)
        factor = _round(_load_matrix(up, rank, columns, r, d, 1, r), COMPUTE)
        update = tl.dot(a, factor, input_precision=PRECISION)
        _store_matrix(output, tokens + scaling * update, rows, columns, n, d)


@triton.jit
def forward_token(
    h, down, up, seed, output, z_output, n, d, r, stride_row, stride_column, scaling, dropout,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The same for one token per program, without tensor cores: while decoding, latency is all that counts."""
    tl.static_assert(T == 1)
    COMPUTE = z_output.dtype.element_ty
    rows, rank = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, R)
    z = tl.zeros((1, R), tl.float32)
    for first in range(0, d, D):
        columns = first + tl.arange(0, D)
        token = _round(_load_matrix(h, rows, columns, n, d, stride_row, stride_column), COMPUTE).to(tl.float32)
        factor = _round(_load_matrix(down, rank, columns, r, d, d, 1), COMPUTE).to(tl.float32)
        z += tl.sum(factor * token, axis=1)[None, :]
    z = _round(z, COMPUTE)
    _store_matrix(z_output, z, rows, rank, n, r)
    a, _ = _bottleneck(z, rows, rank, seed, dropout, r, ACTIVATION, DROPOUT)
    a = _round(a, COMPUTE).to(tl.float32)
    for first in range(0, d, D):
        columns = first + tl.arange(0, D)
        token = _load_matrix(h, rows, columns, n, d, stride_row, stride_column).to(tl.float32)
        factor = _round(_load_matrix(up, columns, rank, d, r, r, 1), COMPUTE).to(tl.float32)
        update = tl.sum(factor * a, axis=1)[None, :]
        _store_matrix(output, token + scaling * update, rows, columns, n, d)


@triton.jit
def backward_rows(
    grad, down, up, z, seed, grad_h, grad_z, n, d, r, stride_row, stride_column, scaling, dropout,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_H: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`dz` in float32 and, with `NEEDS_H`, `dh = g + dz @ down` of `T` tokens."""
    COMPUTE = z.dtype.element_ty
    rows, rank = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, R)
    grad_a = tl.zeros((T, R), tl.float32)
    for first in range(0, d, D):
        columns = first + tl.arange(0, D)
        gradient = _round(_load_matrix(grad, rows, columns, n, d, stride_row, stride_column), COMPUTE)
        factor = _round(_load_matrix(up, columns, rank, d, r, r, 1), COMPUTE)
        grad_a = tl.dot(gradient, factor, grad_a, input_precision=PRECISION)
    bottleneck = _load_matrix(z, rows, rank, n, r, r, 1)
    _, slope = _bottleneck(bottleneck, rows, rank, seed, dropout, r, ACTIVATION, DROPOUT)
    product = scaling * grad_a * slope
    # Infinite gradients times zero: of the padding, and of ReLU, where PyTorch's gradient is zero.
    product = tl.where(rank[None, :] < r, product, 0.0)
    if ACTIVATION == "relu":
        product = tl.where(bottleneck <= 0, 0.0, product)
    _store_matrix(grad_z, product, rows, rank, n, r)
    if NEEDS_H:
        for first in range(0, d, D):
            columns = first + tl.arange(0, D)
            gradient = _load_matrix(grad, rows, columns, n, d, stride_row, stride_column).to(tl.float32)
            factor = _round(_load_matrix(down, rank, columns, r, d, d, 1), COMPUTE)
            update = tl.dot(_round(product, COMPUTE), factor, input_precision=PRECISION)
            _store_matrix(grad_h, gradient + update, rows, columns, n, d)


@triton.jit
def backward_columns(
    grad, output, up, z, grad_z, seed, partial_down, partial_up, n, d, r, rows_per_part,
    stride_row, stride_column, scaling, dropout,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, NEEDS_DOWN: tl.constexpr, NEEDS_UP: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The sums `dz.T @ h` and `scaling * g.T @ a` over one part of the tokens, for `D` features.

    `h` is recovered from the output. Where the update does not lift a value into the next binade, rounding the
    difference to the dtype of `h` gives what `h` was, ties aside.
    """
    COMPUTE = z.dtype.element_ty
    columns, rank = tl.program_id(0) * D + tl.arange(0, D), tl.arange(0, R)
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * rows_per_part, n)
    factor = _round(_load_matrix(up, rank, columns, r, d, 1, r), COMPUTE)
    sum_down, sum_up = tl.zeros((R, D), tl.float32), tl.zeros((D, R), tl.float32)
    for first in range(part * rows_per_part, last, T):
        rows = first + tl.arange(0, T)
        bottleneck = _load_matrix(z, rows, rank, last, r, r, 1)
        a, _ = _bottleneck(bottleneck, rows, rank, seed, dropout, r, ACTIVATION, DROPOUT)
        a = _round(a, COMPUTE)
        if NEEDS_UP:
            gradient = _round(_load_matrix(grad, columns, rows, d, last, stride_column, stride_row), COMPUTE)
            sum_up = tl.dot(gradient, a, sum_up, input_precision=PRECISION)
        if NEEDS_DOWN:
            steered = _load_matrix(output, rows, columns, last, d, d, 1)
            update = scaling * tl.dot(a, factor, input_precision=PRECISION)
            tokens = _round(steered.to(tl.float32) - update, steered.dtype).to(tl.float32)
            product = _load_matrix(grad_z, rank, rows, r, last, 1, r)
            sum_down = tl.dot(product, tokens, sum_down, input_precision=PRECISION)
    if NEEDS_UP:
        _store_matrix(partial_up + part.to(tl.int64) * d * r, scaling * sum_up, columns, rank, d, r)
    if NEEDS_DOWN:
        _store_matrix(partial_down + part.to(tl.int64) * d * r, sum_down, rank, columns, r, d)
