"""Imports go down one list (docs/architecture.md draws it); its first tier works without torch and ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Lowest first: a module imports only what stands before it. A package is one place and imports freely within.
# Above the first line no torch, above the second no ray.
LAYERS = """
    __init__ job stack schema patience s3_client s3 direct storage watchdog heap priority metrics
    data.ids data.vocabulary data.source data.labels data.order data.column_types data.shards data.columns
    data.decode data.quarantine data.negatives data.windows
    data.statistics data.label_statistics data.overview data.population data.synthetic data.prepare
    checkpoint.layout checkpoint.folder checkpoint.manifest checkpoint.ranges checkpoint.lease
    checkpoint.starts checkpoint.inspect
    fork generations preflight judge doctor control display compare stopping
    ---
    quiet distributed batch data.assemble data.reader lockstep share vocabularies interactions
    model optimizers plan checkpoint.tensors sharding objective
    checkpoint.vocabularies checkpoint.parts checkpoint.snapshot checkpoint.save
    checkpoint.load
    safety assembly feed evaluate predict journal saver following train actions
    ---
    importing ray_group ray_trainer ray_board ray_worker ray_driver launch commands cli
"""
CLIENT, TORCH, RAY = (tier.split() for tier in LAYERS.split("---"))
PLACES = CLIENT + TORCH + RAY

# Installed by no more than `pip install mtlrec`.
BLOCKED = (
    "torch",
    "torchrec",
    "fbgemm_gpu",
    "tensordict",
    "torchmetrics",
    "ray",
    "safetensors",
    "tensorboardX",
)


def modules() -> dict[str, Path]:
    """Dotted name below mtlrec -> file; the empty __init__ of packages are left out."""
    found = {}
    for path in sorted((ROOT / "mtlrec").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "mtlrec").with_suffix("").parts)
        if name == "__init__" or not name.endswith("__init__"):
            found[name] = path
    return found


def place(module: str) -> str | None:
    """The entry of the list that a module belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in PLACES), None)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, those inside functions too, for `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_has_a_place_and_every_place_a_module() -> None:
    placed = {name: place(name) for name in modules()}
    assert [name for name, found in placed.items() if found is None] == [], "add them to the list above"
    assert sorted(set(PLACES) - set(placed.values())) == []


def test_imports_go_down_the_list() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        here = place(name) or name
        for imported in sorted(imports(path)):
            below = imported.removeprefix("mtlrec.")
            there = place(below) if below in known else None
            if there and here in PLACES and PLACES.index(there) > PLACES.index(here):
                wrong.append(f"{name} imports {below}")
    assert wrong == []


def test_ray_is_known_to_the_last_tier_alone() -> None:
    users = {
        place(name)
        for name, path in modules().items()
        for used in imports(path)
        if used.split(".")[0] == "ray"
    }
    assert users <= set(RAY)


def test_client_imports_without_torch_and_ray() -> None:
    names = [f"mtlrec.{name}" for name in modules() if name != "__init__" and place(name) in CLIENT]
    script = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
for name in {["mtlrec", *names, "mtlrec.cli"]!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
