"""What updates explain of the oracle is what direct regressions on all tokens explain."""

import contextlib

import numpy as np
import pytest
import torch
from analysis_cases import EVERY_FAMILY
from model_pairs import left_padded, split_of, steered_model, token_rows, tuned_model
from model_zoo import tiny_model

from trl_steer.analysis import Split, blocks_of, oracle, record
from trl_steer.analysis.oracle import ORACLE_SITES

RIDGE = 1e-3


def states(model, batches, site):
    recorded = [record(model, batch, [site]) for batch in batches]
    return [torch.cat([each[block, site] for each in recorded]).numpy() for block in range(3)]


def has_site(block, name) -> bool:
    with contextlib.suppress(ValueError):
        return block.site(name) is not None
    return False


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_shares_are_those_of_direct_regressions(family):
    check_shares(family, relative=False)


def test_norms_can_be_relative():
    check_shares("llama", relative=True)


def check_shares(family: str, relative: bool) -> None:
    base, tuned, split = tiny_model(family), tuned_model(family), split_of(token_rows(48))
    sites = [site for site in ORACLE_SITES if all(has_site(block, site) for block in blocks_of(base))]
    rows = oracle(base, tuned, split, sites, ranks=(1, 5), relative=relative, ridges=(RIDGE,))
    parts = split.fit, split.held_out
    outputs = [[states(model, part, "post_block") for model in (base, tuned)] for part in parts]
    for site in sites:
        inputs = [states(base, part, site) for part in parts]
        for block, row in enumerate(rows):
            (w, x, y), (v, z, other) = (
                _scaled(before[block], after[block], x[block], relative)
                for (before, after), x in zip(outputs, inputs, strict=True)
            )
            full = np.linalg.solve(
                x.T @ x + RIDGE * np.square(x).mean(0).mean() * len(x) * np.eye(x.shape[1]), x.T @ y
            )
            vectors = np.linalg.eigh(y.T @ x @ full)[1][:, ::-1]
            total = np.square(other).sum()

            def share(guess, other=other, total=total):
                return 1 - np.square(other - guess).sum() / total

            found = row["sites"][site]
            for rank in (1, 5):
                low_rank = full @ vectors[:, :rank] @ vectors[:, :rank].T
                assert found["ranks"][rank] == pytest.approx(share(z @ low_rank), abs=1e-6)
            assert found["full"] == pytest.approx(share(z @ full), abs=1e-6)
            mean = w @ y / np.square(w).sum()
            assert row["constant"] == pytest.approx(share(np.outer(v, mean)), abs=1e-6)
            size = (total / np.square(v[:, None] * outputs[1][0][block]).sum()) ** 0.5
            assert row["oracle"] == pytest.approx(size, rel=1e-6)


def _scaled(before, after, x, relative):
    """The factor of each token, and the states at a site and the oracle times it."""
    factor = 1 / np.linalg.norm(before, axis=1) if relative else np.ones(len(x))
    return factor, factor[:, None] * x, factor[:, None] * (after - before)


def test_batches_and_groups_of_blocks_do_not_matter():
    base, tuned, rows = tiny_model(), tuned_model(), token_rows(48)
    split = split_of(rows)
    wanted = oracle(base, tuned, split)
    other = Split(*(left_padded(batches)[::-1] for batches in split_of(rows, batch_size=5)))
    found = oracle(base, tuned, other, memory_bytes=1)
    for one, two in zip(wanted, found, strict=True):
        assert one["block"] == two["block"]
        assert one["constant"] == pytest.approx(two["constant"], abs=1e-6)
        for site, shares in one["sites"].items():
            assert shares["ranks"] == pytest.approx(two["sites"][site]["ranks"], abs=1e-6)


def test_steering_of_one_block_is_explained_at_its_rank():
    model = steered_model(layers_to_transform=[1])
    rows = oracle(None, model, split_of(token_rows(90)), ("post_block",), ranks=(2, 3, 64), blocks=[0, 1])
    assert [row["block"] for row in rows] == [0, 1]
    assert rows[0]["oracle"] == rows[0]["constant"] == rows[0]["sites"]["post_block"]["full"] == 0
    found = rows[1]["sites"]["post_block"]
    assert set(found["ranks"]) == {2, 3}
    assert found["ranks"][2] < 0.999 < 0.999999 < found["ranks"][3]


def test_models_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        oracle(tiny_model(), tiny_model("llama", num_hidden_layers=2), split_of(token_rows(30)))
    with pytest.raises(ValueError, match="no block 7"):
        oracle(tiny_model(), tuned_model(), split_of(token_rows(30)), blocks=[7])
