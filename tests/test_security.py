"""Nothing in the package can turn data into code: no pickle, no eval, no shell, in any form that Python has.

A checkpoint, a job file or a message from another rank may come from anywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtlrec"

MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle",
    "torch.package", "torch.distributed.checkpoint", "numpy.compat.py3k", "ray.cloudpickle",
}  # fmt: skip
"""Not to be imported, nor anything from them: they read or write pickles."""

BUILTINS = {"eval", "exec", "compile", "__import__"}

CALLS = {
    "torch.load": "reads pickles",
    "torch.save": "writes pickles",
    "torch.hub.load": "runs code from elsewhere",
    "torch.jit.load": "reads code",
    "torch.distributed.broadcast_object_list": "pickles what it sends",
    "torch.distributed.all_gather_object": "pickles what it sends",
    "torch.distributed.gather_object": "pickles what it sends",
    "torch.distributed.scatter_object_list": "pickles what it sends",
    "torch.distributed.send_object_list": "pickles what it sends",
    "torch.distributed.recv_object_list": "pickles what it sends",
    "pandas.read_pickle": "reads pickles",
    "yaml.unsafe_load": "makes objects of any class",
    "yaml.full_load": "makes objects of some classes",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
}
METHODS = {"to_pickle": "writes pickles", "read_pickle": "reads pickles"}
"""Refused on anything."""


def dangers(source: str) -> Iterator[str]:
    """Each "line: what" in the source of a module that could turn data into code."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _modules(node):
                if any(module == bad or module.startswith(f"{bad}.") for bad in MODULES):
                    yield f"{node.lineno}: imports {module}"
        elif isinstance(node, ast.Attribute | ast.Name) and _dotted(node, names) in CALLS:
            yield f"{node.lineno}: {_dotted(node, names)} {CALLS[_dotted(node, names)]}"
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield f"{node.lineno}: {node.attr} {METHODS[node.attr]}"
        elif isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load):
            yield f"{node.lineno}: {node.id}"
        if isinstance(node, ast.Call):
            yield from _careless(node, names)


def _careless(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    """Calls that are safe only with the right argument."""
    called = _dotted(call.func, names)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if called in ("numpy.load", "numpy.save", "numpy.lib.format.read_array", "numpy.lib.format.write_array"):
        refused = given.get("allow_pickle")
        if not (isinstance(refused, ast.Constant) and refused.value is False):
            yield f"{call.lineno}: {called} without allow_pickle=False"
    if called in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
        name = _dotted(loader, names) if loader is not None else "yaml.Loader"
        if name.startswith("yaml.") and name not in ("yaml.SafeLoader", "yaml.CSafeLoader"):
            yield f"{call.lineno}: {called} without a safe loader"
    shell = given.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        yield f"{call.lineno}: a shell"
    if any(keyword.arg == "trust_remote_code" for keyword in call.keywords):
        yield f"{call.lineno}: code from elsewhere"


def _imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for, wherever in the module it is imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as numpy.load; "" for what is no dotted name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value, names)
        return f"{head}.{node.attr}" if head else ""
    return ""


def test_the_package_cannot_turn_data_into_code() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = [f"{file.relative_to(PACKAGE)}:{line}" for file in files for line in dangers(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from _pickle import loads",
        "def f():\n    from ray import cloudpickle",
        "import ray.cloudpickle as c",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import torch as t\nt.save({}, 'x')",
        "import torch\nf = torch.load",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "from torch import distributed as d\nd.broadcast_object_list([])",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from numpy import save\nsave('x', [])",
        "import yaml\nyaml.load('x')",
        "import yaml\nyaml.load('x', Loader=yaml.UnsafeLoader)",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "from yaml import FullLoader, load\nload('x', Loader=FullLoader)",
        "import yaml\nyaml.unsafe_load('x')",
        "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "frame.to_pickle('x')",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(open('x'))",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.load('x', Loader=SafeLoader)\nyaml.safe_load('x')",
        "model.eval()\nre.compile('x')",
        "class Data:\n    eval: str",
        "import safetensors\nsafetensors.torch.load(b'')",
        "import subprocess\nsubprocess.run(['x'])",
    ],
)
def test_the_scan_passes(source: str) -> None:
    assert list(dangers(source)) == []
