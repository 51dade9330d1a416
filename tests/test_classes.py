"""Texts with labels: their numbers, what is measured of them, and the place at which a text is read."""

import itertools
import math

import numpy as np
import pytest

from llmjax import config
from llmjax.data.conversations import Row, RowError
from llmjax.data.tokenizer import byte_tokenizer
from llmjax.errors import UserError
from llmjax.post import batches, calibration, classes, rows


def settings(*changes: str) -> config.ConfigDict:
    return config.load("configs/post/classify.py", overrides=["train.sequence_length=32", *changes])


def test_classes_are_numbered_by_name_and_numbers_by_size():
    found = classes.with_labels(settings(), [Row("a", label=name) for name in ("no", "yes", "maybe", "no")])
    assert found.objective.classify.labels == ("maybe", "no", "yes") and found.model.classes == 3
    assert classes.number_of(Row("a", label="yes"), found) == 2.0
    by_size = classes.with_labels(settings(), [Row("a", label=n) for n in (10, 9, 2)])
    assert by_size.objective.classify.labels == ("2", "9", "10")
    with pytest.raises(RowError, match="none of objective.classify.labels=maybe, no, yes"):
        classes.number_of(Row("a", label="often"), found)
    with pytest.raises(RowError, match="give text and label"):
        classes.number_of(Row("a"), found)
    with pytest.raises(UserError, match="telling apart needs two"):
        classes.with_labels(settings(), [Row("a", label="one")])
    given = settings("objective.classify.labels=('b', 'a')")
    assert classes.with_labels(given, [Row("a", label="a")]).objective.classify.labels == ("b", "a")
    number = settings("objective.classify.target=number")
    assert classes.with_labels(number, []) is number and classes.number_of(Row("a", label="1.5"), number) == 1.5
    with pytest.raises(RowError, match="is a number"):
        classes.number_of(Row("a", label="good"), number)
    for label in ("nan", "1e999"):
        with pytest.raises(RowError, match="is a number"):
            classes.number_of(Row("a", label=label), number)


def test_macro_f1_is_that_of_scikit_learn_and_a_class_never_found_counts_0():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels, outputs = random.integers(0, 3, 50), random.normal(size=(50, 4))
    outputs[:, 1] = -9  # never chosen
    found = classes.confusion(outputs, labels)
    np.testing.assert_array_equal(found, sklearn.confusion_matrix(labels, outputs.argmax(1), labels=range(4)))
    assert classes.of_classes(found)["macro_f1"] == pytest.approx(
        sklearn.f1_score(labels, outputs.argmax(1), average="macro")
    )
    first, whole = classes.tables(found, ["a", "b", "c", "d"])
    assert first.rows[1] == ["b", int((labels == 1).sum()), 0.0, 0.0, 0.0] and len(whole.rows) == 4


def test_correlations_are_those_of_scipy_and_of_a_constant_there_is_none():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, 40).astype(float), random.normal(size=40)
    found = classes.of_numbers(a, b)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean((a - b) ** 2)))
    assert math.isnan(classes.of_numbers(np.ones(3), np.arange(3.0))["pearson"])


@pytest.mark.parametrize(("direction", "places"), [("causal", [4, 12]), ("bidirectional", [0, 5])])
def test_a_packed_text_is_read_at_its_last_token_or_its_first(tmp_path, direction, places):
    c = settings("model.direction='bidirectional'", "model.types=2") if direction == "bidirectional" else settings()
    c = classes.with_names(c, ["x", "y"])
    tokenizer = byte_tokenizer()
    given = [Row("abcde"[:3], label="x"), Row("fgh", label="y", second="ij")]
    made = [group for row in given for group in rows.groups_of(tokenizer, row, c)]
    rows.save(tmp_path / "rows", "train", made)
    store = rows.load(tmp_path, "train")
    packed = batches.Rows(store, [[0, 1]], 32, 3)
    batch = batches.row(packed, 0, c)
    # <bos> a b c <eos>, then <bos> f g h <eos> i j <eos>
    assert batch["place"].tolist() == [*places, 0] and batch["labels"].tolist() == [0, 1, 0]
    assert batch["exists"].tolist() == [1, 1, 0] and batch["segments"][:14].tolist() == [1] * 5 + [2] * 8 + [0]
    assert batch["tokens"][[0, 4, 5, 9, 12]].tolist() == [1, 2, 1, 2, 2]
    if direction == "bidirectional":
        assert batch["types"][:13].tolist() == [0] * 10 + [1] * 3
    assert batches.row(packed, 1, c)["exists"].sum() == 0


def test_a_reward_model_that_says_what_it_knows_is_calibrated():
    batch = {
        "groups": np.array([[0, 0, 0, 1, 1]]), "exists": np.array([[1.0, 1, 1, 1, 0]]), "ranks": np.array([[0.0, 1, 1, 0, 1]]),
    }  # fmt: skip
    gaps = calibration.pair_gaps(np.array([[3.0, 1.0, 4.0, 9.0, 0.0]]), batch)
    assert sorted(gaps.tolist()) == [-1.0, 2.0]
    random = np.random.default_rng(0)
    margins = random.exponential(2, 40_000)
    right = random.random(len(margins)) < 1 / (1 + np.exp(-margins))
    gaps = np.where(right, margins, -margins)
    bins = calibration.by_margin(gaps)
    assert [b.pairs for b in bins] == [8000] * 5 and calibration.calibration_error(bins) < 0.01
    assert all(a.accuracy < b.accuracy for a, b in itertools.pairwise(bins))
    assert calibration.calibration_error(calibration.by_margin(5 * gaps)) > 0.1
