"""llama.cpp in this process: its C functions, called through cffi.

The library is that of the package `xllamacpp`, unmodified, and the declarations those of `llama_cpp_py_sync`, whose
own library needs a newer glibc than many systems have. Both must be of nearly the same build of llama.cpp:

    pip install xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

# Builds between which the structures of the interface did not change.
_BUILDS_APART = 5


class EngineMissingError(ImportError):
    """The packages are not installed, or they do not fit together."""


@cache
def _library() -> tuple[Any, Any]:
    """cffi's interface, and the library.

    Raises:
        EngineMissingError: A package is missing, or the declarations are of another build.
    """
    try:
        import xllamacpp
        from llama_cpp_py_sync import _cffi_bindings

        builds = [
            int(importlib.metadata.version(name).split(".")[part])
            for name, part in (("xllamacpp", 2), ("llama-cpp-py-sync", 1))
        ]
    except ImportError as error:
        raise EngineMissingError(f"llama.cpp is not installed: {error}") from error
    if abs(builds[0] - builds[1]) > _BUILDS_APART:
        raise EngineMissingError(f"xllamacpp has build {builds[0]} of llama.cpp, llama_cpp_py_sync {builds[1]}.")
    ffi: Any = _cffi_bindings.ffi
    library = ffi.dlopen(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))

    @ffi.callback("ggml_log_callback")
    def log(level: int, message: Any, data: Any) -> None:
        if level == library.GGML_LOG_LEVEL_ERROR:
            sys.stderr.write(ffi.string(message).decode(errors="replace"))

    library.llama_log_set(log, ffi.NULL)
    library.llama_backend_init()
    _callbacks.append(log)
    return ffi, library


# llama.cpp keeps a pointer to them.
_callbacks: list[Any] = []


def check_engine() -> None:
    """Checks that llama.cpp can be called.

    Raises:
        EngineMissingError: It cannot.
    """
    _library()


class Engine:
    """
    A model in llama.cpp, on the CPU, with cache and activations in float32 where the model is.

    Args:
        file (`Path`): A GGUF file.
        tokens (`int`, defaults to `512`): The longest sequence.
        threads (`int`, defaults to `1`): Number of threads.

    Raises:
        EngineMissingError: llama.cpp is not installed.
        ValueError: llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, tokens: int = 512, threads: int = 1):
        self._ffi, self._library = _library()
        ffi, library = self._ffi, self._library
        self._model = library.llama_model_load_from_file(str(file).encode(), self._model_params())
        if self._model == ffi.NULL:
            raise ValueError(f"llama.cpp cannot load {file}.")
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = library.llama_init_from_model(self._model, params)
        if self._context == ffi.NULL:
            library.llama_model_free(self._model)
            raise ValueError(f"llama.cpp cannot run {file}.")
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(tokens, 0, 1)
        self._past = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after each token of a new sequence, (tokens, vocabulary), float32."""
        self._start()
        return self._feed(ids, [True] * len(ids))

    def greedy(self, ids: Sequence[int], new: int) -> list[int]:
        """The `new` tokens that follow a sequence, each the one with the largest logit."""
        self._start()
        generated = [int(self._feed(ids, [False] * (len(ids) - 1) + [True])[0].argmax())]
        while len(generated) < new:
            generated.append(int(self._feed(generated[-1:], [True])[0].argmax()))
        return generated

    def set_control_vector(self, directions: np.ndarray) -> None:
        """Adds directions to the outputs of blocks, as `--control-vector` does.

        Args:
            directions (`np.ndarray`): (blocks - 1, d), for blocks 1, 2, ...
        """
        data = np.ascontiguousarray(directions, dtype=np.float32)
        status = self._library.llama_set_adapter_cvec(
            self._context, self._ffi.from_buffer("float[]", data), data.size, data.shape[1], 1, len(data)
        )
        if status:
            raise ValueError(f"llama.cpp does not accept directions of shape {directions.shape}.")

    def _model_params(self) -> Any:
        params = self._library.llama_model_default_params()
        params.n_gpu_layers = 0
        return params

    def _start(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._past = 0

    def _feed(self, ids: Sequence[int], wanted: Sequence[bool]) -> np.ndarray:
        """Runs tokens, and returns the logits of those that are wanted."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, self._past + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = wanted[index]
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}.")
        self._past += len(ids)
        rows = [
            self._library.llama_get_logits_ith(self._context, index)
            for index, is_wanted in enumerate(wanted)
            if is_wanted
        ]
        size = self._vocabulary * 4
        return np.stack([np.frombuffer(self._ffi.buffer(row, size), np.float32).copy() for row in rows])
