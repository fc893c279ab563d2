"""The order of the samples as a pure function. L lanes, W workers, b rows of a lane in every step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlrec.data.order import (
    Position,
    Segment,
    advance,
    build_lanes,
    check_position,
    fills,
    groups_order,
    lane_rows,
    steps_left,
    stride,
    window_permutation,
    window_span,
    worker_lanes,
)
from mtlrec.job.errors import InputError


@dataclass(frozen=True)
class Case:
    groups: tuple[int, ...]
    lanes: int
    window: int
    b: int
    epochs: int
    seed: int = 3


cases = st.builds(
    Case,
    groups=st.lists(st.integers(1, 12), min_size=1, max_size=9).map(tuple),
    lanes=st.integers(1, 7),
    window=st.integers(1, 9),
    b=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)


def lane_sequence(case: Case, epoch: int, lane: int) -> list[int]:
    """Rows of a lane in the order they are trained, straight from the contract's words."""
    order = groups_order(len(case.groups), "data", case.seed, epoch)
    starts = np.cumsum((0, *case.groups))
    listed = [int(starts[group]) + row for group in order for row in range(case.groups[group])]
    mine = listed[lane * len(listed) // case.lanes : (lane + 1) * len(listed) // case.lanes]
    sequence: list[int] = []
    size = -(-case.window * (lane + 1) // case.lanes)  # the first window is cut, by lane
    index = 0
    while mine:
        here, mine = mine[:size], mine[size:]
        sequence += [here[i] for i in window_permutation("data", case.seed, epoch, lane, index, len(here))]
        size, index = case.window, index + 1
    return sequence


def steps(case: Case, rank: int = 0, world_size: int = 1, position: Position | None = None):
    """[(rows of this rank's batch, position behind it)], as a reader makes them from lanes and fills."""
    group_rows = np.array(case.groups)
    starts = np.cumsum(group_rows) - group_rows
    rows = lane_rows(int(group_rows.sum()), case.lanes)
    position = position or Position.start(case.lanes)
    served = worker_lanes(case.lanes, rank, world_size)
    wanted = fills(rows, served, case.window, position, case.epochs, case.b)
    rest: dict[int, list[int]] = {lane: [] for lane in served}
    found = []
    while position.epoch < case.epochs:
        order = groups_order(len(case.groups), "data", case.seed, position.epoch)
        lanes = build_lanes(group_rows, order, case.lanes)
        assert tuple(lane.rows for lane in lanes) == rows
        batch = []
        for lane in served:
            missing = min(case.b, rows[lane] - position.done[lane])
            while len(rest[lane]) < missing:
                fill = next(wanted)
                assert (fill.epoch, fill.lane) == (position.epoch, lane), "windows come when they are needed"
                window = [
                    int(starts[group]) + row
                    for group, begin, end in lanes[lane].cut(fill.begin, fill.end)
                    for row in range(begin, end)
                ]
                shuffled = window_permutation("data", case.seed, fill.epoch, lane, fill.window, len(window))
                rest[lane] += [window[i] for i in shuffled][fill.done :]
            batch += rest[lane][:missing]
            rest[lane] = rest[lane][missing:]
        position = advance(position, rows, case.b)
        found.append((batch, position))
    assert next(wanted, None) is None
    return found


@given(cases)
def test_lanes_follow_the_contract_and_every_row_comes_once_an_epoch(case):
    found = steps(case)
    num_rows = sum(case.groups)
    rows = lane_rows(num_rows, case.lanes)
    trained = [row for batch, _ in found for row in batch]
    assert len(trained) == num_rows * case.epochs
    at = 0
    for epoch in range(case.epochs):
        assert sorted(trained[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
        lanes = [lane_sequence(case, epoch, lane) for lane in range(case.lanes)]
        for step in range(steps_left(rows, (0,) * case.lanes, case.b)):
            taken = [row for lane in lanes for row in lane[step * case.b : (step + 1) * case.b]]
            assert found[at][0] == taken
            at += 1
    assert at == len(found)


@given(cases, st.integers(1, 9))
def test_any_number_of_workers_trains_the_same_steps(case, world_size):
    ranks = [steps(case, rank, world_size) for rank in range(world_size)]
    alone = steps(case)
    assert {len(each) for each in ranks} == {len(alone)}
    for at, (batch, position) in enumerate(alone):
        assert [row for each in ranks for row in each[at][0]] == batch
        assert {each[at][1] for each in ranks} == {position}
        width = stride(case.lanes, world_size, case.b)
        assert all(len(each[at][0]) <= width for each in ranks)


@settings(max_examples=40)
@given(cases, st.integers(1, 3))
def test_going_on_after_any_step_gives_the_identical_tail(case, world_size):
    rank = world_size - 1
    whole = steps(case, rank, world_size)
    for at, (_, position) in enumerate(whole):
        assert steps(case, rank, world_size, position) == whole[at + 1 :]


@given(cases, st.integers(1, 5), st.data())
def test_a_position_outlives_a_changed_batch_size(case, b, data):
    before = steps(case)
    at = data.draw(st.integers(1, len(before)))
    position = before[at - 1][1]
    after = steps(replace(case, b=b), position=position)
    trained = [row for batch, _ in (*before[:at], *after) for row in batch]
    assert Counter(trained) == Counter(dict.fromkeys(range(sum(case.groups)), case.epochs))
    # Each lane goes on in its own sequence, whatever the batch size was.
    if position.epoch < case.epochs:
        rows = lane_rows(sum(case.groups), case.lanes)
        now = position.done
        batch, _ = after[0]
        expected = []
        for lane in range(case.lanes):
            expected += lane_sequence(case, position.epoch, lane)[now[lane] : min(now[lane] + b, rows[lane])]
        assert batch == expected


@given(cases)
def test_lanes_cost_at_most_lanes_less_one_extra_reads(case):
    lanes = build_lanes(np.array(case.groups), groups_order(len(case.groups), "data", 1, 0), case.lanes)
    assert sum(len(lane.segments) for lane in lanes) <= len(case.groups) + case.lanes - 1


@given(st.integers(1, 40), st.integers(1, 50))
def test_worker_lanes_share_out_all_lanes(lanes, world_size):
    served = [worker_lanes(lanes, rank, world_size) for rank in range(world_size)]
    assert [lane for each in served for lane in each] == list(range(lanes))
    assert max(len(each) for each in served) == stride(lanes, world_size, 1)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5), st.integers(1, 7))
def test_steps_left_counts_the_advances_to_the_next_epoch(lanes, b):
    rows = tuple(max(pair) for pair in lanes)
    position = Position(2, 5, tuple(min(pair) for pair in lanes))
    left = steps_left(rows, position.done, b)
    for _ in range(left):
        assert position.epoch == 5
        position = advance(position, rows, b)
    assert left == 0 or position == Position(2, 6, (0,) * len(rows))


def test_empty_row_groups_belong_to_no_lane():
    lanes = build_lanes(np.array([0, 3, 0, 2, 0]), np.arange(5), 2)
    assert [lane.segments for lane in lanes] == [
        (Segment(1, 0, 2),),
        (Segment(1, 2, 3), Segment(3, 0, 2)),
    ]


def test_cut_follows_the_segments():
    lane = build_lanes(np.array([4, 3, 5]), np.array([2, 0, 1]), 1)[0]
    assert lane.cut(3, 10) == [Segment(2, 3, 5), Segment(0, 0, 4), Segment(1, 0, 1)]
    assert lane.cut(5, 9) == [Segment(0, 0, 4)]
    assert lane.cut(12, 12) == []


def test_windows_of_lanes_end_in_different_steps():
    rows = lane_rows(160_000, 16)
    needed = Counter(
        fill.step for fill in fills(rows, range(16), 1600, Position.start(16), 1, 10) if fill.window > 0
    )
    assert len(needed) > 90 and set(needed.values()) == {1}


def test_first_windows_grow_from_lane_to_lane():
    assert [window_span(lane, 4, 10, 100, 0) for lane in range(4)] == [(0, 3), (0, 5), (0, 8), (0, 10)]
    assert [window_span(0, 4, 10, 21, index) for index in range(3)] == [(0, 3), (3, 13), (13, 21)]


def test_every_order_of_a_window_is_as_likely_as_any_other():
    counts = Counter(
        tuple(window_permutation("data", 1, epoch, lane, 0, 3)) for epoch in range(60) for lane in range(100)
    )
    assert len(counts) == 6
    # Of 6,000 draws; the standard deviation is 29.
    assert all(abs(count - 1000) < 120 for count in counts.values())


def test_every_part_of_the_key_changes_the_order():
    seen = [
        window_permutation(fingerprint, seed, epoch, lane, window, 64).tobytes()
        for fingerprint in ("a", "b")
        for seed in (0, 1)
        for epoch in (0, 1)
        for lane in (0, 1)
        for window in (0, 1)
    ]
    assert len(set(seen)) == 32
    groups = {groups_order(64, f, s, e).tobytes() for f in ("a", "b") for s in (0, 1) for e in (0, 1)}
    assert len(groups) == 8


def test_the_order_is_pinned():
    """A change here changes the order of every run: a checkpoint would go on in another one."""
    assert groups_order(8, "0123abcd", 7, 2).tolist() == [6, 0, 3, 1, 4, 7, 5, 2]
    window = window_permutation("0123abcd", 7, 2, 3, 1, 12)
    assert window.tolist() == [6, 1, 5, 0, 8, 9, 7, 10, 11, 2, 4, 3]
    assert groups_order(0, "0123abcd", 7, 2).tolist() == []
    assert groups_order(1, "0123abcd", 7, 2).tolist() == [0]


def test_a_position_goes_through_json():
    position = Position(1, 4, (10, 0, 7))
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position
    assert Position.start(3) == Position(0, 0, (0, 0, 0))


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"epoch": 0, "done": [0]},
        {"generation": 0, "epoch": 0, "done": 3},
        {"generation": 0, "epoch": -1, "done": [0]},
        {"generation": 0, "epoch": 0, "done": [1.5]},
        {"generation": True, "epoch": 0, "done": [1]},
        {"generation": 0, "epoch": 0, "done": [0], "more": 1},
    ],
)
def test_what_is_no_position_is_refused(value):
    with pytest.raises(InputError, match=r"^manifest\.json: .*position"):
        Position.from_json(value, "manifest.json")


def test_a_position_of_other_data_is_refused():
    check_position(Position(0, 0, (3, 4)), (3, 4))
    with pytest.raises(InputError, match="counts 2 lanes and the job has 3"):
        check_position(Position(0, 0, (3, 4)), (3, 4, 5))
    with pytest.raises(InputError, match="lane 1 has 5 rows done of 4"):
        check_position(Position(0, 0, (3, 5)), (3, 4))
