"""Section `run`: where and how, nothing of what is learnt; all of it may change when a run resumes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtlrec.job.section import Section

ShardingKind = Literal["auto", "row_wise", "table_wise", "column_wise", "data_parallel"]

MAX_WORKERS = 4096


class CheckpointSection(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps; null: at the end alone. The end always saves."""
    keep_last: int = Field(default=2, ge=1)
    """Complete checkpoints that are kept, beside the best."""


class RunSection(Section):
    storage: str = "runs"
    """Folder of run folders, a path or a URL. The run's own folder in it has the job's name."""
    workers: int = Field(default=2, ge=0, le=MAX_WORKERS)
    """Ray Train workers; 0 trains in one plain process, without Ray."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)
    """Arithmetic threads of each worker on CPU."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps in all, though epochs remain; null: after `epochs`."""
    checkpoint: CheckpointSection = CheckpointSection()
    max_failures: int = Field(default=3, ge=0)
    """Worker failures that Ray Train repairs by going on from the last checkpoint."""
    sharding: ShardingKind | dict[str, ShardingKind] = "auto"
    """How tables are spread over workers: for all, or by table name; auto: TorchRec's planner decides."""
    report_every_s: float = Field(default=2.0, gt=0)
    """Seconds between progress reports."""
    record_rows: bool = False
    """Write the number of every trained row beside the run, in `rows/`: proof of what was trained."""
    step_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """A collective that lasts longer fails the run instead of hanging."""
