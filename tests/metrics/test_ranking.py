from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from mtlrec.metrics.ranking import rank_groups


def plain(groups: list[int], scores: list[float], positive: list[bool], ties: list[int], k: int) -> dict:
    """The metrics as their definitions read, one group after the other."""
    found: dict = {name: [] for name in ("auc", "ndcg", "recall", "hit", "mrr")}
    weights = []
    for group in sorted(set(groups)):
        rows = sorted(
            (-s, t, p) for g, s, p, t in zip(groups, scores, positive, ties, strict=True) if g == group
        )
        good = [-s for s, _, p in rows if p]
        bad = [-s for s, _, p in rows if not p]
        if good and bad:
            won = sum((a > b) + 0.5 * (a == b) for a in good for b in bad)
            found["auc"].append(won / (len(good) * len(bad)))
            weights.append(len(rows))
        if not good:
            continue
        ranks = [rank for rank, (_, _, p) in enumerate(rows, start=1) if p]
        gained = sum(1 / np.log2(rank + 1) for rank in ranks if rank <= k)
        best = sum(1 / np.log2(rank + 1) for rank in range(1, min(k, len(good)) + 1))
        found["ndcg"].append(gained / best)
        found["recall"].append(sum(rank <= k for rank in ranks) / len(ranks))
        found["hit"].append(float(ranks[0] <= k))
        found["mrr"].append(1 / ranks[0])
    means = {f"{name}@{k}": found[name] for name in ("ndcg", "recall", "hit")} | {"mrr": found["mrr"]}
    return {
        "gauc": np.average(found["auc"], weights=weights) if weights else None,
        **{name: np.mean(values) if values else None for name, values in means.items()},
        "groups": len(found["mrr"]),
    }


@given(
    data=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]), st.booleans()),
        max_size=40,
    ),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 5),
)
def test_agrees_with_a_plain_loop(data: list[tuple[int, float, bool]], seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, 6, dtype=np.uint64)
    groups = hashes[np.array([group for group, _, _ in data], dtype=np.int64)]
    scores = np.array([score for _, score, _ in data], np.float32)
    positive = np.array([each for _, _, each in data], bool)
    # Far fewer ties than rows would need to be told apart: the leading bits of hashes are often alike.
    ties = random.permutation(len(data)).astype(np.uint64) << np.uint64(random.integers(0, 50))
    found = rank_groups(groups, scores, positive, ties, k).summary(k)
    expected = plain(groups.tolist(), scores.tolist(), positive.tolist(), ties.tolist(), k)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-12)), name


def test_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(200, 30)).astype(np.float32)
    positive = random.random((200, 30)) < random.uniform(0, 0.4, (200, 1))
    users = random.integers(0, 2**64, 200, dtype=np.uint64)
    order = random.permutation(6000)
    ties = random.permutation(6000).astype(np.uint64)
    groups = np.repeat(users, 30)
    found = rank_groups(groups[order], scores.ravel()[order], positive.ravel()[order], ties, 10).summary(10)
    ranked = positive.any(axis=1)
    both = ranked & ~positive.all(axis=1)
    areas = [roc_auc_score(p, s) for p, s in zip(positive[both], scores[both], strict=True)]
    assert found["groups"] == ranked.sum()
    assert found["gauc"] == pytest.approx(np.mean(areas))  # as many rows each: all weigh the same
    assert found["ndcg@10"] == pytest.approx(ndcg_score(positive[ranked], scores[ranked], k=10))


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 200))
def test_the_order_of_the_rows_changes_nothing(seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    groups = random.integers(0, 2**64, 9, dtype=np.uint64)[random.integers(0, 9, rows)]
    scores = random.integers(0, 4, rows).astype(np.float32)
    positive, ties = random.random(rows) < 0.3, random.permutation(rows).astype(np.uint64)
    order = random.permutation(rows)
    ranked = rank_groups(groups, scores, positive, ties, 3)
    again = rank_groups(groups[order], scores[order], positive[order], ties[order], 3)
    assert ranked.summary(3) == again.summary(3)


def test_a_constant_model_scores_as_chance() -> None:
    random = np.random.default_rng(1)
    # One positive, always the first of 20 candidates in the file.
    groups = np.repeat(random.integers(0, 2**64, 3000, dtype=np.uint64), 20)
    positive = np.arange(60_000) % 20 == 0
    ties = random.integers(0, 2**64, 60_000, dtype=np.uint64)
    found = rank_groups(groups, np.zeros(60_000, np.float32), positive, ties, 10).summary(10)
    assert found["gauc"] == 0.5
    assert found["hit@10"] == pytest.approx(0.5, abs=0.03)
    assert found["mrr"] == pytest.approx(np.mean(1 / np.arange(1, 21)), abs=0.01)


def test_scores_that_differ_in_their_last_bits_are_told_apart() -> None:
    scores = (1 + np.arange(64, dtype=np.float32) * np.float32(2**-23))[::-1].copy()
    for at in (0, 31, 63):
        positive = np.arange(64) == at
        ties = np.arange(64, dtype=np.uint64)[::-1].copy()
        found = rank_groups(np.full(64, 7, np.uint64), scores, positive, ties, 10).summary(10)
        assert found["mrr"] == 1 / (at + 1)
        assert found["gauc"] == (63 - at) / 63


def test_groups_that_differ_in_their_last_bits_are_told_apart() -> None:
    random = np.random.default_rng(2)
    # The index of a row takes the place of those bits at first.
    hashes = np.array([1, 2, 2**63, 2**63 + 1, 2**64 - 1], np.uint64)
    groups = random.integers(0, 5, 300)
    scores, positive = random.normal(size=300).astype(np.float32), random.random(300) < 0.3
    ties = np.arange(300, dtype=np.uint64)
    found = rank_groups(hashes[groups], scores, positive, ties, 3).summary(3)
    expected = plain(groups.tolist(), scores.tolist(), positive.tolist(), ties.tolist(), 3)
    assert found == pytest.approx(expected, rel=1e-12)


def test_k_must_be_positive() -> None:
    empty = np.zeros(0, np.uint64)
    with pytest.raises(ValueError, match="below 1"):
        rank_groups(empty, np.zeros(0, np.float32), np.zeros(0, bool), empty, 0)
