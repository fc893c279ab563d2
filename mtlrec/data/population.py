"""The invented world behind the synthetic data: who meets what, where, and what comes of it.

B rows of a block, S scenarios, V ids in the histories of a block.

Nothing is stored per user or per item: every latent number is looked up by a 64-bit hash of (seed, meaning,
id), so that a population of any size takes the same memory. A block of rows is a pure function of the
population and the block's place. docs/synthetic.md has the model in formulas.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

HOURS, CATEGORIES, CITIES, CAMPAIGNS = 24, 40, 500, 10_000
DEVICES = ("phone", "laptop", "tablet", "television", "console", "watch")
SIGNALS = 4
LONGEST_HISTORY = 16

# Standard deviation over rows of each part of the logit of a click.
SHARED, SPECIFIC = 1.15, 0.75
HOUR, DEVICE, CITY, CAMPAIGN = 0.12, 0.12, 0.15, 0.12
PRICE, RECENCY, AGE, SIGNAL = 0.2, 0.15, 0.15, 0.2

_LEANING = 0.2
"""Mean of every factor. Above 0 some users like, and some items are liked, more than others."""
_FACTORS = 2
"""Factors of a user and of an item that all scenarios share; each scenario has one more of its own."""
_LEVEL_BITS = 4
"""The histories know each shared factor of a user to one of 2**4 levels, equally common."""
_TASTES = 2 ** (_LEVEL_BITS * _FACTORS)
_SHELF = 1024
"""Items that the histories of one taste are made of."""
_CANDIDATES = 8
"""A place on a shelf goes to one of so many popular items, by taste."""
_PAST = 64
"""Places in a user's past where the history of a row may begin."""
_ROW_WORDS = 8
"""64-bit random words that a row uses."""
_DRAWS = 2**16
"""Skewed and normal numbers come from tables with an entry for each 16-bit draw."""


@dataclass(frozen=True)
class Block:
    """B rows, in columns."""

    scenario: Ints
    user: Ints
    item: Ints
    category: NDArray[np.int32]
    hour: NDArray[np.int32]
    device: NDArray[np.int32]
    """Index into `DEVICES`."""
    city: NDArray[np.int32]
    """Index into the cities."""
    campaign: Ints
    history: Ints
    """[V]"""
    history_ends: Ints
    """[B], where the ids of each row end in `history`."""
    has_history: NDArray[np.bool_]
    price: Floats
    has_price: NDArray[np.bool_]
    recency: Floats
    """Days."""
    age: NDArray[np.int32]
    has_age: NDArray[np.bool_]
    signals: Floats
    """[B, SIGNALS]"""
    truth: Floats
    """[B, 3]: the logits of a click, and of a buy given a click; the mean of the rating given a buy."""
    labels: Floats
    """[B, 3]: click, buy, rating."""
    valid: NDArray[np.bool_]
    """[B, 3]: every row has a click, clicked rows a buy, bought rows a rating."""


