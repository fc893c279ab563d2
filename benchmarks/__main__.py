"""Ratios of mtlrec to what it is measured against, taken side by side: `python -m benchmarks --help`."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "end_to_end": "Parquet to trained, beside plain TorchRec on batches in memory; 1 and 2 workers",
    "reader": "Parquet to batches, beside a plain scan of the same columns",
    "vocabulary": "samples/s at 1.6M and 16M rows of tables, beside nn.Embedding with dense Adam",
    "checkpoint": "save and load of 4 GiB of tables, beside plain copies; memory while saving",
    "stall": "training with a checkpoint per 200 steps, beside training without",
    "evaluate": "10M rows measured, beside the forward pass alone",
    "scaling": "1 to 2 workers at fixed rows per worker, beside plain TorchRec's own scaling",
    "memory": "a worker's memory for 2 GiB of tables on 1, 2 and 4 workers, beside its share of them",
    "floor": "this machine's rates, and what a step of the end-to-end job could take at best",
    "gpu": "end_to_end on one GPU with 1e8 rows of tables, and its lookups alone; runs where it is named",
    "start": "command to first step, beside a bare Ray Train start; --help beside an empty program",
}


def main(arguments: list[str]) -> None:
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or (arguments in (["-h"], ["--help"]) and not names):
        if unknown:
            print(f"no benchmark {', '.join(unknown)}", file=sys.stderr)
        print(
            "python -m benchmarks [NAME ...] [--quick] [--repeats N] [--folder FOLDER]; without: all but gpu"
        )
        for name, what in BENCHMARKS.items():
            print(f"  {name:12} {what}")
        raise SystemExit(2 if unknown else 0)
    for name in names or [name for name in BENCHMARKS if name != "gpu"]:
        print(f"{name}: {BENCHMARKS[name]}", file=sys.stderr, flush=True)
        importlib.import_module(f"benchmarks.{name}").main(list(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
