"""Positions: just the chosen tokens of the prompt are edited, however the model is called."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import EOS, PAD, VOCAB_SIZE, tiny_inputs, tiny_model
from peft import PeftModel
from steering_cases import adapters_of, layers_of, logits, steer, steering_config, update_of
from transformers import GenerationConfig, StaticCache

from trl_steer import PostBlockSteeringConfig

SITES = ("low_rank", "pre_mlp-low_rank", "post_mlp-silu", "post_attn-vector", "joint-low_rank")
NEW_TOKENS = 6


def enumerate_tokens(is_prompt: list[bool], positions: str) -> list[int]:
    """The tokens to edit, found one by one: the definition in the paper and in pyreft."""
    prompt = [index for index, own in enumerate(is_prompt) if own]
    if positions == "last_prompt":
        return prompt[-1:]
    n = min(int(positions[1:].split("+")[0]), len(prompt) // 2)
    return sorted({*prompt[:n], *prompt[len(prompt) - n :]})


@st.composite
def batches(draw):
    """Rows of padding, prompt and completion: ids, attention mask, labels, and whether each token is the prompt's."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), min_size=1, max_size=4))
    side = draw(st.sampled_from(["left", "right"]))
    width = max(map(sum, lengths)) + draw(st.integers(0, 2))
    rows = []
    for prompt, completion in lengths:
        kinds = ["prompt"] * prompt + ["completion"] * completion
        padding = ["padding"] * (width - len(kinds))
        rows.append(padding + kinds if side == "left" else kinds + padding)
    ids = torch.randint(3, VOCAB_SIZE, (len(rows), width), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[kind != "padding" for kind in row] for row in rows])
    completion = torch.tensor([[kind == "completion" for kind in row] for row in rows])
    inputs = {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}
    return inputs, completion, [[kind == "prompt" for kind in row] for row in rows]


@torch.no_grad()
def edited_tokens(model, base, inputs, **said) -> list[list[int]]:
    """Tokens of each row whose state behind the first block differs from the base model's. `said` is what tells the
    prompt."""
    steered = model(**inputs, **said, output_hidden_states=True).hidden_states[1]
    plain = base(**inputs, output_hidden_states=True).hidden_states[1]
    return [row.nonzero().flatten().tolist() for row in (steered != plain).any(-1)]


POSITIONS = st.one_of(st.just("last_prompt"), st.integers(1, 9).map(lambda n: f"f{n}+l{n}"))


@pytest.fixture(scope="module")
def pair():
    """A model and the same one with a vector, which changes every token that it reaches."""
    return tiny_model("llama"), steer(tiny_model("llama"), "vector", positions="last_prompt")


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches(), positions=POSITIONS)
def test_edited_tokens_are_those_that_a_reference_enumerates(pair, batch, positions):
    base, model = pair
    for adapter in adapters_of(model):
        adapter.positions = positions
    inputs, completion, is_prompt = batch
    expected = [enumerate_tokens(row, positions) for row in is_prompt]
    labels = inputs["input_ids"].masked_fill(~completion, -100)
    assert edited_tokens(model, base, inputs, labels=labels) == expected
    assert edited_tokens(model, base, inputs, completion_mask=completion.long()) == expected
    is_all = [enumerate_tokens(row, positions) for row in inputs["attention_mask"].bool().tolist()]
    assert edited_tokens(model, base, inputs) == is_all


def by_hand(model, edited: list[list[int]]):
    """The base model of `model`, with its updates added by hooks of our own at the tokens `edited`, whatever is
    computed: to be used without a cache."""
    adapters = adapters_of(model)
    base = copy.deepcopy(model).unload()
    if model.peft_config["default"].peft_type == "JOINT_STEERING":
        base = copy.deepcopy(model)  # LoRA stays, and needs no help
        for layer in layers_of(base):
            layer.remove()
        base = base.base_model.model
    base.edits = copy.deepcopy(adapters)  # a plain list, so no part of the model
    for adapter, block in zip(base.edits, base.model.layers, strict=True):

        def edit(hidden, adapter=adapter):
            hidden, repeats = hidden.clone(), len(hidden) // len(edited)
            for row in range(len(hidden)):
                tokens = edited[row // repeats]
                hidden[row, tokens] += update_of(adapter, hidden[row, tokens])
            return hidden

        match adapter.site:
            case "post_block":
                block.register_forward_hook(lambda m, a, out, edit=edit: edit(out))
            case "pre_mlp":
                block.mlp.register_forward_pre_hook(lambda m, a, edit=edit: (edit(a[0]),))
            case "post_mlp":
                block.mlp.register_forward_hook(lambda m, a, out, edit=edit: edit(out))
            case "post_attn":
                block.self_attn.register_forward_hook(lambda m, a, out, edit=edit: (edit(out[0]), *out[1:]))
    return base


def prompts(side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 7)):
        where = slice(0, padding) if side == "left" else slice(9 - padding, 9)
        mask[row, where] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


