"""Ranks that read different rows take every step together, and fail together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from mtlrec import watchdog
from mtlrec.batch import Batch
from mtlrec.distributed import World, all_ok, all_reduce_sum
from mtlrec.job.errors import InputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Totals:
    """What one step is over all workers."""

    amounts: torch.Tensor
    """float64 on the CPU: the sum over all workers of what was measured of their batches."""
    rows: int
    """Rows that are not padding."""
    signals: tuple[bool, ...]
    """For each signal, whether any rank raised it."""


class BrokenOff(Exception):
    """A pass over data was ended before its last row, on every rank at the same step: something is urgent."""


class Listener(Protocol):
    """What ranks tell each other while they are at something longer than a step, such as a measurement."""

    def signals(self) -> Sequence[bool]:
        """Asked on every rank before each batch."""

    def hear(self, signals: Sequence[bool]) -> None:
        """`signals`, each raised by any rank. Raises, if anything, on every rank alike: BrokenOff to end."""


def in_step(
    reader: Iterable[Batch],
    world: World,
    signals: Callable[[], Sequence[bool]] = tuple,
    measure: tuple[int, Callable[[Batch], torch.Tensor]] | None = None,
) -> Iterator[tuple[Batch, Totals, Batch | None]]:
    """Yield this rank's batches, each with its totals over all ranks, until every rank has read its last;
    and the batch after it, where every rank has one.

    `measure`: how many numbers, and the function that gives them of a batch, float64, for `Totals.amounts`.

    One small all-reduce on the CPU a step carries those, the ranks' signals and whether a rank's reader
    failed: then every rank raises that rank's InputError, instead of waiting for it in a collective.
    """
    size, amounts_of = measure or (0, lambda batch: torch.empty(0, dtype=torch.float64))
    batches = iter(reader)

    def read() -> tuple[Batch | None, str | None]:
        try:
            return next(batches, None), None
        except InputError as error:
            return None, str(error)

    batch, failure = read()
    while True:
        upcoming, next_failure = read() if batch is not None else (None, None)
        raised = [float(signal) for signal in signals()]
        rows = float(batch.num_rows) if batch is not None else 0.0
        marks = [failure is not None, batch is not None, upcoming is None]
        head = torch.tensor([*marks, rows, *raised], dtype=torch.float64)
        mine = amounts_of(batch) if batch is not None else torch.zeros(size, dtype=torch.float64)
        total = all_reduce_sum(torch.cat([head, mine]), world)
        watchdog.alive("a step's exchange")
        failures, present, last, all_rows, *flags = total[: len(head)].tolist()
        if failures > 0:
            raise InputError(all_ok(failure, world)[0])
        if present == 0:
            return
        assert batch is not None, "the order gives every rank the same number of batches"
        totals = Totals(total[len(head) :], int(all_rows), tuple(flag > 0 for flag in flags))
        yield batch, totals, upcoming if last == 0 else None
        batch, failure = upcoming, next_failure


def together(world: World, action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; an InputError on any rank is raised on all."""
    result, failure = None, None
    try:
        result = action()
    except InputError as error:
        failure = str(error)
    failures = all_ok(failure, world)
    if failures:
        raise InputError(failures[0])
    return result  # type: ignore[return-value]  # without a failure the action returned
