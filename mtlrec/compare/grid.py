"""What is compared: every combination of the values that vary, each with every seed, as resolved jobs."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from mtlrec.job.errors import InputError
from mtlrec.job.job import Job
from mtlrec.preflight import read_job

OURS = {"name": "each run is named after what varies", "seed": "use --seeds", "run.seeds": "use --seeds"}
"""Paths that the comparison sets itself -> what to do instead of varying them."""
MAX_NAME = 128
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
_DIGEST = 8
"""Hexadecimal digits that tell apart values which a run's name cannot spell."""


@dataclass(frozen=True)
class Variation:
    """One value for each path that varies."""

    settings: tuple[tuple[str, str], ...]
    """(path, value as YAML text), in the order in which they were given; none: the job as it is."""

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them."""
        return [f"{path}={value}" for path, value in self.settings]

    def __str__(self) -> str:
        return " ".join(self.overrides) or "the job as it is"

    def slug(self, length: int) -> str:
        """What stands for it in a run's name, of at most `length` characters (at least 8); "" for none.

        It depends on this variation alone, so that a larger grid later finds the runs of a smaller one. It
        spells the value of each path, and the path without its section, which no two sections share (but
        optimizer.tables and schema.tables, where one has numbers and the other mappings); where that is too
        long, or a part of it is no plain word, a hash of the whole is added.
        """
        if not self.settings:
            return ""
        words = [word for path, value in self.settings for word in (*(path.split(".")[1:] or [path]), value)]
        slug = "-".join(words)
        if len(slug) <= length and all(_PLAIN.fullmatch(word) for word in words):
            return slug
        start = "-".join(_UNFIT.sub("_", word).strip("_") for word in words)[: max(length - _DIGEST - 1, 0)]
        digest = hashlib.blake2b("\n".join(self.overrides).encode(), digest_size=_DIGEST // 2).hexdigest()
        return f"{start}-{digest}".lstrip("-")


@dataclass(frozen=True)
class Cell:
    """One run: a variation with a seed."""

    variation: Variation
    seed: int
    job: Job
    """Resolved, under the run's own name."""

    @property
    def name(self) -> str:
        return self.job.name


@dataclass(frozen=True)
class Grid:
    """All that is compared."""

    job: Job
    """The job before anything varies."""
    variations: tuple[Variation, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    """Every variation once before any of them twice."""


def read_grid(url: str, overrides: Sequence[str], vary: Sequence[str], seeds: str | None) -> Grid:
    """The job file at `url` with `--set` `overrides`, varied as `--vary` and `--seeds` say.

    Raises InputError for a job, path, value or seed that is wrong, naming the variation it is wrong in.
    """
    job = read_job(url, list(overrides))
    chosen = parse_seeds(seeds, job.seed) if seeds is not None else job.run.seeds or [job.seed]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"seeds {', '.join(map(str, chosen))}: one of them stands twice")
    variations = product(vary)
    cells: dict[str, Cell] = {}
    for seed in chosen:
        for variation in variations:
            end = f"-seed{seed}"
            slug = variation.slug(max(MAX_NAME - len(job.name) - len(end) - 1, _DIGEST))
            name = "-".join([job.name, *([slug] if slug else [])]) + end
            ours = [f'name="{name}"', f"seed={seed}", "run.seeds=null"]
            try:
                resolved = read_job(url, [*overrides, *variation.overrides, *ours])
            except InputError as error:
                if not variation.settings:
                    raise
                raise InputError(f"--vary {variation}: {error}") from None
            if name in cells:
                raise InputError(
                    f"--vary {variation}: would share the run {name} with another; leave one out"
                )
            cells[name] = Cell(variation, seed, resolved)
    return Grid(job, tuple(variations), tuple(chosen), tuple(cells.values()))


def product(vary: Sequence[str]) -> list[Variation]:
    """Every combination of the values of `path=v1,v2,...` options, the last path varying fastest."""
    values: dict[str, list[str]] = {}
    for option in vary:
        path, equals, text = option.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            raise InputError(f"--vary {option}: expected a.b=v1,v2, such as --vary model.backbone=mmoe,ple")
        if path in OURS:
            raise InputError(f"--vary {option}: {path} cannot vary; {OURS[path]}")
        if path in values:
            raise InputError(f"--vary {option}: {path} stands twice; give all its values in one --vary")
        try:
            values[path] = split_values(text)
        except ValueError as error:
            raise InputError(f"--vary {option}: {error}") from None
    return [
        Variation(tuple(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]


def split_values(text: str) -> list[str]:
    """The values of a YAML list written without its brackets, each as it stands in `text`.

    Commas inside brackets, braces and quotes belong to a value. Raises ValueError where it is no such list,
    or where a value stands twice.
    """
    listed = f"[{text}]"
    try:
        node = yaml.compose(listed, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise ValueError("expected YAML values with commas between, such as [32],[64, 32]")
    values = [listed[each.start_mark.index : each.end_mark.index].strip() for each in node.value]
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands twice")
    return values


def parse_seeds(text: str, first: int) -> list[int]:
    """`N`: so many seeds, from the job's own, `first`, upwards. `3,5,8` (or `3,`): these."""
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and not words[-1]:
        words.pop()
    if not all(re.fullmatch(r"[0-9]{1,19}", word) for word in words):
        raise InputError(f"--seeds {text}: expected how many, such as 3, or which ones, such as 3,5,8")
    numbers = [int(word) for word in words]
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= 1000:
        raise InputError(f"--seeds {text}: a number of seeds is 1 to 1000; write {text}, for that one seed")
    return [first + index for index in range(numbers[0])]