WAYS = {
    "with a cache": {},
    "without a cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "beams, chunked prefill": {"num_beams": 3, "prefill_chunk_size": 2},
    "several sequences": {"num_beams": 2, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
}


@torch.no_grad()
def generate(model, inputs, **options):
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": PAD, "eos_token_id": EOS}
    torch.manual_seed(0)
    return model.generate(**inputs, generation_config=GenerationConfig(**fixed, **{"do_sample": False, **options}))


def generate_by_hand(model, site, inputs, positions, options):
    """What the base model with edits by hand generates without a cache; and that the edits matter."""
    edited = [enumerate_tokens(row, positions) for row in inputs["attention_mask"].bool().tolist()]
    options = {key: value for key, value in options.items() if "num" in key or "sample" in key} | {"use_cache": False}
    text = generate(by_hand(model, edited), inputs, **options)
    assert not torch.equal(text, generate(copy.deepcopy(model).unload(), inputs, **options))
    return text


@pytest.mark.parametrize("positions", ["last_prompt", "f2+l2"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("site", SITES)
def test_generated_text_is_that_of_a_model_whose_prompt_is_edited_by_hand(site, way, positions):
    model = steer(tiny_model(), site, positions=positions, scaling=20.0)
    inputs = prompts("left")
    expected = generate_by_hand(model, site, inputs, positions, WAYS[way])
    assert torch.equal(generate(model, inputs, **WAYS[way]), expected)


@pytest.mark.parametrize("way", ["with a cache", "without a cache", "a static cache"])
def test_right_padded_prompts_are_edited_at_their_own_ends(way):
    model, inputs = steer(tiny_model(), "low_rank", positions="f2+l2", scaling=20.0), prompts("right")
    expected = generate_by_hand(model, "low_rank", inputs, "f2+l2", WAYS[way])
    assert torch.equal(generate(model, inputs, **WAYS[way]), expected)


@pytest.mark.parametrize("way", ["with a cache", "a static cache", "beams"])
def test_a_model_that_no_tuner_stands_around_generates_the_same(way):
    """As with transformers' `load_adapter`, which injects into the model itself."""
    model, inputs = steer(tiny_model(), "low_rank", positions="f2+l2", scaling=20.0), prompts("left")
    expected = generate_by_hand(model, "low_rank", inputs, "f2+l2", WAYS[way])
    assert torch.equal(generate(model.base_model.model, inputs, **WAYS[way]), expected)


def test_assisted_decoding_and_prompt_lookup_edit_the_prompt_once():
    model, inputs = steer(tiny_model(), "low_rank", positions="last_prompt", scaling=20.0), prompts("left")
    inputs = {key: value[:1] for key, value in inputs.items()}
    expected = generate_by_hand(model, "low_rank", inputs, "last_prompt", {})
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), expected)
    torch.manual_seed(0)
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        text = model.generate(**inputs, assistant_model=tiny_model(seed=5), eos_token_id=EOS, **fixed)
    assert torch.equal(text, expected)


def test_a_conversation_that_goes_on_with_its_cache_is_edited_in_its_new_prompt_only():
    model, inputs = steer(tiny_model(), "vector", positions="last_prompt", scaling=20.0), prompts("left")
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        first = model(ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), use_cache=True)
        assert first.past_key_values.get_seq_length() == 5
        text = model.generate(
            ids, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False, pad_token_id=PAD
        )
        reference = by_hand(model, [[4, 8]])
        expected = reference.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD, use_cache=False)
    assert torch.equal(text, expected)