class Population:
    """Users, items and scenarios that follow from one seed."""

    def __init__(self, users: int, items: int, scenarios: int, seed: int) -> None:
        """`users` and `items`: at most 2**31 of each."""
        self.users, self.items, self.scenarios, self._seed = users, items, scenarios, seed
        index = np.arange(scenarios)
        sizes = (index + 1.0) ** -0.8
        self._scenario_ends = (np.cumsum(sizes / sizes.sum())[:-1] * 2.0**32).astype(np.uint64)
        self._scenario_key = self._mix(self._key("scenario"), index)
        self._click_bias = -1.2 + 0.35 * self._normals("click bias", index)[:, 0]
        self._buy_bias = -0.8 + 0.25 * self._normals("buy bias", index)[:, 0]
        # A user's and an item's id say nothing of how popular they are.
        self._user_step, self._user_start = self._permutation("user", users)
        orders = [self._permutation("item", items)]
        orders += [self._permutation(f"item {s}", items) for s in range(scenarios)]
        self._item_step, self._item_start = np.array(orders).T
        # Standardised: 40 draws leave a mean that would pass for popularity.
        self._centres = _standard(self._normals("category", np.arange(CATEGORIES))[:, :_FACTORS].T).T
        # Each scenario asks for another side of the shared factors: directions spread by the golden angle,
        # one for users and the one across it for items, so that the two do not repeat the shared match.
        side = np.stack([np.cos(2.4 * index), np.sin(2.4 * index)], axis=1).astype(np.float32)
        self._user_side, self._item_side = side, side[:, ::-1] * np.array([-1, 1], np.float32)
        self._describe_context()
        self._shelves = self._fill_shelves()

    def _describe_context(self) -> None:
        """Tables of what context looks like, by 16-bit draw, and of what it does, by scenario."""
        index = np.arange(self.scenarios)
        draws = (np.arange(_DRAWS) + 0.5) / _DRAWS
        self._device_of = _skewed(draws, len(DEVICES), 1.0, 1.0).astype(np.int32)
        self._city_of = _skewed(draws, CITIES, 1.0, 10.0).astype(np.int32)
        self._campaign_of = _skewed(draws, CAMPAIGNS, 0.7, 10.0)
        phase = self._normals("hour", index)[:, :1]
        self._hour_effect = HOUR * _standard(np.sin(np.arange(HOURS) * (math.tau / HOURS) + 4 * phase))
        device = self._normals("device", self._pairs(len(DEVICES)))[..., 0]
        self._device_effect = DEVICE * _standard(device, self._device_of)
        city = self._normals("city", self._pairs(CITIES))[..., 0]
        self._city_effect = CITY * _standard(city, self._city_of)
        campaign = self._normals("campaign", np.arange(CAMPAIGNS))[None, :, 0]
        self._campaign_effect = CAMPAIGN * _standard(campaign, self._campaign_of)[0]
        self._recency_of = (-7 * np.log1p(-draws)).astype(np.float32)
        self._recency_effect = RECENCY * _standard(-np.log1p(self._recency_of)[None])[0]
        self._age_of = (18 + 62 * draws**1.5).astype(np.int32)
        self._age_effect = AGE * _standard(np.cos((self._age_of - 35) / 12)[None])[0]
        towards = self._normals("signals", np.zeros(1, np.int64))[0]
        self._signal_effect = SIGNAL * towards / np.sqrt((towards**2).sum())

    def block(self, *place: str | int, rows: int) -> Block:
        """The rows of the block at `place` (such as split, shard, row group)."""
        words = _random_words(self._seed, "rows", *place, count=rows * _ROW_WORDS).reshape(_ROW_WORDS, rows)
        parts = words.view(np.uint16).reshape(_ROW_WORDS, rows, 4)
        normal = _normal_of()
        high = np.uint64(32)
        scenario = np.searchsorted(self._scenario_ends, words[2] >> high, side="right")
        user = self._draw_users(words[0])
        item = self._draw_items(words[1], scenario)

        user_parts = self._hash("user", user)
        user_factors = normal[user_parts]
        item_factors = normal[self._hash("item", item)]
        category, item_shared, item_price = self._describe(item, item_factors)
        here = self._scenario_key[scenario]
        match = _match(user_factors[:, :_FACTORS], item_shared)
        user_here = _dot(user_factors[:, :_FACTORS], self._user_side[scenario])
        user_here += self._normals("user here", user, here)[:, 0]
        item_here = _dot(item_shared, self._item_side[scenario])
        item_here += self._normals("item here", item, here)[:, 0]
        match_here = _match(
            *(factor[:, None] / np.float32(math.sqrt(2)) for factor in (user_here, item_here))
        )
        match_buy = _match(user_factors[:, 2:3], item_factors[:, 2:3])

        hour = (parts[2, :, 0].astype(np.int32) * HOURS) >> 16
        device = self._device_of[parts[2, :, 1]]
        user_place = self._hash("user place", user)
        city = self._city_of[user_place[:, 0]]
        campaign = self._campaign_of[parts[3, :, 2]]
        expensive = 0.8 * item_price + 0.6 * normal[parts[4, :, 0]]
        has_price = parts[3, :, 3] >= _DRAWS // 50
        expensive *= has_price
        has_age = user_place[:, 2] >= _DRAWS // 20
        age_effect = self._age_effect[user_place[:, 1]] * has_age
        signals = normal[parts[7]]

        click = self._click_bias[scenario] + SHARED * match + SPECIFIC * match_here
        click += self._hour_effect[scenario, hour] + self._device_effect[scenario, device]
        click += self._city_effect[scenario, city] + self._campaign_effect[campaign]
        click += self._recency_effect[parts[4, :, 1]] + age_effect - PRICE * expensive
        click += _dot(signals, self._signal_effect)
        buy = self._buy_bias[scenario] + 0.7 * match + 0.5 * match_here + 0.7 * match_buy
        buy += 0.3 * user_factors[:, 3] - 0.5 * expensive + 2 * age_effect
        liking = 0.6 + 0.5 * match + 0.5 * match_buy + 0.5 * user_factors[:, 3] + 0.5 * item_factors[:, 3]
        # Rounded to the resolution of the draws, so that it is the chance to the bit.
        liked = np.rint(_sigmoid(liking) * _DRAWS)

        truth = np.empty((rows, 3), np.float32)
        truth[:, 0], truth[:, 1], truth[:, 2] = click, buy, 1 + 4 * liked / _DRAWS
        clicked = (words[5] >> high) < _sigmoid(truth[:, 0]) * 2.0**32
        bought = clicked & ((words[5] & np.uint64(2**32 - 1)) < _sigmoid(truth[:, 1]) * 2.0**32)
        stars = 1 + np.count_nonzero(parts[6] < liked[:, None], axis=1)
        labels = np.stack([clicked, bought, stars], axis=1).astype(np.float32)
        valid = np.stack([np.ones(rows, bool), clicked, bought], axis=1)

        has_history = parts[3, :, 0] >= _DRAWS // 50
        lengths = (1 + ((parts[3, :, 0].astype(np.int64) * LONGEST_HISTORY) >> 16)) * has_history
        start = (parts[3, :, 1].astype(np.int64) * _PAST) >> 16
        history, ends = self._histories(user, user_parts, start, lengths)
        return Block(
            scenario=scenario,
            user=user,
            item=item,
            category=category,
            hour=hour,
            device=device,
            city=city,
            campaign=campaign,
            history=history,
            history_ends=ends,
            has_history=has_history,
            price=np.exp(2.5 + 0.8 * expensive.astype(np.float64)).astype(np.float32),
            has_price=has_price,
            recency=self._recency_of[parts[4, :, 1]],
            age=self._age_of[user_place[:, 1]],
            has_age=has_age,
            signals=signals,
            truth=truth,
            labels=labels,
            valid=valid,
        )

    def _draw_users(self, words: Words) -> Ints:
        rank = _skewed(_unit(words), self.users, 0.75, 10.0)
        return (rank * self._user_step + self._user_start) % self.users

    def _draw_items(self, words: Words, scenario: Ints | None) -> Ints:
        """Half of the rows by the popularity that all scenarios share, half by their own."""
        rank = _skewed(_unit(words), self.items, 1.0, 20.0)
        if scenario is None:
            return (rank * self._item_step[0] + self._item_start[0]) % self.items
        # `_unit` reads the upper 53 bits, so that the lowest is free.
        order = (words & np.uint64(1)).astype(np.int64) * (scenario + 1)
        return (rank * self._item_step[order] + self._item_start[order]) % self.items

    def _describe(self, item: Ints, factors: Floats) -> tuple[NDArray[np.int32], Floats, Floats]:
        """Category [B], shared factors [B, _FACTORS] (the category's and its own) and price [B] of items."""
        drawn = self._hash("item category", item)
        category = ((drawn[:, 3].astype(np.int32) * CATEGORIES) >> 16).astype(np.int32)
        shared = np.float32(math.sqrt(0.6)) * factors[:, :_FACTORS]
        shared += np.float32(math.sqrt(0.4)) * self._centres[category]
        return category, shared, _normal_of()[drawn[:, 0]]

    def _histories(
        self, user: Ints, user_parts: NDArray[np.uint16], start: Ints, lengths: Ints
    ) -> tuple[Ints, Ints]:
        """Ids [V] and where each row's end [B]: `lengths` items of each user's past, from `start` on."""
        levels = (user_parts[:, :_FACTORS] >> (16 - _LEVEL_BITS)).astype(np.int64)
        taste = (levels[:, 0] << _LEVEL_BITS) + levels[:, 1]
        ends = np.cumsum(lengths)
        step = np.arange(ends[-1]) + np.repeat(start - (ends - lengths), lengths)
        seen = self._mix(np.repeat(self._mix(self._key("past"), user), lengths), step)
        place = (seen & np.uint64(_SHELF - 1)).astype(np.int64)
        place += np.repeat(taste * _SHELF, lengths)
        return self._shelves[place], ends

    def _fill_shelves(self) -> Ints:
        """[_TASTES * _SHELF] items: popular ones, preferred as a user of the taste would."""
        middles = (np.arange(2**_LEVEL_BITS) + 0.5) / 2**_LEVEL_BITS
        levels = np.array([NormalDist().inv_cdf(middle) for middle in middles], np.float32)
        tastes = np.stack(np.meshgrid(*[levels] * _FACTORS, indexing="ij"), axis=-1).reshape(
            _TASTES, _FACTORS
        )
        shelves = []
        for number, taste in enumerate(tastes):
            words = _random_words(self._seed, "shelf", number, count=2 * _SHELF * _CANDIDATES).reshape(2, -1)
            items = self._draw_items(words[0], None)
            _, factors, _ = self._describe(items, self._normals("item", items))
            # The largest of values with Gumbel noise is a draw in proportion to exp(value).
            value = 1.2 * _dot(factors, taste) - np.log(-np.log(_unit(words[1])))
            best = np.argmax(value.reshape(_SHELF, _CANDIDATES), axis=1)
            shelves.append(items.reshape(_SHELF, _CANDIDATES)[np.arange(_SHELF), best])
        return np.concatenate(shelves)

    def _permutation(self, meaning: str, count: int) -> tuple[int, int]:
        """(step, start) of rank -> (rank * step + start) % count, which meets every id once."""
        step = (self._key(meaning + " step") % count) | 1
        while math.gcd(step, count) != 1:
            step += 2
        return step, self._key(meaning + " start") % count

    def _pairs(self, count: int) -> Ints:
        """[S, count], a number of its own for each scenario and value."""
        return np.arange(self.scenarios * count).reshape(self.scenarios, count)

    def _key(self, meaning: str) -> int:
        return _key(self._seed, meaning) & (2**64 - 1)

    def _normals(self, meaning: str, ids: Ints, key: Words | None = None) -> Floats:
        """[..., 4] standard normal numbers of each id (and key)."""
        return _normal_of()[self._hash(meaning, ids, key)]

    def _hash(self, meaning: str, ids: Ints, key: Words | None = None) -> NDArray[np.uint16]:
        """[..., 4] 16-bit draws of each id (and key)."""
        seed = self._key(meaning)
        words = self._mix(seed if key is None else key ^ np.uint64(seed), ids)
        return words.view(np.uint16).reshape(*ids.shape, 4)

    @staticmethod
    def _mix(key: int | Words, ids: Ints) -> Words:
        """A well mixed word for each (key, id): the steps of splitmix64 (Steele, Lea and Flood 2014)."""
        words = ids.astype(np.uint64)
        words *= np.uint64(0x9E3779B97F4A7C15)
        words += np.uint64(key) if isinstance(key, int) else key
        words ^= words >> np.uint64(30)
        words *= np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(27)
        words *= np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
        return words


