"""The Triton kernels as compiled for GPUs, which needs none."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_steer.tuners.steering.ops import kernels
from trl_steer.tuners.steering.ops.triton_update import _ACTIVATIONS, _tile

capability, dtype, rank, activation = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
pointers = {
    **dict.fromkeys(("h", "output", "grad", "grad_h"), dtype),
    **dict.fromkeys(("down", "up", "z", "z_output", "grad_z", "partial_down", "partial_up"), "fp32"),
    "seed": "i32",
}
numbers = {"scaling": "fp32", "dropout": "fp32"}
flags = {"ACTIVATION": activation, "DROPOUT": True, "NEEDS_H": True, "NEEDS_DOWN": True, "NEEDS_UP": True}
for name in ("forward", "forward_token", "backward_rows", "backward_columns"):
    kernel, tile = getattr(kernels, name), _tile(rank)
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
    tile |= {"T": 1, "D": 8192 // tile["R"]} if name == "forward_token" else {}
    constants = {**flags, **tile, "PRECISION": "tf32x3"}
    signature = {
        argument: "constexpr" if argument in constants
        else f"*{pointers[argument]}" if argument in pointers
        else numbers.get(argument, "i32")
        for argument in kernel.arg_names
    }
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    print(name, compiled.metadata.shared)
"""


@pytest.mark.parametrize(
    ("capability", "dtype", "rank", "activation"),
    [
        (90, "bf16", 8, "gelu_tanh"),
        pytest.param(80, "fp16", 32, "gelu", marks=pytest.mark.slow),
        pytest.param(86, "fp32", 64, "silu", marks=pytest.mark.slow),
        pytest.param(120, "bf16", 64, "relu", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_fit_into_the_shared_memory_of_every_generation(
    capability, dtype, rank, activation, monkeypatch, tmp_path
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = [sys.executable, "-c", COMPILE, str(capability), dtype, str(rank), activation]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert len(shared) == 4
    assert all(int(size) <= 99 * 1024 for size in shared.values()), shared