def completion_batch() -> dict[str, torch.Tensor]:
    inputs = prompts("left")
    completion = torch.randint(3, VOCAB_SIZE, (3, 5), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([inputs["input_ids"], completion], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(completion)], dim=1)
    labels = ids.clone()
    labels[:, :9] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def other_batch() -> dict[str, torch.Tensor]:
    """Of the same shape, with other prompts."""
    batch = {key: value.flip(0) for key, value in completion_batch().items()}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :11] = -100
    return batch


def gradients(model, checkpointing, batches) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    sum(model(**batch).loss for batch in batches).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("site", SITES)
def test_gradients_are_equal_with_checkpointing_also_of_several_forward_passes(site, reentrant):
    """The backward pass runs blocks again, long after the forward pass that says where the prompt is."""
    batches = [completion_batch(), other_batch()]
    expected = gradients(steer(tiny_model(), site, positions="f2+l2"), None, batches)
    found = gradients(steer(tiny_model(), site, positions="f2+l2"), {"use_reentrant": reentrant}, batches)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_the_edit_by_hand():
    model, batch = steer(tiny_model(dtype=torch.float64), "silu", positions="f2+l2").double(), completion_batch()
    labels = batch["labels"]
    edited = [enumerate_tokens(row, "f2+l2") for row in ((labels == -100) & (batch["attention_mask"] == 1)).tolist()]
    reference = by_hand(model, edited)
    expected = reference(**batch).loss
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    ((gradient,),) = (torch.autograd.grad(loss, adapters_of(model)[0].down),)
    (wanted,) = torch.autograd.grad(expected, reference.edits[0].down)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-10)


def test_adapters_of_different_positions_work_side_by_side_and_by_row():
    model = steer(tiny_model(), "low_rank", positions="last_prompt")
    steer(model, "vector", adapter_name="first", positions="f1+l1")
    steer(model, "silu", adapter_name="all")
    inputs = tiny_inputs(rows=4)
    alone = []
    for name in ("default", "first", "all"):
        model.set_adapter(name)
        alone.append(logits(model, inputs))
    with model.disable_adapter():
        alone.append(logits(model, inputs))
    together = logits(model, inputs, adapter_names=["default", "first", "all", "__base__"])
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row], expected[row], atol=1e-5, rtol=1e-5)
    model.base_model.set_adapter(["default", "first"])
    base = copy.deepcopy(model).unload()
    hidden = base(**inputs, output_hidden_states=True).hidden_states[1]
    steered = model(**inputs, output_hidden_states=True).hidden_states[1]
    low_rank, vector = (layers_of(model)[0].adapters[name] for name in ("default", "first"))
    expected = hidden.clone()
    expected[:, -1] += update_of(low_rank, hidden[:, -1]) + update_of(vector, hidden[:, -1])
    expected[:, 0] += update_of(vector, hidden[:, 0])
    torch.testing.assert_close(steered, expected, atol=1e-6, rtol=1e-5)


def test_loaded_adapter_edits_the_same_tokens(tmp_path):
    model = steer(tiny_model(), "low_rank", positions="f1+l1")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.peft_config["default"].positions == "f1+l1"
    assert torch.equal(logits(loaded), logits(model))


def test_compiled_model_edits_the_same_tokens():
    model, batch = steer(tiny_model(), "low_rank", positions="f2+l2"), completion_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**batch).logits, expected)


