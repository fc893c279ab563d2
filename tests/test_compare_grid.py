"""What a comparison is asked for: values are read as YAML reads them, names of runs spell what varies."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mtlrec.compare.grid import Variation, parse_seeds, product, split_values
from mtlrec.job.errors import InputError

words = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), max_size=8)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([0.5, 1e-3, 2.0]), words)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5
)


@given(st.lists(values, min_size=1, max_size=4, unique_by=json.dumps))
def test_values_are_split_where_yaml_would(asked: list[Any]) -> None:
    """JSON is YAML: whatever commas, brackets and quotes are inside, the values come back."""
    found = split_values(",".join(json.dumps(value) for value in asked))
    assert [yaml.safe_load(value) for value in found] == asked


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("shared_bottom,mmoe, ple", ["shared_bottom", "mmoe", "ple"]),
        ("{kind: mmoe, experts: 4},ple", ["{kind: mmoe, experts: 4}", "ple"]),
        ("[32],[64,32]", ["[32]", "[64,32]"]),
        ("'a,b',it's,null", ["'a,b'", "it's", "null"]),
        ("s3://one/a,/two", ["s3://one/a", "/two"]),
        ("1e-3,", ["1e-3"]),
    ],
)
def test_values_stand_as_they_were_written(text: str, found: list[str]) -> None:
    assert split_values(text) == found


@pytest.mark.parametrize("text", ["", "a,,b", "[1,2", "a],[b", "{a", "'a", "a,b,a", "a #b,c"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--vary model\.dim="):
        product([f"model.dim={text}"])


@pytest.mark.parametrize(
    "option", ["model.dim", "=3", "model..dim=3", "name=a,b", "seed=1,2", "run.seeds=[1]"]
)
def test_a_wrong_vary_is_named(option: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--vary {option}: ")):
        product([option])
    with pytest.raises(InputError, match="stands twice"):
        product(["model.dim=4", "model.dim=8"])


def test_every_combination_once_the_last_path_fastest() -> None:
    found = product(["model.backbone=mmoe,ple", "model.dim=4,8"])
    assert [str(each) for each in found] == [
        "model.backbone=mmoe model.dim=4",
        "model.backbone=mmoe model.dim=8",
        "model.backbone=ple model.dim=4",
        "model.backbone=ple model.dim=8",
    ]
    assert product([]) == [Variation(())]


settings_ = st.lists(st.tuples(st.sampled_from(["model.dim", "a.b-c"]), words), min_size=1, max_size=3)


@given(settings_, st.integers(8, 60))
def test_a_slug_is_short_and_fit_for_a_name(settings: list[tuple[str, str]], length: int) -> None:
    slug = Variation(tuple(settings)).slug(length)
    assert re.fullmatch(r"[A-Za-z0-9._-]+", slug) and len(slug) <= length


def test_slugs_spell_words_and_tell_apart_what_they_cannot_spell() -> None:
    def slug(*settings: tuple[str, str]) -> str:
        return Variation(settings).slug(100)

    assert slug() == ""
    assert slug(("model.backbone", "ple"), ("objective.balance", "weights")) == "backbone-ple-balance-weights"
    alike = [slug(("model.tower.hidden", text)) for text in ("[6,4]", "[6, 4]", "[64]", "6_4")]
    assert len(set(alike)) == 4 and alike[-1] == "tower-hidden-6_4"
    assert all(each.startswith("tower-hidden-6") for each in alike)
    assert slug(("optimizer.dense.lr", "0.1"), ("optimizer.tables.lr", "0.1")) == "dense-lr-0.1-tables-lr-0.1"
    assert slug(("schema.features.item.dim", "4")) == "features-item-dim-4"
    assert slug(("schema.tables.item.dim", "4")) == "tables-item-dim-4"
    assert len({slug((f"schema.features.{name}.dim", "4")) for name in ("my_id", "my id", "my,id")}) == 3


@given(
    st.lists(st.tuples(st.sampled_from(["model.dim", "model.tower.dim", "a.tower-x"]), words), unique=True)
)
def test_no_two_variations_share_a_slug(settings: list[tuple[str, str]]) -> None:
    found = [Variation((setting,)).slug(60) for setting in settings]
    assert len(set(found)) == len(found)


def test_seeds() -> None:
    assert parse_seeds("3", 7) == [7, 8, 9]
    assert parse_seeds("3,5, 8", 7) == [3, 5, 8]
    assert parse_seeds("5,", 7) == [5]
    for wrong in ("0", "-1", "x", "1,,2", "", ",", "1.5", "2000"):
        with pytest.raises(InputError, match="--seeds"):
            parse_seeds(wrong, 0)
