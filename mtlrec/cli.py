"""The command line: each command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, NoReturn

from mtlrec.job.errors import InputError

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 wrong input, 3 stopped on request)."""
    words = sys.argv[1:] if argv is None else argv
    arguments = argparse.Namespace(json="--json" in words)
    try:
        arguments = _parser().parse_args(words)
        return int(arguments.command(arguments))
    except InputError as error:
        return _fail(arguments, str(error), WRONG_INPUT)
    except KeyboardInterrupt:
        return _fail(arguments, "stopped at once; the last complete checkpoint stands", STOPPED)
    except Exception as error:
        from mtlrec.stack import explain_import_error

        cure = explain_import_error(error) if isinstance(error, ImportError | OSError) else None
        if cure is not None:
            return _fail(arguments, cure, WRONG_INPUT)
        if os.environ.get("MTLREC_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, RuntimeError) and first else f"{type(error).__name__}: "
        return _fail(arguments, f"{kind}{first} (MTLREC_TRACEBACK=1 shows where)", FAILED)


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    print(f"mtlrec: {message}", file=sys.stderr)
    if getattr(arguments, "json", False):
        _print(json.dumps({"error": message, "exit": code}))
    return code


def _print(text: str) -> None:
    """To stdout; whoever reads it may have enough (`| head`), which is no failure of ours."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    prepare.add_argument("dataset", metavar="NAME", help="census")
    prepare.add_argument("source", metavar="SRC", help="folder with the files as they are published")
    prepare.add_argument("out", metavar="OUT", help="new folder: train/, valid/, test/, job.yaml")
    prepare.add_argument("--force", action="store_true", help="replace what OUT holds of an earlier prepare")
    prepare.set_defaults(command=_prepare)

    train = commands.add_parser("train", help="train a job, or go on with it where it stopped")
    train.add_argument("job", metavar="JOB", help="job file (path or URL)")
    train.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field of the job"
    )
    train.add_argument("--name", help="short for --set name=...")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint, per scenario and task")
    predict = commands.add_parser("predict", help="score rows with a checkpoint, into Parquet")
    for parser_, verb in ((evaluate, "measure on"), (predict, "score")):
        parser_.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder (its latest)")
        parser_.add_argument("--data", help=f"Parquet to {verb}; default: the job's data.eval")
        parser_.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
        parser_.add_argument("--batch-size", type=int, help="rows at a time over all workers")
    evaluate.set_defaults(command=_evaluate)
    predict.add_argument("--out", required=True, help="new folder for part-*.parquet")
    predict.add_argument("--keys", help="columns to carry along, by comma; default: user, item and scenario")
    predict.set_defaults(command=_predict)
    for parser_ in (train, evaluate, predict):
        parser_.add_argument("--workers", type=int, help="Ray Train workers; 0: this process alone")
        parser_.add_argument(
            "--address", help="a running Ray cluster (host:port); default: a local one of our own"
        )
        parser_.add_argument("--quiet", action="store_true", help="no progress on stderr")

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

    for parser_ in (synth, prepare, train, evaluate, predict, inspect, doctor):
        parser_.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _synth(arguments: argparse.Namespace) -> int:
    from mtlrec.data.synthetic import synthesise

    sizes = {key: getattr(arguments, key) for key in ("rows", "users", "items", "scenarios", "files", "seed")}
    return _make(
        arguments, lambda out, progress: synthesise(out, **sizes, force=arguments.force, progress=progress)
    )


def _prepare(arguments: argparse.Namespace) -> int:
    from mtlrec.data.prepare.catalog import PREPARERS

    prepare = PREPARERS.get(arguments.dataset)
    if prepare is None:
        raise InputError(f"prepare {arguments.dataset}: not known; allowed: {', '.join(sorted(PREPARERS))}")
    return _make(
        arguments,
        lambda out, progress: prepare(arguments.source, out, force=arguments.force, progress=progress),
    )


def _make(arguments: argparse.Namespace, make: Any) -> int:
    from mtlrec import storage
    from mtlrec.display import Display

    display = Display()
    try:
        made = make(storage.make_absolute(arguments.out, "."), display.handle)
    finally:
        display.close()
    job = storage.join(made["out"], "job.yaml")
    display.say(f"wrote {made['out']}; now: mtlrec train {job}")
    return _print_json(arguments, {**made, "job": job})


def _train(arguments: argparse.Namespace) -> int:
    from mtlrec.stack import require_stack

    overrides = list(arguments.set)
    if arguments.name is not None:
        overrides.append(f"name={json.dumps(arguments.name)}")
    if arguments.workers is not None:
        overrides.append(f"run.workers={arguments.workers}")
    from mtlrec.preflight import open_run, read_job

    job = read_job(arguments.job, overrides)
    require_stack(job.run.device)
    from dataclasses import asdict

    from mtlrec.display import Display
    from mtlrec.launch import StopRequest, check_address, launch

    check_address(arguments.address)
    display, stop = Display(arguments.quiet), StopRequest()
    try:
        opened = open_run(job, {"command": " ".join(sys.argv)}, display.handle)
        if isinstance(opened, dict):
            display.say(f"run {job.name} has finished at step {opened['steps']:,}; raise run.epochs to go on")
            return _show_result(arguments, display, {**opened, "already_finished": True})
        run, lease = opened
        with lease, stop.listening(display.say):
            result = launch(
                "train",
                asdict(run),
                job.run,
                name=job.name,
                address=arguments.address,
                show=display.handle,
                stop=stop,
                alive=lease.check,
            )
    finally:
        display.close()
    return _show_result(arguments, display, result)


def _show_result(arguments: argparse.Namespace, display: Any, result: dict[str, Any]) -> int:
    if result["metrics"]:
        display.metrics(result["metrics"], result["ideal"], f"step {result['steps']:,}, on data.eval")
    rate = f", {result['samples_per_s']:,.0f} samples/s" if result["samples_per_s"] else ""
    display.say(
        f"{result['rows']:,} rows trained, {result['steps']:,} steps{rate}, {result['seconds']:.0f} s"
    )
    display.say(f"run        {result['run_dir']}")
    display.say(f"checkpoint {result['checkpoint']}")
    if result["stopped"]:
        display.say("stopped on request; the same command goes on from here")
    else:
        display.say(f"next: mtlrec evaluate {result['run_dir']} --data FOLDER")
        display.say(f"      mtlrec predict {result['run_dir']} --data FOLDER --out FOLDER")
        display.say(f"      mtlrec inspect {result['run_dir']}")
        display.say(f"      tensorboard --logdir {result['run_dir']}/tensorboard")
    _print_json(arguments, result)
    return STOPPED if result["stopped"] else DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    result, display = _on_checkpoint("evaluate", arguments, {})
    display.metrics(result["metrics"], result["ideal"], f"{result['checkpoint']} on {result['data']}")
    return _print_json(arguments, result)


def _predict(arguments: argparse.Namespace) -> int:
    from mtlrec import storage

    out = storage.make_absolute(arguments.out, ".")
    if storage.list_files(out) if storage.exists(out) else False:
        raise InputError(f"--out {out}: the folder is not empty; name a new one")
    named = arguments.keys.split(",") if arguments.keys is not None else None
    keys = list(dict.fromkeys(key for key in named if key)) if named is not None else None
    result, display = _on_checkpoint("predict", arguments, {"out": out, "keys": keys})
    display.say(f"wrote {result['rows']:,} predictions to {result['out']}")
    return _print_json(arguments, result)


def _on_checkpoint(
    action: str, arguments: argparse.Namespace, payload: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Run `action` on the checkpoint that the arguments name, on as many workers as they say."""
    from mtlrec.stack import require_stack

    require_stack(arguments.device)
    from mtlrec.display import Display
    from mtlrec.job.run import MAX_WORKERS
    from mtlrec.launch import StopRequest, check_address, launch
    from mtlrec.preflight import open_checkpoint

    if arguments.workers is not None and not 0 <= arguments.workers <= MAX_WORKERS:
        raise InputError(f"--workers {arguments.workers}: allowed are 0 to {MAX_WORKERS}")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: at least 1")
    if arguments.address and not arguments.workers:
        raise InputError(f"--address {arguments.address}: needs --workers of at least 1")
    check_address(arguments.address)
    found = open_checkpoint(
        arguments.checkpoint, arguments.data, arguments.device, arguments.batch_size, payload
    )
    job, task = found
    run = job.run.model_copy(update={"workers": arguments.workers or 0})
    display = Display(arguments.quiet)
    try:
        result = launch(
            action,
            task,
            run,
            name=f"{action}-{os.getpid()}",
            address=arguments.address,
            show=display.handle,
            stop=StopRequest(),
            alive=lambda: None,
        )
    finally:
        display.close()
    return result, display


def _inspect(arguments: argparse.Namespace) -> int:
    from mtlrec.checkpoint.folder import find
    from mtlrec.checkpoint.inspect import inspect_checkpoint, render
    from mtlrec.display import Display

    display = Display()
    try:
        found = inspect_checkpoint(find(arguments.checkpoint), verify=arguments.verify, show=display.handle)
    finally:
        display.close()
    if arguments.json:
        return _print_json(arguments, found)
    _print(render(found))
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from mtlrec.doctor import run_doctor

    return run_doctor(storage=arguments.storage, device=arguments.device, as_json=arguments.json)


def _job_schema(arguments: argparse.Namespace) -> int:
    del arguments
    from mtlrec.job.job import job_json_schema

    _print(json.dumps(job_json_schema(), indent=2))
    return DONE


def _print_json(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    if arguments.json:
        _print(json.dumps(result))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
