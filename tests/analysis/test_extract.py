"""Vectors from contrast pairs are what their definitions say, and what others compute."""

import numpy as np
import pytest
import torch
from model_pairs import left_padded, token_rows
from model_zoo import tiny_model
from peft import PeftModel
from tuner_cases import FOUR_FAMILIES

from trl_steer.analysis import extract, record, token_batches
from trl_steer.analysis.extract import METHODS, direction


def pairs_of_rows(count: int = 11) -> tuple[list[list[int]], list[list[int]]]:
    """Texts that begin differently."""
    rows = token_rows(count)
    return [[5, 7, *row] for row in rows], [[9, *row] for row in rows]


def states_at(model, rows: list[list[int]], position: int, block: int) -> np.ndarray:
    """The state of one token of each text, one text at a time."""
    found = []
    for row in rows:
        (batch,) = token_batches([row])
        found.append(record(model, batch, ["post_block"])[block, "post_block"][position].numpy())
    return np.stack(found)


def wanted_direction(h_plus: np.ndarray, h_minus: np.ndarray, method: str) -> np.ndarray:
    difference = h_plus - h_minus
    if method == "mean":
        found = difference.mean(0)
    elif method == "logistic":
        linear_model = pytest.importorskip("sklearn.linear_model")
        x = np.vstack([h_plus, h_minus])
        x = (x - x.mean(0)) / (x - x.mean(0)).std()
        y = np.repeat([1, 0], len(h_plus))
        solver = linear_model.LogisticRegression(tol=1e-12, max_iter=10000, solver="newton-cholesky")
        found = solver.fit(x, y).coef_[0]
    else:
        rows = difference - difference.mean(0) if method == "pca" else difference
        found = np.linalg.eigh(rows.T @ rows)[1][:, -1]
        if (difference @ found > 0).sum() < (difference @ found < 0).sum():
            found = -found
    return found / np.linalg.norm(found)


@pytest.mark.parametrize("position", [-1, -3, 1])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_those_of_the_definition(method, position):
    positive, negative = pairs_of_rows()
    batches = token_batches(positive, 5), left_padded(token_batches(negative, 4))
    made = extract(tiny_model(), *batches, method, position, strength=0.25)
    for block, row in enumerate(made.report):
        h_plus, h_minus = (states_at(tiny_model(), rows, position, block) for rows in (positive, negative))
        norm = np.linalg.norm(np.vstack([h_plus, h_minus]), axis=1).mean()
        wanted = 0.25 * norm * wanted_direction(h_plus, h_minus, method)
        vector = made.model.base_model.model.model.layers[block].post_block_steering.adapters["default"].vector
        np.testing.assert_allclose(vector.detach().numpy(), wanted, rtol=0, atol=2e-5 * norm)
        assert row["norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_directions_are_exact(method):
    random = np.random.default_rng(0)
    h_plus, h_minus = random.normal(size=(2, 20, 9)) + np.array([0.3, 0.0])[:, None, None]
    unit, row = direction(torch.tensor(h_plus), torch.tensor(h_minus), method)
    np.testing.assert_allclose(unit.numpy(), wanted_direction(h_plus, h_minus, method), rtol=0, atol=1e-8)
    further = (h_plus - h_minus) @ unit.numpy()
    assert row["separated"] == (further > 0).mean()
    mean = (h_plus - h_minus).mean(0)
    assert row["cosine"] == pytest.approx(unit.numpy() @ mean / np.linalg.norm(mean))
    norms = np.linalg.norm(np.vstack([h_plus, h_minus]), axis=1)
    assert row["difference"] == pytest.approx(np.linalg.norm(mean) / norms.mean())


@pytest.mark.parametrize("family", [*FOUR_FAMILIES, "gemma3n", "llava"])
def test_the_folder_loads_and_moves_the_states(family, tmp_path):
    batches = [token_batches(rows) for rows in pairs_of_rows(4)]
    made = extract(tiny_model(family), *batches, strength=0.5, blocks=[1])
    assert [row["block"] for row in made.report] == [1]
    made.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    before, after = (record(m, batches[0][0], ["post_block"])[1, "post_block"] for m in (tiny_model(family), loaded))
    moved = (after - before).norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * made.report[0]["norm"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "median"}, "Expected method to be one of"),
        ({"position": 90}, "no token at position 90 of a text of"),
        ({"position": -90}, "no token at position -90 of a text of"),
        ({"blocks": [5]}, "no block 5"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    batches = [token_batches(rows) for rows in pairs_of_rows(4)]
    with pytest.raises(ValueError, match=message):
        extract(tiny_model(), *batches, **change)


def test_wrong_pairs_are_refused():
    positive = token_batches(pairs_of_rows(4)[0])
    with pytest.raises(ValueError, match="got 4 positive and 3 negative"):
        extract(tiny_model(), positive, token_batches(pairs_of_rows(3)[1]))
    with pytest.raises(ValueError, match="at least two pairs"):
        extract(tiny_model(), token_batches([[5, 6]]), token_batches([[7, 6]]))
    with pytest.raises(ValueError, match="the same states"):
        extract(tiny_model(), positive, positive)
    with pytest.raises(ValueError, match="differ in the same way"):  # the first token is the same in all texts
        extract(tiny_model(), *(token_batches(rows) for rows in pairs_of_rows(4)), "pca", position=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pca_diff", "pca_center"])
def test_directions_are_those_of_repeng(method, monkeypatch):
    """In all blocks but the last, where repeng takes the state behind the model's last norm, and the first, which it
    leaves out."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # which repeng 0.4 needs, and NumPy 2 removed
    repeng = pytest.importorskip("repeng", reason="the package repeng is not installed")
    from tiny_chat import tiny_model as chat_model
    from tiny_chat import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    pairs = [(f"I love {what}!", f"I hate {what}.") for what in ("rain", "tea", "long walks", "Mondays", "the sea")]
    model = chat_model(num_hidden_layers=4)
    entries = [repeng.DatasetEntry(positive=a, negative=b) for a, b in pairs]
    theirs = repeng.ControlVector.train(model, tokenizer, entries, method=method, batch_size=3).directions
    batches = [token_batches([tokenizer(text)["input_ids"] for text in side]) for side in zip(*pairs, strict=True)]
    made = extract(model, *batches, "pca" if method == "pca_diff" else method)
    for block in (1, 2):
        layer = made.model.base_model.model.model.layers[block].post_block_steering
        ours = layer.adapters["default"].vector.detach().numpy()
        np.testing.assert_allclose(ours / np.linalg.norm(ours), theirs[block], atol=1e-4)
