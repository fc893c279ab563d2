"""The command line: each command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from mtlrec.commands.console import DONE, FAILED, STOPPED, WRONG_INPUT, fail, leave, print_text
from mtlrec.importing import uncollected
from mtlrec.job.errors import InputError


def run() -> NoReturn:
    """The program `mtlrec`."""
    leave(main(sys.argv[1:]))


def main(words: list[str]) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 wrong input, 3 stopped on request)."""
    arguments = argparse.Namespace(json="--json" in words)
    try:
        arguments = _parser().parse_args(words)
        return int(arguments.command(arguments))
    except InputError as error:
        return fail(arguments, str(error), WRONG_INPUT)
    except KeyboardInterrupt:
        return fail(arguments, "stopped at once; the last complete checkpoint stands", STOPPED)
    except Exception as error:
        from mtlrec.stack import explain_import_error

        cure = explain_import_error(error) if isinstance(error, ImportError | OSError) else None
        if cure is not None:
            return fail(arguments, cure, WRONG_INPUT)
        if os.environ.get("MTLREC_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, RuntimeError) and first else f"{type(error).__name__}: "
        return fail(arguments, f"{kind}{first} (MTLREC_TRACEBACK=1 shows where)", FAILED)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtlrec", description="Train multi-task, multi-scenario recommenders at scale.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    synth = commands.add_parser("synth", help="make data with a known answer, and a job that trains on it")
    synth.add_argument("out", metavar="OUT", help="new folder: train/, valid/, test/, job.yaml")
    for name, default, meaning in (
        ("rows", 1_000_000, "training rows; valid and test get a tenth each"),
        ("users", 20_000, "users"),
        ("items", 5_000, "items"),
        ("scenarios", 4, "scenarios"),
        ("files", 8, "training shards"),
        ("seed", 0, "seed"),
    ):
        synth.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")
    synth.add_argument("--force", action="store_true", help="replace what OUT holds of an earlier synth")
    synth.set_defaults(command=_synth)

    prepare = commands.add_parser("prepare", help="turn a public data set into Parquet and a job")
    prepare.add_argument("dataset", metavar="NAME", help="census, epinions or xmarket")
    prepare.add_argument("source", metavar="SRC", help="folder with the files as they are published")
    prepare.add_argument("out", metavar="OUT", help="new folder: train/, valid/, test/, job.yaml")
    prepare.add_argument("--force", action="store_true", help="replace what OUT holds of an earlier prepare")
    prepare.set_defaults(command=_prepare)

    train = commands.add_parser("train", help="train a job, or go on with it where it stopped")
    train.add_argument("--name", help="short for --set name=...")
    train.add_argument(
        "--fork",
        metavar="NEW_NAME",
        help="a new run that starts, with this job, from the latest checkpoint of the run that the job names",
    )
    train.set_defaults(command=_train)

    compare = commands.add_parser("compare", help="train variations of a job, and put them into one table")
    _add_compare(compare)
    for parser_ in (train, compare):
        parser_.add_argument("job", metavar="JOB", help="job file (path or URL)")
        parser_.add_argument(
            "--set", action="append", default=[], metavar="A.B=C", help="override a field of the job"
        )

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint, per scenario and task")
    predict = commands.add_parser("predict", help="score rows with a checkpoint, into Parquet")
    for parser_, verb in ((evaluate, "measure on"), (predict, "score")):
        parser_.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, or run folder (its best)")
        parser_.add_argument("--last", action="store_true", help="of a run folder: its latest, not its best")
        parser_.add_argument("--data", help=f"Parquet to {verb}; default: the job's data.eval")
        parser_.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
        parser_.add_argument("--batch-size", type=int, help="rows at a time over all workers")
    evaluate.add_argument("--against", metavar="OTHER", help="a second checkpoint or run: how the two differ")
    evaluate.add_argument(
        "--replicates", type=int, help="of the bootstrap over users, with --against (default 1000)"
    )
    evaluate.set_defaults(command=_evaluate)
    predict.add_argument("--out", required=True, help="new folder for part-*.parquet")
    predict.add_argument("--keys", help="columns to carry along, by comma; default: user, item and scenario")
    predict.set_defaults(command=_predict)
    for parser_ in (train, compare, evaluate, predict):
        parser_.add_argument(
            "--workers",
            type=_workers if parser_ in (train, compare) else int,
            metavar="N",
            help="Ray Train workers; 0: this process alone"
            + ("; MIN-MAX: as many as there is room for" if parser_ in (train, compare) else ""),
        )
        parser_.add_argument(
            "--address", help="a running Ray cluster (host:port); default: a local one of our own"
        )
        parser_.add_argument("--quiet", action="store_true", help="no progress on stderr")

    stop = commands.add_parser("stop", help="ask whoever trains a run to save and end (needs no torch)")
    stop.add_argument("run", metavar="RUN", help="the run's folder")
    stop.set_defaults(command=_stop)

    inspect = commands.add_parser("inspect", help="show what a checkpoint holds (needs no torch)")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder (its latest)")
    inspect.add_argument("--verify", action="store_true", help="read every byte and check its checksum")
    inspect.set_defaults(command=_inspect)

    doctor = commands.add_parser("doctor", help="check versions, devices, memory and storage")
    doctor.add_argument("--storage", help="URL that must be readable and writable")
    doctor.add_argument("--device", choices=("cpu", "cuda"), help="what training will run on")
    doctor.set_defaults(command=_doctor)

    schema = commands.add_parser("job-schema", help="print the JSON schema of a job file, for editors")
    schema.set_defaults(command=_job_schema)

    for parser_ in (synth, prepare, train, compare, evaluate, predict, stop, inspect, doctor):
        parser_.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="A.B=V1,V2",
        help="values of a field, as YAML with commas between; repeated: every combination",
    )
    parser.add_argument(
        "--seeds", help="how many, from the job's own upwards, or which: 3,5,8 (default: run.seeds, or one)"
    )
    parser.add_argument("--data", help="Parquet to measure every run on; default: the job's data.eval")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        help="a column of the table, as METRIC, TASK/METRIC or SCENARIO/TASK/METRIC; may be repeated",
    )
    parser.add_argument("--scenarios", action="store_true", help="a table for each scenario too")
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument(
        "--out", help="folder for compare.json, compare.md and logs (default: run.storage/NAME-compare)"
    )
    parser.set_defaults(command=_compare)


def _workers(text: str) -> str:
    """`run.workers` as YAML, of N or MIN-MAX."""
    few, dash, many = text.partition("-")
    if not few.isdecimal() or (dash and not many.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: a number, or two as MIN-MAX")
    return json.dumps({"min": int(few), "max": int(many)} if dash else int(few))


def _synth(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.data import synth
    return synth(arguments)


def _prepare(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.data import prepare
    return prepare(arguments)


def _train(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.train import train
    return train(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.compare import compare
    return compare(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.checkpoint import evaluate
    return evaluate(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.checkpoint import predict
    return predict(arguments)


def _stop(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.stop import stop
    return stop(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.commands.checkpoint import inspect
    return inspect(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    with uncollected():
        from mtlrec.doctor import run_doctor
    return run_doctor(storage=arguments.storage, device=arguments.device, as_json=arguments.json)


def _job_schema(arguments: argparse.Namespace) -> int:
    del arguments
    from mtlrec.job.job import job_json_schema

    print_text(json.dumps(job_json_schema(), indent=2))
    return DONE


if __name__ == "__main__":
    run()
