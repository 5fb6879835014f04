"""The constant `C` of inserted blocks, from the norms of the residual stream on text."""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trl_steer.tuners.steering import SteeringLayer

# `C` is a power of two, exact in every format, of at least this many times the largest norm that was measured.
# Inserted blocks then read `h` with a relative error of (1 / MARGIN)^2 / 2 = 2e-9, below that of float32.
MARGIN = 2**14
# On other text, norms may be larger. Down to this margin, the error is 5e-7, about that of float32.
LEAST_MARGIN = 1000
# Norms square `C`, which float32 can hold up to 3e38.
LARGEST_CONSTANT = 2.0**60
# Tokens of a row. Outliers are at the start of a text, and at separators.
ROW = 512


class Text(NamedTuple):
    """The text of a calibration: its paragraphs, the name of the file, and its SHA-256."""

    paragraphs: list[str]
    name: str
    digest: str


class Measured(NamedTuple):
    """The largest norm of a block's output, before the update of the adapter, and the number of tokens."""

    norm: float
    tokens: int

    @property
    def constant(self) -> float:
        """`C`.

        Raises:
            ValueError: The norm is not finite, or too large for `C` to be expressed.
        """
        constant = 2.0 ** math.ceil(math.log2(MARGIN * self.norm)) if 0 < self.norm < math.inf else math.inf
        if not constant <= LARGEST_CONSTANT:
            raise ValueError(
                f"The largest norm of a hidden state is {self.norm:.3g}, which the constant of the inserted blocks "
                "cannot exceed by enough. The adapter seems to be broken: trl-steer analyze inspect FOLDER."
            )
        return constant


def read_text(path: Path | None) -> Text:
    """The text of a file, by default that of this package, in paragraphs that are separated by empty lines.

    Raises:
        ValueError: There is no text in it, or it is not in UTF-8.
    """
    file: Any = path or resources.files(__package__) / "calibration.txt"
    content = file.read_bytes()
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    paragraphs = [part.strip("\n") for part in decoded.split("\n\n") if part.strip()]
    if not paragraphs:
        raise ValueError(f"{path} has no text.")
    return Text(paragraphs, "default" if path is None else path.name, sha256(content).hexdigest())


@torch.no_grad()
def measure(model: Any, tokenizer: Any, text: Text, progress: Callable[[int, int], None] | None = None) -> Measured:
    """Runs a steered model on text.

    Each paragraph is a row, and so is all of the text, cut into pieces. If the tokenizer does not add the token that
    begins a text, which has the largest norms in many models, each paragraph is run once more with it.

    Args:
        model (`PeftModel`): The model with the adapter.
        tokenizer (`PreTrainedTokenizer`): Its tokenizer.
        text ([`Text`]): The text.
        progress (`Callable`, *optional*): Called with the number of rows that were run, and that of all.
    """
    norms = [0.0]

    def record(module: torch.nn.Module, inputs: tuple) -> None:
        norms.append(torch.linalg.vector_norm(inputs[0].float(), dim=-1).max().item())

    rows = _rows(tokenizer, text)
    adapters = [a for m in model.modules() if isinstance(m, SteeringLayer) for a in m.adapters.values()]
    hooks = [adapter.register_forward_pre_hook(record) for adapter in adapters]
    try:
        for done, row in enumerate(rows, 1):
            model(input_ids=torch.tensor([row]), use_cache=False, logits_to_keep=1)
            if progress is not None:
                progress(done, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    return Measured(math.nan if any(map(math.isnan, norms)) else max(norms), sum(map(len, rows)))


def check(measured: Measured, constant: float) -> float:
    """The margin of a constant over the largest norm.

    Raises:
        ValueError: It is too small.
    """
    margin = constant / measured.norm if measured.norm > 0 else math.nan
    if not margin >= LEAST_MARGIN:
        raise ValueError(
            f"The largest norm of a hidden state on this text is {measured.norm:.4g}, and the constant of the file, "
            f"{constant:.4g}, is only {margin:.3g} times as large. It should be {LEAST_MARGIN} times as large. Export "
            "the adapter again with this text as --calibration."
        )
    return margin


def _rows(tokenizer: Any, text: Text) -> list[list[int]]:
    rows = [tokenizer(paragraph)["input_ids"][:ROW] for paragraph in text.paragraphs]
    begin = tokenizer.bos_token_id
    rows += [[begin, *row] for row in rows if begin is not None and row[:1] != [begin]]
    whole = tokenizer("\n\n".join(text.paragraphs))["input_ids"]
    rows += [whole[start : start + ROW] for start in range(0, len(whole), ROW)]
    return [row for row in rows if row]