@cache
def _normal_of() -> Floats:
    """[_DRAWS] standard normal quantiles: draw i stands for the probability (i + 1/2) / _DRAWS."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / _DRAWS) for i in range(_DRAWS)], np.float32)


def _key(*parts: str | int) -> int:
    text = "|".join(map(str, ("synthetic", *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _random_words(*parts: str | int, count: int) -> Words:
    """Raw Philox words: the same for every version of numpy, which its distributions are not."""
    return np.random.Philox(key=_key(*parts)).random_raw(count)


def _unit(words: Words) -> NDArray[np.float64]:
    """Uniform in (0, 1) from the upper 53 bits."""
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _skewed(draws: NDArray[np.float64], count: int, exponent: float, shift: float) -> Ints:
    """Ranks 0..count-1 with density in proportion to (rank + shift)**-exponent (Zipf-Mandelbrot)."""
    low, high = shift, shift + count
    if exponent == 1:
        spread = low * (high / low) ** draws
    else:
        power = 1 - exponent
        spread = (low**power + draws * (high**power - low**power)) ** (1 / power)
    return np.clip((spread - low).astype(np.int64), 0, count - 1)


def _standard(effect: NDArray[np.floating], chosen: NDArray[np.integer] | None = None) -> Floats:
    """`effect` [S, values] with mean 0 and deviation 1 in each row, values weighing as often as `chosen`."""
    drawn = effect if chosen is None else effect[:, chosen]
    mean, deviation = drawn.mean(axis=1, keepdims=True), drawn.std(axis=1, keepdims=True)
    return ((effect - mean) / deviation).astype(np.float32)


def _dot(one: Floats, other: Floats) -> Floats:
    """Sum over the last axis, term by term: the same on every machine, which a product of matrices is not."""
    total = one[:, 0] * other[..., 0]
    for k in range(1, one.shape[1]):
        total += one[:, k] * other[..., k]
    return total


def _match(one: Floats, other: Floats) -> Floats:
    """How well standard normal factors [B, factors] of user and item go together: mean 0, deviation 1."""
    count = one.shape[1]
    product = _dot(one + np.float32(_LEANING), other + np.float32(_LEANING))
    scale = math.sqrt(count * (1 + 2 * _LEANING**2))
    return (product - np.float32(count * _LEANING**2)) / np.float32(scale)


def _sigmoid(logits: Floats) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
