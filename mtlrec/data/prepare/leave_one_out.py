"""Each user's last rating for the test, the last but one for validation, among candidates: without luck.

What is drawn is a function of the ratings alone, whatever order they come in. R ratings, U users, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.ids import hash_ids

Ints = npt.NDArray[np.int64]

FEWEST_ITEMS = 3
"""Of a user whose ratings are split: one in training, one in validation, one in the test."""


@dataclass(frozen=True)
class Ratings:
    """Who rated what, how and when."""

    users: pa.StringArray
    """[U] Ids, sorted by their bytes."""
    items: pa.StringArray
    """[I] Ids, sorted by their bytes."""
    user: Ints
    """[R] Index into `users`."""
    item: Ints
    """[R] Index into `items`."""
    rating: npt.NDArray[np.float32]
    """[R]"""
    date: npt.NDArray[np.int32]
    """[R] Days since 1970."""

    def take(self, rows: npt.NDArray[Any]) -> Ratings:
        """Some of the ratings, by index or mask, in that order."""
        return Ratings(
            self.users, self.items, self.user[rows], self.item[rows], self.rating[rows], self.date[rows]
        )

    def lots(self, user: Ints, item: Ints) -> npt.NDArray[np.uint64]:
        """XXH3-64 of "user|item", the ids' texts, for each pair: decides whatever dates do not."""
        return hash_ids(pc.binary_join_element_wise(self.users.take(user), self.items.take(item), "|"))


def without_duplicates(ratings: Ratings) -> Ratings:
    """The latest rating of each (user, item); of several on that date the highest.

    Sorted by user, date and lot: a user's last row is the last one also where dates tie.
    """
    latest_last = np.lexsort((ratings.rating, ratings.date, ratings.item, ratings.user))
    found = ratings.take(latest_last)
    last = np.ones(len(latest_last), bool)
    last[:-1] = (found.user[1:] != found.user[:-1]) | (found.item[1:] != found.item[:-1])
    found = found.take(last)
    return found.take(np.lexsort((found.lots(found.user, found.item), found.date, found.user)))


def split(ratings: Ratings) -> dict[str, Ratings]:
    """What `without_duplicates` left -> train, valid and test; users of fewer than 3 items only train."""
    count = np.bincount(ratings.user, minlength=len(ratings.users))
    from_end = np.cumsum(count)[ratings.user] - 1 - np.arange(len(ratings.user))
    splits = count[ratings.user] >= FEWEST_ITEMS
    test, valid = splits & (from_end == 0), splits & (from_end == 1)
    return {
        "train": ratings.take(~(test | valid)),
        "valid": ratings.take(valid),
        "test": ratings.take(test),
    }


class Unrated:
    """Draws, for users of `ratings` (without duplicates), items that they never rated."""

    def __init__(self, ratings: Ratings) -> None:
        self._ratings = ratings
        by_item = np.lexsort((ratings.item, ratings.user))
        user, item = ratings.user[by_item], ratings.item[by_item]
        count = np.bincount(user, minlength=len(ratings.users))
        self._start = np.cumsum(count) - count
        # A user's rated items r_0 < r_1 < ...: r_i - i unrated ones stand before r_i. Users are laid end to
        # end, further apart than any such number, so that one search serves all.
        self._apart = len(ratings.items) + 1
        self._before = item - (np.arange(len(item)) - self._start[user]) + user * self._apart
        self._count = count

    def draw(self, users: Ints, purpose: str, most: int) -> Ints:
        """[len(users), most] distinct items of each user, int64, every set of them as likely as any other.

        Users with fewer unrated items get all of those, and -1 behind them. Floyd's algorithm (Bentley and
        Floyd 1987): for j = n - m, ..., n - 1 of n unrated items in the order of their ids, take number
        t = splitmix64(XXH3-64("user|purpose") + (j - n + m)) % (j + 1), or j where t has been taken.
        """
        unrated = len(self._ratings.items) - self._count[users]
        drawn = np.minimum(unrated, most)
        texts = pc.binary_join_element_wise(self._ratings.users.take(users), purpose, "|")
        base = hash_ids(texts)
        numbers = np.full((len(users), most), -1, np.int64)
        for step in range(most):
            j = unrated - drawn + step
            t = (hash_ids(base + np.uint64(step)) % (j + 1).astype(np.uint64)).astype(np.int64)
            taken = (numbers[:, :step] == t[:, None]).any(axis=1)
            numbers[:, step] = np.where(step < drawn, np.where(taken, j, t), -1)
        at = numbers + (users * self._apart)[:, None]
        passed = np.searchsorted(self._before, at.ravel(), side="right").reshape(at.shape)
        return np.where(numbers >= 0, numbers + passed - self._start[users][:, None], -1)


def candidates(positives: Ratings, unrated: Unrated, purpose: str, most: int) -> dict[str, npt.NDArray[Any]]:
    """Each positive among up to `most` items that its user never rated: user, item, positive, rating, date.

    Arrays of one length: by user, and within a user by lot, so that no place is the positive's. `positive`
    is a mask; `rating` and `date` are the positive's, throughout.
    """
    drawn = unrated.draw(positives.user, purpose, most)
    item = np.concatenate([positives.item[:, None], drawn], axis=1)
    user = np.broadcast_to(positives.user[:, None], item.shape)
    place = np.broadcast_to(np.arange(len(positives.user))[:, None], item.shape)
    positive = np.zeros(item.shape, bool)
    positive[:, 0] = True
    there = item >= 0
    user, item, place, positive = user[there], item[there], place[there], positive[there]
    order = np.lexsort((positives.lots(user, item), user))
    user, item, place, positive = user[order], item[order], place[order], positive[order]
    return {
        "user": user,
        "item": item,
        "positive": positive,
        "rating": positives.rating[place],
        "date": positives.date[place],
    }