def test_unloading_and_deleting_leave_no_hook():
    base = tiny_model()
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in base.named_modules()}
    model = steer(base, "post_mlp-low_rank", positions="last_prompt")
    model.add_adapter("other", steering_config("post_mlp-low_rank"))
    model.delete_adapter("default")
    model.set_adapter("other")
    model.train()(**tiny_inputs())  # nothing to be found any more
    unloaded = model.unload()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unloaded.named_modules()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "the prompt is unknown"),
        ({"labels": "ids"}, "has a completion but no prompt"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]] * 3)}, "packing"),
    ],
)
def test_in_training_an_unknown_prompt_is_an_error(change, message):
    model, batch = steer(tiny_model(), "low_rank", positions="last_prompt").train(), completion_batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch |= {key: batch["input_ids"] if value == "ids" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with model.disable_adapter():
        model(**batch)


def test_the_decoder_alone_cannot_be_called():
    model = steer(tiny_model(), "low_rank", positions="last_prompt")
    with pytest.raises(RuntimeError, match="Call the whole model"):
        model.base_model.model.model(**tiny_inputs())


@torch.no_grad()
def test_an_unknown_prompt_in_evaluation_raises():
    model = steer(tiny_model(), "vector", positions="last_prompt")
    ids = tiny_inputs()["input_ids"]
    for options in ({}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="the prompt is unknown"):
            model(ids, **options)


@torch.no_grad()
def test_what_follows_the_first_pass_of_a_cache_is_not_edited():
    base, model = tiny_model(), steer(tiny_model(), "vector", positions="last_prompt")
    ids = tiny_inputs(length=9)["input_ids"]
    states = []
    for one in (base, model):
        with model.disable_adapter():
            cache = one(ids[:, :3], attention_mask=torch.ones_like(ids[:, :3]), use_cache=True).past_key_values
        states.append(one(ids[:, 3:], past_key_values=cache, output_hidden_states=True).hidden_states[1])
    assert torch.equal(*states)


@torch.no_grad()
def test_a_cache_that_is_reset_starts_a_new_prompt():
    base, model = tiny_model(), steer(tiny_model(), "vector", positions="last_prompt")
    cache = StaticCache(base.config, max_cache_len=12)
    for ids in (tiny_inputs(length=5)["input_ids"], tiny_inputs(length=4, seed=2)["input_ids"]):
        cache.reset()
        expected = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_another_steered_model_inside_generate_has_a_prompt_of_its_own():
    base, model, other = tiny_model(), *(steer(tiny_model(), "vector", positions="last_prompt") for _ in range(2))
    edited = []

    def call_other(ids, scores):
        edited.append(edited_tokens(other, base, tiny_inputs(rows=2, length=5)))
        return scores

    model.generate(**tiny_inputs(rows=3), max_new_tokens=2, logits_processor=[call_other], pad_token_id=PAD)
    assert edited == [[[4], [4]]] * 2


@torch.no_grad()
def test_the_unconditional_branch_of_guidance_is_edited_in_its_own_prompt():
    model, inputs = steer(tiny_model(), "vector", positions="last_prompt", scaling=5.0), tiny_inputs(rows=1, length=4)
    negative = tiny_inputs(rows=1, length=7, seed=3)["input_ids"]
    seen = []
    layers_of(model)[0].adapters["default"].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    options = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "max_new_tokens": 4, "pad_token_id": PAD}
    model.generate(**inputs, **options, do_sample=False)
    assert sum(seen) == 2  # one token of each prompt


def test_an_interrupted_forward_pass_leaves_no_prompt_behind():
    model, batch = steer(tiny_model(), "pre_mlp-low_rank", positions="f2+l2"), completion_batch()
    expected = gradients(copy.deepcopy(model), {"use_reentrant": True}, [batch])

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.base_model.model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**other_batch())
    handle.remove()
    for name, gradient in gradients(model, {"use_reentrant": True}, [batch]).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_padding_is_found_without_a_mask_under_a_static_cache(family):
    inputs = prompts("left")
    model = steer(
        tiny_model(family, **({"sliding_window": 4} if family == "mistral" else {})), "low_rank", positions="f2+l2"
    )
    expected = generate(model, inputs)
    found = generate(model, {"input_ids": inputs["input_ids"]}, cache_implementation="static")
    assert torch.equal(found, expected)


@torch.no_grad()
def test_an_adapter_added_to_a_compiled_model_is_run():
    model, inputs = steer(tiny_model(), "low_rank", positions="f2+l2"), tiny_inputs()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, logits(model, inputs))
    steer(model, "low_rank", adapter_name="other", positions="last_prompt", seed=4)
    model.set_adapter("other")
    torch.testing.assert_close(compiled(**inputs).logits, logits(model, inputs))


@pytest.mark.parametrize("positions", ["", "last", "f7", "f7+l6", "f0+l0", "p7+s7", 7])
def test_unknown_positions_are_refused(positions):
    with pytest.raises(ValueError, match=r"Expected positions to be .* got "):
        PostBlockSteeringConfig(positions=positions)


def test_adapter_that_edits_some_tokens_does_not_merge():
    model = steer(tiny_model("gpt2"), "vector", positions="last_prompt")
    with pytest.raises(ValueError, match="edits some tokens only"):
        model.merge_adapter()


def test_positions_must_agree_in_sums():
    model = steer(tiny_model(), "vector", positions="last_prompt")
    steer(model, "vector", adapter_name="other")
    with pytest.raises(ValueError, match="positions"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
