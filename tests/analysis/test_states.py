"""The hidden states that measures add up are those of the model, whatever the padding."""

import pytest
import torch
from analysis_cases import BATCHINGS, TEXTS, adapted_model, batch_of, batches, double_model, sublayer_outputs
from model_zoo import FAMILIES, NUM_BLOCKS

from trl_steer.analysis import blocks_of, check_same_shape, record, record_pair, token_batches
from trl_steer.analysis.states import STATES


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_a_token_do_not_depend_on_padding(family):
    model = double_model(family)
    together = record(model, batch_of("left", [0, 1, 2]), STATES)
    first = 0
    for index in range(3):
        alone = record(model, {"input_ids": torch.tensor([TEXTS[index]])}, STATES)
        last = first + len(TEXTS[index])
        for block in range(NUM_BLOCKS):
            for name in STATES:
                torch.testing.assert_close(together[block, name][first:last], alone[block, name], rtol=0, atol=1e-12)
        first = last
    assert together.lengths == [5, 9, 3]


def test_states_are_what_the_modules_of_the_model_return():
    model = double_model()
    direct = sublayer_outputs(model)
    states = [record(model, batch, STATES) for batch in batches("alone")]
    for block in range(NUM_BLOCKS):
        for name, ours in (
            ("mlp", "post_mlp"),
            ("attention", "post_attn"),
            ("output", "post_block"),
            ("mlp_input", "pre_mlp"),
        ):
            recorded = torch.cat([each[block, ours] for each in states])
            torch.testing.assert_close(recorded, torch.from_numpy(direct[name][block]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", BATCHINGS)
def test_residual_stream_is_the_sum_of_what_sublayers_add(name):
    model = double_model("gemma3")
    for batch in batches(name):
        states = record(model, batch, STATES)
        for block in range(NUM_BLOCKS):
            added = states[block, "post_attn"] + states[block, "post_mlp"]
            torch.testing.assert_close(
                states[block, "residual"] + added, states[block, "post_block"], rtol=1e-6, atol=1e-6
            )


def test_states_include_active_adapters_and_a_pair_is_with_and_without_them():
    model = adapted_model("low_rank")
    (batch,) = batches("reordered")
    before, after = record_pair(None, model, batch, ["residual", "post_block"])
    plain = record(double_model(), batch, ["post_block"])
    steered = model(**batch_of("right", [3]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(before[0, "post_block"], plain[0, "post_block"])
    torch.testing.assert_close(after[0, "post_block"][:12], steered[1][0].detach())
    torch.testing.assert_close(after[1, "residual"], after[0, "post_block"])


@pytest.mark.parametrize("positions", ["last_prompt", "f2+l2"])
def test_adapters_that_edit_some_tokens_find_them_in_padded_rows(positions):
    model = adapted_model("low_rank", positions=positions)
    together = record(model, batch_of("left", [0, 3]), ["post_block"])
    alone = [record(model, batch_of("right", [index]), ["post_block"]) for index in (0, 3)]
    joined = torch.cat([each[2, "post_block"] for each in alone])
    torch.testing.assert_close(together[2, "post_block"], joined, rtol=0, atol=1e-12)


def test_mode_of_the_model_stays():
    model = double_model().train()
    model.model.layers[1].eval()
    record(model, batch_of("right", [0]), ["post_block"])
    assert model.training
    assert not model.model.layers[1].training


def test_unknown_blocks_sites_and_empty_batches_are_errors():
    model = double_model()
    with pytest.raises(ValueError, match=r"There is no block 3: .* blocks 0 to 2"):
        blocks_of(model, [3])
    with pytest.raises(ValueError, match="There is no site 'nowhere'"):
        record(model, batch_of("right", [0]), ["nowhere"])
    with pytest.raises(ValueError, match="no tokens"):
        record(model, {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2).long()}, ["residual"])
    with pytest.raises(ValueError, match="no prompts"):
        token_batches([[], []])


def test_models_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match="different shapes: the base model has blocks 3, hidden size 32, the fine-tu"):
        check_same_shape(double_model(), double_model(num_hidden_layers=2))
