from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mtlrec.metrics.sketch import ScoreSketch, score_keys

scores_with_labels = st.lists(
    st.tuples(
        st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]),
        ),
        st.booleans(),
    ),
    min_size=2,
    max_size=200,
).filter(lambda rows: len({label for _, label in rows}) == 2)


def _arrays(rows: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in rows], np.float32), np.array([label for _, label in rows])


def _sketch(scores: np.ndarray, labels: np.ndarray, cap: int) -> ScoreSketch:
    sketch = ScoreSketch(cap)
    sketch.update(scores, labels)
    return sketch


def _state(sketch: ScoreSketch) -> list[list[int]]:
    shift, keys, positives, negatives = sketch.arrays()
    return [[shift], keys.tolist(), positives.tolist(), negatives.tolist()]


@given(scores_with_labels)
def test_below_the_cap_it_is_the_exact_area(rows: list[tuple[float, bool]]) -> None:
    scores, labels = _arrays(rows)
    sketch = _sketch(scores, labels, cap=256)
    # scikit-learn keeps float32 as it is: the same scores, the same ties.
    assert sketch.auc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert sketch.shift == 0


@given(scores_with_labels, st.data())
def test_state_does_not_depend_on_the_order_of_updates_and_merges(
    rows: list[tuple[float, bool]], data: st.DataObject
) -> None:
    cap = data.draw(st.integers(2, 64))
    whole = _sketch(*_arrays(rows), cap)
    order = data.draw(st.permutations(range(len(rows))))
    part_of = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    parts = [ScoreSketch(cap) for _ in range(5)]
    for place in order:
        scores, labels = _arrays([rows[place]])
        parts[part_of[place]].update(scores, labels)
        if place % 7 == 0:
            parts[part_of[place]].auc()
    merged = ScoreSketch(cap)
    for part in data.draw(st.permutations(parts)):
        merged.merge(part)
    assert _state(merged) == _state(whole)
    assert merged.auc() == whole.auc()
    assert len(merged.arrays()[1]) <= cap


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-4, 0.3, 1.0, 5.0]),
    centre=st.sampled_from([-8.0, -1.0, 0.0, 3.0]),
)
def test_above_a_small_cap_the_error_is_below_a_ten_thousandth(
    seed: int, scale: float, centre: float
) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(centre, scale, 30_000).astype(np.float32)
    chance = 1 / (1 + np.exp(-2 * (scores - centre) / scale))
    labels = random.random(len(scores)) < chance
    sketch = _sketch(scores, labels, cap=4096)
    assert sketch.auc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert len(sketch.arrays()[1]) <= 4096


def test_a_small_cap_does_make_scores_coarser() -> None:
    scores = np.linspace(-4, 4, 10_000, dtype=np.float32)
    sketch = _sketch(scores, scores > 0, cap=64)
    assert sketch.shift > 0
    # Bins keep to one side of zero, so a perfect ranking by sign stays perfect.
    assert sketch.auc() == 1.0


def test_many_updates_settle_and_count_every_row() -> None:
    random = np.random.default_rng(1)
    scores = random.normal(size=400_000).astype(np.float32)
    labels = random.random(len(scores)) < 0.3
    sketch = ScoreSketch(cap=5_000)
    for begin in range(0, len(scores), 10_000):
        sketch.update(scores[begin : begin + 10_000], labels[begin : begin + 10_000])
    _, keys, positives, negatives = sketch.arrays()
    assert (positives.sum(), negatives.sum()) == (labels.sum(), (~labels).sum())
    assert np.all(keys[1:] > keys[:-1])
    assert _state(sketch) == _state(_sketch(scores, labels, 5_000))


def test_one_class_has_no_area() -> None:
    assert ScoreSketch().auc() is None
    assert _sketch(np.array([1, 2], np.float32), np.array([True, True]), 8).auc() is None


def test_an_area_over_more_pairs_than_an_int64_counts() -> None:
    many = 2**33
    keys = np.array([1, 2], np.uint32)
    sketch = ScoreSketch.from_arrays(8, 0, keys, np.array([many, many * 3]), np.array([many * 3, many]))
    # P(positive above) + P(tie) / 2 = 9/16 + (3/16 + 3/16) / 2
    assert sketch.auc() == pytest.approx(0.75)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_keys_order_as_scores_do(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    keys = score_keys(scores)
    for i in range(len(scores) - 1):
        assert (keys[i] < keys[i + 1]) == (scores[i] < scores[i + 1])
        assert (keys[i] == keys[i + 1]) == (scores[i] == scores[i + 1])


def test_merging_leaves_the_other_as_it_was() -> None:
    other = _sketch(np.arange(100, dtype=np.float32), np.arange(100) % 3 == 0, cap=128)
    before = _state(other)
    total = _sketch(np.linspace(-1, 1, 500, dtype=np.float32), np.arange(500) % 2 == 0, cap=128)
    total.merge(other)
    total.merge(other)
    assert _state(other) == before


def test_sketches_of_different_caps_do_not_merge() -> None:
    with pytest.raises(ValueError, match="caps 8 and 16"):
        ScoreSketch(8).merge(ScoreSketch(16))
    with pytest.raises(ValueError, match="below 2"):
        ScoreSketch(1)


@pytest.mark.parametrize(
    ("shift", "keys", "positives"),
    [
        (0, [2, 1], [1, 1]),
        (0, [1, 1], [1, 1]),
        (0, [1, 2], [1, -1]),
        (32, [1, 2], [1, 1]),
        (0, [1, 2], [1]),
        (0, [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]),
    ],
)
def test_arrays_that_are_no_state_are_refused(shift: int, keys: list[int], positives: list[int]) -> None:
    with pytest.raises(ValueError, match="not the state"):
        ScoreSketch.from_arrays(
            4, shift, np.array(keys, np.uint32), np.array(positives), np.zeros(len(keys), np.int64)
        )
