"""What a run is about to read, in numbers a person can check: rows, label rates for each scenario."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.labels import keep_given
from mtlrec.data.shards import Dataset
from mtlrec.schema import Schema


def overview(dataset: Dataset, schema: Schema, max_groups: int = 16) -> dict[str, Any]:
    """Count everything, and sample the labels of at most `max_groups` evenly spaced row groups.

    Returns plain data: `url`, `shards`, `groups`, `rows`, `sampled_rows`, and for each scenario its sampled
    `rows` and, for each task, `labelled` (share of rows with a label that `given` allows) and `mean` (of
    those labels, or None).
    """
    groups = np.unique(np.linspace(0, len(dataset.group_rows) - 1, max_groups).round().astype(np.int64))
    labels = list(dict.fromkeys(task.label for task in schema.tasks))
    columns = labels + ([schema.scenario_column] if schema.scenario_column else [])
    tables = [dataset.read_group(int(group), list(dict.fromkeys(columns))) for group in groups]
    names = {name: index for index, name in enumerate(schema.scenarios)}
    counts = np.zeros((len(names), len(schema.tasks), 3))
    rows = np.zeros(len(names), dtype=np.int64)
    for table in tables:
        if schema.scenario_column:
            values = pc.cast(_plain(table[schema.scenario_column]), pa.string())
            found = pc.index_in(values, value_set=pa.array(schema.scenarios, pa.string()))
            scenario = found.fill_null(-1).to_numpy(zero_copy_only=False)
        else:
            scenario = np.zeros(table.num_rows, dtype=np.int64)
        known_labels = {
            name: pc.cast(_plain(table[name]), pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            for name in labels
        }
        label = np.stack([known_labels[task.label] for task in schema.tasks], axis=1)
        known = ~np.isnan(label)
        keep_given(schema.tasks, label, known)
        for index in range(len(names)):
            here = scenario == index
            rows[index] += here.sum()
            for position in range(len(schema.tasks)):
                counted = here & known[:, position]
                counts[index, position] += counted.sum(), label[counted, position].sum(), here.sum()
    return {
        "url": dataset.url,
        "shards": len(dataset.shards),
        "groups": len(dataset.group_rows),
        "rows": dataset.rows,
        "sampled_rows": int(rows.sum()),
        "scenarios": {
            name: {
                "rows": int(rows[index]),
                "tasks": {
                    task.name: {
                        "labelled": _ratio(counts[index, position, 0], counts[index, position, 2]),
                        "mean": _ratio(counts[index, position, 1], counts[index, position, 0]),
                    }
                    for position, task in enumerate(schema.tasks)
                },
            }
            for name, index in names.items()
        },
    }


def _plain(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
