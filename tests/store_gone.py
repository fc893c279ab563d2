"""How long a run takes to end once its object store has gone for good, in the middle of it.

python -m tests.store_gone --workers 0 --how refuse [--data disk] [--options '{"retry_s": 5}']

Prints one line of JSON: exit code, seconds, the error. The store is moto's server behind `faulty_proxy`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import yaml
from moto.server import ThreadedMotoServer

from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.s3_server import AWS
from tests.small_data import small_job, write_small_data

BUCKET = "store"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--how", choices=["refuse", "silent"], default="refuse")
    parser.add_argument(
        "--data", choices=["s3", "disk"], default="s3", help="where the data is; the run is on s3"
    )
    parser.add_argument("--options", type=json.loads, default={}, help="storage_options")
    arguments = parser.parse_args()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ.update(AWS)
    try:
        with tempfile.TemporaryDirectory() as folder, faulty_proxy(endpoint) as proxy:
            print(json.dumps(try_it(Path(folder), endpoint, proxy, arguments)), flush=True)
    finally:
        server.stop()


def try_it(home: Path, endpoint: str, proxy: FaultyProxy, arguments: argparse.Namespace) -> dict[str, object]:
    write_small_data(home / "train")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    for file in sorted((home / "train").iterdir()):
        client.put_object(Bucket=BUCKET, Key=f"train/{file.name}", Body=file.read_bytes())
    train = f"s3://{BUCKET}/train" if arguments.data == "s3" else str(home / "train")
    job = small_job(Path(train), Path("runs"), data__eval=None)
    job["data"]["train"] = train
    job["run"].update(storage=f"s3://{BUCKET}/runs", workers=arguments.workers, epochs=10**6)
    job["run"].update(report_every_s=1.0, checkpoint={"every_steps": 30})
    job["storage_options"] = {"endpoint_url": proxy.endpoint, **arguments.options}
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "mtlrec.cli", "train", str(home / "job.yaml"), "--json"]
    with (home / "out").open("wb") as out, (home / "err").open("wb") as err:
        run = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while (
                len({each.path for each in proxy.requests("PUT") if each.path.endswith("manifest.json")}) < 2
            ):
                assert run.poll() is None, (home / "err").read_text()
                time.sleep(0.05)
            went = time.monotonic()
            proxy.go_away(silent=arguments.how == "silent")
            code = run.wait()
        finally:
            run.kill()
    seconds = round(time.monotonic() - went, 1)
    said = json.loads((home / "out").read_text())
    return {**vars(arguments), "exit": code, "seconds": seconds, "error": said["error"]}


if __name__ == "__main__":
    main()
