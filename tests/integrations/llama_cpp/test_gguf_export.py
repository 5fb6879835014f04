"""GGUF files with an adapter inside: what llama.cpp computes, what is kept of the base model, what is refused."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from saved_adapters import JOINT, LOW_RANK, SILU, VECTOR, logits_of, steer
from tiny_gguf import gguf_model, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steer import LoReftConfig, PostBlockSteeringConfig, SublayerSteeringConfig, set_scaling
from trl_steer.eval.experiments.llama_cpp_engine import Engine
from trl_steer.eval.experiments.llama_cpp_export import kept_bytes
from trl_steer.integrations.export.progress import Progress
from trl_steer.integrations.llama_cpp import calibration, inserted_blocks
from trl_steer.integrations.llama_cpp.export import CONSTANT, check_gguf, export_control_vector, export_gguf
from trl_steer.integrations.llama_cpp.gguf_file import BaseFile, Tensor

IDS = list(range(3, 40))
CONFIGS = {"low_rank": LOW_RANK, "silu": SILU, "vector": VECTOR, "joint": JOINT}
TEXT = "Short.\n\nAnd ab: a second paragraph, 1, 2, 3!\n"

# Packages that are installed but do not fit together fail the tests.
MISSING = [name for name in ("xllamacpp", "llama_cpp_py_sync") if importlib.util.find_spec(name) is None]
needs_engine = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def export(folder: Path, base: Path, text: Path | None, output: Path) -> Path:
    with Progress() as progress:
        export_gguf(str(folder), output, base, text, progress)
    return output


def random_q4_k(data: np.ndarray, kind: Kind) -> np.ndarray:
    """A random matrix of the same shape in Q4_K, which the package gguf cannot quantize to; other types as usual."""
    if kind != Kind.Q4_K:
        return gguf.quants.quantize(data, kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(data.size).integers(0, 256, (*data.shape[:-1], data.shape[-1] // values, size))
    blocks = blocks.astype(np.uint8)
    # The scales of values and of minima, in float16: around zero.
    blocks[..., :4] = np.frombuffer(np.array([2e-4, 15e-4], dtype=np.float16).tobytes(), dtype=np.uint8)
    return blocks.reshape(*data.shape[:-1], -1)


@needs_engine
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_llama_cpp_computes_what_peft_computes(family, method, text, tmp_path):
    model = gguf_model(family)
    base = write_gguf(model, tmp_path / "base.gguf")
    steered = steer(model, CONFIGS[method], tmp_path / "adapter")
    file = export(tmp_path / "adapter", base, text, tmp_path / "out.gguf")
    with steered.disable_adapter():
        unsteered = logits_of(steered, IDS)
    expected = logits_of(steered, IDS)
    assert (expected - unsteered).abs().max() > 0.1
    with Engine(file) as engine:
        np.testing.assert_allclose(engine.logits(IDS), expected.numpy(), atol=1e-4)
        one_by_one = engine.greedy(IDS, 12)
    chosen = steered.generate(
        torch.tensor([IDS]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert one_by_one == chosen[0, len(IDS) :].tolist()


@needs_engine
@pytest.mark.parametrize(
    "change",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 2], "rank_pattern": {"layers.2": 5}},
        {"scaling": 0.0},
        {"scaling": -2.0, "activation": "silu"},
    ],
    ids=["one block", "ranks", "zero", "negative"],
)
def test_blocks_ranks_and_scaling_are_exported(change, text, tmp_path):
    model = gguf_model(tie_word_embeddings=False)
    base = write_gguf(model, tmp_path / "base.gguf")
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=3, init_weights=False, **change)
    steered = steer(model, config, tmp_path / "adapter")
    file = export(tmp_path / "adapter", base, text, tmp_path / "out.gguf")
    with Engine(file) as engine:
        np.testing.assert_allclose(engine.logits(IDS), logits_of(steered, IDS).numpy(), atol=1e-4)


@needs_engine
def test_attention_and_mlp_with_biases_are_exported(text, tmp_path):
    model = gguf_model(attention_bias=True, mlp_bias=True)
    base = write_gguf(model, tmp_path / "base.gguf")
    for number, config in enumerate((LOW_RANK, VECTOR)):
        steered = steer(copy.deepcopy(model), config, tmp_path / f"adapter{number}")
        file = export(tmp_path / f"adapter{number}", base, text, tmp_path / "out.gguf")
        with Engine(file) as engine:
            np.testing.assert_allclose(engine.logits(IDS), logits_of(steered, IDS).numpy(), atol=1e-4)


@needs_engine
def test_blocks_of_256_are_padded_by_256_and_stay_as_they_are(text, tmp_path):
    model = gguf_model(hidden_size=256, intermediate_size=512)
    base = BaseFile(write_gguf(model, tmp_path / "base.gguf", Kind.Q4_K, random_q4_k))
    dequantized = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32).eval()
    with Engine(base.path) as engine:
        noise = np.abs(engine.logits(IDS) - logits_of(dequantized, IDS).numpy()).mean()
    steered = steer(dequantized, LOW_RANK, tmp_path / "adapter")
    expected = logits_of(steered, IDS)
    with steered.disable_adapter():
        assert (logits_of(steered, IDS) - expected).abs().mean() > 5 * noise
    file = BaseFile(export(tmp_path / "adapter", base.path, text, tmp_path / "out.gguf"))
    assert kept_bytes(base, file)["changed"] == []
    assert file.get("deci.embedding_length") == 512
    with Engine(file.path) as engine:
        assert np.abs(engine.logits(IDS) - expected.numpy()).mean() < 2 * noise


@pytest.mark.parametrize("activation", [None, "silu"])
def test_an_inserted_block_computes_the_update(activation, tmp_path):
    """With the tensors of the file and the formulas of llama.cpp, in numpy."""
    model, config = gguf_model(), copy.deepcopy(LOW_RANK)
    config.activation = activation
    base = write_gguf(model, tmp_path / "base.gguf")
    steered = steer(model, config, tmp_path / "adapter")
    file = BaseFile(export(tmp_path / "adapter", base, None, tmp_path / "out.gguf"))
    assert file.architecture == "deci"
    h = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) * 3
    layer = steered.base_model.model.model.layers[1].post_block_steering
    with torch.no_grad():
        expected = layer.adapters["default"](torch.tensor(h)).numpy()
    values = {name: tensor.values() for name, tensor in file.tensors.items() if name.startswith("blk.3.")}
    stream = np.zeros((5, file.get("deci.embedding_length")), dtype=np.float32)
    stream[:, :64] = h
    stream += file.tensors["blk.2.ffn_down.bias"].values()
    squares = (stream.astype(np.float64) ** 2).mean(-1, keepdims=True)
    x = stream / np.sqrt(squares + file.get("deci.attention.layer_norm_rms_epsilon")) * values["blk.3.ffn_norm.weight"]
    gate, up = x @ values["blk.3.ffn_gate.weight"].T, x @ values["blk.3.ffn_up.weight"].T
    stream += (gate / (1 + np.exp(-gate)) * up) @ values["blk.3.ffn_down.weight"].T + values["blk.3.ffn_down.bias"]
    np.testing.assert_allclose(stream[:, :64], expected, rtol=1e-5, atol=1e-5)
    assert not stream[:, 64:].any()
    heads = [file.get(f"deci.attention.head_count{kind}") for kind in ("", "_kv")]
    assert heads == [[4, 0] * 3, [2, 0] * 3]
    assert file.get("deci.feed_forward_length") == [96, 3] * 3


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0])
def test_tensors_of_the_base_model_stay_as_they_are(kind, text, tmp_path):
    model = gguf_model()
    base = write_gguf(model, tmp_path / "base.gguf", kind)
    for name in ("low_rank", "vector"):
        steer(copy.deepcopy(model), CONFIGS[name], tmp_path / name)
        file = BaseFile(export(tmp_path / name, base, text, tmp_path / "out.gguf"))
        assert kept_bytes(BaseFile(base), file) == {"tensors": 22, "changed": []}


@pytest.mark.parametrize("kind", [kind for kind in Kind if gguf.GGML_QUANT_SIZES[kind][0] > 1])
def test_zeros_appended_to_rows_of_a_quantized_type_are_zeros(kind):
    values, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (3, 2 * size), dtype=np.uint8)
    try:
        expected = dequantize(data, kind)
    except NotImplementedError:
        with pytest.raises(ValueError, match=f"type {kind.name}, which cannot be extended"):
            inserted_blocks._check_zeros(kind)
        return
    inserted_blocks._check_zeros(kind)
    padded = dequantize(Tensor(data, kind, rows=1, columns=values).padded(), kind)
    np.testing.assert_array_equal(padded, np.pad(expected, ((0, 1), (0, values))))


def test_lora_changes_its_own_tensors_only_and_float16_replaces_quantized_ones(text, tmp_path):
    model = gguf_model()
    base = write_gguf(model, tmp_path / "base.gguf", Kind.Q8_0)
    config = copy.deepcopy(JOINT)
    config.target_modules = {"q_proj", "down_proj"}
    steer(model, config, tmp_path / "adapter")
    file = BaseFile(export(tmp_path / "adapter", base, text, tmp_path / "out.gguf"))
    kept = kept_bytes(BaseFile(base), file)
    assert sorted(kept["changed"]) == sorted(f"blk.{i}.{n}.weight" for i in range(3) for n in ("attn_q", "ffn_down"))
    assert file.tensors["blk.2.attn_q.weight"].type == Kind.F16
    assert file.get("trl_steer.merged_tensors") == 6


def test_constant_is_a_power_of_two_above_the_largest_norm_in_the_steered_model(text, tmp_path):
    model = gguf_model()
    base = write_gguf(model, tmp_path / "base.gguf")
    steered = steer(model, LOW_RANK, tmp_path / "adapter")
    set_scaling(steered, "default", 0.0)  # so that hidden states are those of the base model
    steered.save_pretrained(str(tmp_path / "adapter"))
    file = BaseFile(export(tmp_path / "adapter", base, text, tmp_path / "out.gguf"))
    norms = []
    for module in model.model.layers:
        module.register_forward_hook(lambda module, args, output: norms.append(output.norm(dim=-1).max().item()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    whole = TEXT.strip("\n")
    rows = [tokenizer(part)["input_ids"] for part in whole.split("\n\n")]
    for row in [*rows, *([tokenizer.bos_token_id, *row] for row in rows), tokenizer(whole)["input_ids"]]:
        logits_of(model, row)
    assert file.get("trl_steer.largest_norm") == pytest.approx(max(norms), rel=1e-6)
    constant = file.get(CONSTANT)
    assert math.log2(constant).is_integer()
    assert calibration.MARGIN <= constant / max(norms) < 2 * calibration.MARGIN
    assert file.get("trl_steer.margin") == pytest.approx(constant / max(norms), rel=1e-6)


def test_file_says_what_it_was_made_of(text, tmp_path):
    model = gguf_model()
    base = write_gguf(model, tmp_path / "base.gguf")
    steer(model, LOW_RANK, tmp_path / "adapter")
    file = BaseFile(export(tmp_path / "adapter", base, text, tmp_path / "out.gguf"))
    assert file.get("trl_steer.adapter") == "adapter"
    assert file.get("trl_steer.base") == "base.gguf"
    assert file.get("trl_steer.calibration") == "text.txt"
    assert json.loads(file.get("trl_steer.adapter.config")) == {
        "steering_type": "low_rank",
        "r": 3,
        "activation": None,
        "scaling": 0.7,
    }
    before = BaseFile(base).metadata()
    tokenizer = {name: value for name, value in before.items() if name.startswith("tokenizer.")}
    assert tokenizer
    assert tokenizer.items() <= file.metadata().items()


def test_an_adapter_whose_norms_leave_no_margin_is_refused_by_the_check(text, tmp_path):
    model = gguf_model()
    base = write_gguf(model, tmp_path / "base.gguf")
    steered = steer(model, LOW_RANK, tmp_path / "adapter")
    file = export(tmp_path / "adapter", base, text, tmp_path / "out.gguf")
    with Progress() as progress:
        said = check_gguf(str(tmp_path / "adapter"), file, base, None, progress)
        assert "times as large" in said
        set_scaling(steered, "default", 100.0)
        steered.save_pretrained(str(tmp_path / "larger"))
        with pytest.raises(ValueError, match=r"is only .* times as large"):
            check_gguf(str(tmp_path / "larger"), file, base, text, progress)
        with pytest.raises(ValueError, match="not a model with a low-rank adapter inside"):
            check_gguf(str(tmp_path / "adapter"), base, base, text, progress)


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf, 1e20])
def test_norms_that_no_constant_exceeds_are_refused(norm):
    with pytest.raises(ValueError, match="which the constant of the inserted blocks cannot exceed"):
        _ = calibration.Measured(norm, 1).constant


@needs_engine
def test_control_vector_is_what_the_adapter_adds(tmp_path):
    model = gguf_model()
    base = write_gguf(model, tmp_path / "base.gguf")
    config = copy.deepcopy(VECTOR)
    config.layers_to_transform = [1, 2]
    steered = steer(model, config, tmp_path / "adapter")
    export_control_vector(str(tmp_path / "adapter"), tmp_path / "out.gguf")
    file = BaseFile(tmp_path / "out.gguf")
    assert file.architecture == "controlvector"
    assert file.get("controlvector.model_hint") == "llama"
    assert sorted(file.tensors) == ["direction.1", "direction.2"]
    with Engine(base) as engine:
        engine.set_control_vector(np.stack([file.tensors[f"direction.{index}"].values() for index in (1, 2)]))
        np.testing.assert_allclose(engine.logits(IDS), logits_of(steered, IDS).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [(VECTOR, "steers block 0"), (LOW_RANK, "not a vector adapter"), (JOINT, "not a vector adapter")],
    ids=["block 0", "low rank", "joint"],
)
def test_what_a_control_vector_cannot_express_is_refused(config, message, tmp_path):
    steer(gguf_model(), config, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export_control_vector(str(tmp_path / "adapter"), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


REFUSED = {
    "activation": (PostBlockSteeringConfig(r=2, activation="gelu"), {}, "activation='gelu'"),
    "positions": (PostBlockSteeringConfig(r=2, positions="last_prompt"), {}, "positions='last_prompt'"),
    "sublayer": (SublayerSteeringConfig(r=2, site="post_mlp"), {}, "has a SublayerSteeringConfig"),
    "baseline": (LoReftConfig(r=2), {}, "has a LoReftConfig"),
    "head": (PostBlockSteeringConfig(r=2, modules_to_save=["lm_head"]), {}, r"modules_to_save=\['lm_head'\]"),
    "experts": (LOW_RANK, {"llama__expert_count": 8}, "llama.expert_count, which is not supported"),
    "part": (LOW_RANK, {"split__count": 2}, "one of several parts"),
    "head sizes": (
        LOW_RANK,
        {"llama__attention__key_length": 16, "llama__attention__value_length": 8},
        "of different sizes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(case, text, tmp_path):
    config, metadata, message = REFUSED[case]
    model = gguf_model(tie_word_embeddings=False)
    base = write_gguf(model, tmp_path / "base.gguf", **metadata)
    steer(model, config, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "adapter", base, text, tmp_path / "out.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base.gguf", "text.txt"]


def test_a_base_model_that_is_another_one_is_refused(text, tmp_path):
    for name, family, fields in (
        ("wider", "llama", {"hidden_size": 128}),
        ("shorter", "llama", {"num_hidden_layers": 2}),
    ):
        write_gguf(gguf_model(family, **fields), tmp_path / f"{name}.gguf")
    write_gguf(gguf_model("qwen2"), tmp_path / "qwen2.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "other.gguf").write_bytes(b"no GGUF file" * 10)
    steer(gguf_model(), LOW_RANK, tmp_path / "adapter")
    messages = {
        "wider": "is of another model: its hidden size is 64",
        "shorter": "is of another model: its hidden size is 64 and its last block 2",
        "qwen2": "of a llama model, but qwen2.gguf has the architecture 'qwen2'",
        "empty": "not a GGUF file",
        "other": "not a GGUF file",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "adapter", tmp_path / f"{name}.gguf", text, tmp_path / "out.gguf")


def test_an_architecture_that_is_not_supported_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    steer(gguf_model(), LOW_RANK, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"architecture 'gemma3'\. Supported are 'llama', 'qwen2'"):
        export(tmp_path / "adapter", tmp_path / "base.gguf", None, tmp_path / "out.gguf")
