"""The oracle of section 4 of arXiv 2603.00425, and how much of it each kind of update explains.

The oracle of a block is the update that moves the block's output to that of a fine-tuned model:
`h(fine-tuned) - h(base)`, for each token. No adapter can learn it, but what simple functions of the hidden states
explain of it says where to put an adapter and how large it should be, before any training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from trl_steer.choices import OracleSite

from .distill import Progress
from .moments import Moments, inverse_square_norms
from .regression import RIDGES, constant_error, explained_share, held_out_errors
from .splits import Split
from .states import blocks_of, check_same_shape, record_pair

ORACLE_SITES = get_args(OracleSite)
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Of the sums for all blocks that are measured in the same pass.
MEMORY_BYTES = 3 * 2**30


def oracle(
    base: Any,
    tuned: Any,
    split: Split,
    sites: Sequence[str] = ORACLE_SITES,
    ranks: Sequence[int] = RANKS,
    blocks: Sequence[int] | None = None,
    relative: bool = False,
    ridges: Sequence[float] = RIDGES,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """
    Measures what linear functions of the base model's hidden states explain of the oracle.

    A function of the state at `post_block` or `post_mlp` is exactly what a linear adapter at this site adds to the
    block's output. At `post_attn` and `pre_mlp`, an adapter acts through the MLP as well, so that the share says what
    can be read at this site, rather than what an adapter there can do.

    Args:
        base (`nn.Module`, *optional*): The base model. `None` for that of the adapters of `tuned`, a `PeftModel`.
        tuned (`nn.Module`): The fine-tuned model.
        split ([`Split`]): Batches to fit on, to choose penalties by, and to measure on.
        sites (`Sequence[str]`): Where the states are read, of [`SITES`].
        ranks (`Sequence[int]`): Ranks of the linear functions. Larger ones than the width are left out.
        blocks (`Sequence[int]`, *optional*): Indices of the blocks. Default: all.
        relative (`bool`, defaults to `False`):
            Whether norms are relative to that of the base model's state, token by token. If not, tokens with large
            states count more, such as the first one in many models, as in plain least squares.
        ridges (`Sequence[float]`): The penalties, of which each rank uses the best one on the validation tokens.
        memory_bytes (`int`, defaults to 3 GiB):
            Memory for sums over tokens. If those of all blocks need more, the models run several times.
        progress (`Callable`, *optional*): Called with the number of finished batches and blocks, and that of all.

    Returns:
        `list[dict]`: A row for each block: `block`, its index; `oracle`, the norm of the oracle as a share of that of
        the base model's state (of root mean squares over tokens); `constant`, the share of the oracle's squared norm
        that a constant explains; `sites`, for each site the shares by rank (`ranks`) and that of a function of
        any rank (`full`). All are measured on the held-out tokens. A share is 1 if nothing is left, and below 0 if the
        function is worse than none.

    Raises:
        ValueError: The models have different shapes, a block or site does not exist, or there are too few tokens.
    """
    if base is not None:
        check_same_shape(base, tuned)
    groups = _groups(blocks_of(tuned, blocks), sites, memory_bytes)
    done, total = 0, len(groups) * sum(map(len, split)) + sum(map(len, groups))
    rows = []
    for group in groups:
        sums = [_Sums(relative) for _ in split]
        for part, batches in zip(sums, split, strict=True):
            for batch in batches:
                part.add(*record_pair(base, tuned, batch, sorted({"post_block", *sites}), group), group, sites)
                done += 1
                progress(done, total)
        for index in group:
            rows.append(_row(index, sums, sites, ranks, ridges))
            done += 1
            progress(done, total)
    return rows


class _Sums:
    """Sums over the tokens of one part of the split, by block."""

    def __init__(self, relative: bool) -> None:
        self.relative = relative
        self.moments: dict[tuple[int, str], Moments] = {}
        self.base: dict[int, torch.Tensor] = {}

    def add(self, before: Any, after: Any, blocks: Sequence[int], sites: Sequence[str]) -> None:
        for block in blocks:
            h = before[block, "post_block"]
            difference = after[block, "post_block"].to(h.device) - h
            weights = inverse_square_norms(h) if self.relative else torch.ones_like(h[:, 0])
            self.base[block] = self.base.get(block, 0) + weights @ h.square().sum(1)
            for site in sites:
                x = before[block, site]
                if (block, site) not in self.moments:
                    self.moments[block, site] = Moments(x.shape[1], h.shape[1], h.device)
                self.moments[block, site].add(x, difference, weights)


def _groups(blocks: Sequence[Any], sites: Sequence[str], memory_bytes: int) -> list[list[int]]:
    """Indices of blocks that are measured in the same pass, so that their sums fit into memory."""
    widths = [block.site(site).width for site in sites for block in blocks[:1]]
    hidden = blocks[0].anatomy.hidden_size
    per_block = 3 * 8 * sum(width * (width + hidden) for width in widths)
    size = max(1, memory_bytes // per_block)
    indices = [block.index for block in blocks]
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def _row(
    block: int, sums: Sequence[_Sums], sites: Sequence[str], ranks: Sequence[int], ridges: Sequence[float]
) -> dict[str, Any]:
    fitted, _, held_out = (part.moments[block, sites[0]] for part in sums)
    if not held_out.count:
        raise ValueError("There are no held-out tokens. Pass more text.")
    row: dict[str, Any] = {
        "block": block,
        "oracle": (held_out.yy / sums[2].base[block]).sqrt().item(),
        "constant": explained_share(constant_error(fitted.mean, held_out), held_out).item(),
        "sites": {},
    }
    for site in sites:
        fitted, validation, held_out = (part.moments[block, site] for part in sums)
        shares = explained_share(held_out_errors(fitted, validation, held_out, ridges), held_out)
        row["sites"][site] = {
            "ranks": {rank: shares[rank].item() for rank in ranks if rank < len(shares)},
            "full": shares[-1].item(),
        }
    return row
