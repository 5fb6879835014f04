"""Running a model block by block gives the states that running it as a whole gives."""

import pytest
import torch
from model_pairs import left_padded, steered_model, token_rows
from model_zoo import FAMILIES, tiny_model

from trl_steer.analysis import blocks_of, record, token_batches
from trl_steer.analysis.block_by_block import BlockByBlock


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_the_whole_model(family, tmp_path):
    model, batches = tiny_model(family), token_batches(token_rows(5), 3)
    whole = [record(model, batch, ["post_block"]) for batch in batches]
    runs = BlockByBlock(model, tmp_path)
    for block in range(len(runs.blocks)):
        for number, batch in enumerate(left_padded(batches)):
            output, _ = runs.run(block, number, batch)
            torch.testing.assert_close(output.double(), whole[number][block, "post_block"], rtol=0, atol=0)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma3n", "gpt2", "opt", "falcon"])
def test_an_adapter_may_change_behind_the_runs(family, tmp_path):
    model, (batch,) = steered_model(family), token_batches(token_rows(4), 4)
    whole = record(model, batch, ["post_block"])
    adapters = [block.module.post_block_steering.adapters["default"] for block in blocks_of(model)]
    kept = [adapter.up.data.clone() for adapter in adapters]
    for adapter in adapters:
        adapter.up.data.zero_()
    runs = BlockByBlock(model, tmp_path, changes=True)
    for block, adapter in enumerate(adapters):
        before, _ = runs.run(block, 0, batch)
        adapter.up.data.copy_(kept[block])
        with torch.no_grad():
            torch.testing.assert_close(adapter(before).double(), whole[block, "post_block"], rtol=1e-5, atol=1e-5)


def test_blocks_before_do_not_run_again(tmp_path):
    model, batches = tiny_model(), token_batches(token_rows(6), 3)
    counts = dict.fromkeys(range(3), 0)
    runs = BlockByBlock(model, tmp_path)
    for block in runs.blocks:

        def count(module, args, output, index=block.index):
            counts[index] += 1

        block.module.mlp.register_forward_hook(count)
    for block in range(3):
        for number, batch in enumerate(batches):
            runs.run(block, number, batch)
    assert counts == dict.fromkeys(range(3), len(batches))


def test_the_input_of_a_module_is_returned_too(tmp_path):
    model, (batch,) = tiny_model(), token_batches(token_rows(4), 4)
    runs = BlockByBlock(model, tmp_path)
    _, found = runs.run(0, 0, batch, runs.blocks[0].module.mlp)
    torch.testing.assert_close(found.double(), record(model, batch, ["pre_mlp"])[0, "pre_mlp"], rtol=0, atol=0)
