"""The backbones that a job can name."""

from __future__ import annotations

from typing import Any

from mtlrec.model.backbones.mmoe import MMoE
from mtlrec.model.backbones.shared_bottom import SharedBottom

BACKBONES: dict[str, Any] = {"shared_bottom": SharedBottom, "mmoe": MMoE}
"""`model.backbone.kind` -> class.

A backbone is constructed from `inputs` (I), `num_tasks`, `num_scenarios` and the fields of its section of the
job, all by name; it has `outputs` (H) and maps x float [B, I] and scenario int64 [B] to [T, B, H].
"""
