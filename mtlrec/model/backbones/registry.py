"""The backbones that a job can name."""

from __future__ import annotations

from typing import Any

from mtlrec.model.backbones.factorization import Factorization
from mtlrec.model.backbones.mmoe import MMoE
from mtlrec.model.backbones.ple import PLE
from mtlrec.model.backbones.shared_bottom import SharedBottom

BACKBONES: dict[str, Any] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "factorization": Factorization,
}
"""`model.backbone.kind` -> class.

A backbone is constructed from `inputs` (I), `num_tasks`, `num_scenarios`, `lookups` (which columns of its
input are which embedding), `dropout` (handed to its hidden layers) and the fields of its section of the job,
all by name; it has `outputs` (H) and maps x float [M, I], padded by `layers.pad_trunk` or not (`Linear` takes
either), and scenario int64 [M] to [T, M, H]. With `scores` its output is the score itself: H is 1, and each
task adds a bias to it in place of a tower.
"""
