"""What autograd keeps for a training step. Bytes do not vary from run to run, so a test can hold them to a bound."""

import pytest
import torch

from trl_steer.eval.benchmarks.models import eight_blocks
from trl_steer.eval.benchmarks.training import FLOOR, LORA, OURS, PLAIN, measure_bytes


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    # Norms keep copies in float32, so in bfloat16 nothing else keeps a block's output.
    ("dtype", "bound"),
    [(torch.float32, 1.02), (torch.bfloat16, 1.08)],
    ids=["float32", "bfloat16"],
)
def test_low_rank_keeps_hardly_more_than_a_vector(dtype, bound, checkpointing):
    # Few tokens: what is kept grows with their number on every side, but for a few scalars.
    kept = measure_bytes(eight_blocks(), dtype, checkpointing, batch=1, length=64)
    assert kept[FLOOR] <= kept[OURS] <= bound * kept[FLOOR]
    # The measure sees what it is there to avoid.
    assert kept[PLAIN] > bound * kept[FLOOR]
    assert checkpointing or kept[LORA] > 1.3 * kept[OURS]
