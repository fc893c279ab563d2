"""The command that compares large vocabularies with model zoos runs, and both sides train the same model."""

from __future__ import annotations

from benchmarks import vocabulary


def test_the_figures_are_printed() -> None:
    found = vocabulary.main(["--quick"])
    assert found["ratios"].keys() == {"batch_64", "batch_16", "16M_of_1.6M"}
    assert found["beside"].keys() == {"batch_256", "batch_64_bare", "batch_16_bare", "fused_adam"}
    for name, values in (found["ratios"] | found["beside"]).items():
        assert 0 < values["min"] <= values["median"] <= values["max"], name
        assert found["cpu"][name]["min"] > 0
    for rates in (found["samples_per_s"], found["samples_per_cpu_s"]):
        assert rates.keys() == {
            *("small", "large", "small_64", "small_16"),
            *("zoo", "zoo_fused", "zoo_64", "zoo_64_bare", "zoo_16", "zoo_16_bare"),
        }
        assert all(each["min"] > 0 for each in rates.values())
    parameters = found["parameters"]
    assert parameters["ours"] == parameters["theirs"] > 16 * found["table_rows"]["small"]
    assert found["table_rows"]["large"] > 9 * found["table_rows"]["small"]
