"""Ray Train, less the processes that it starts for what is never used here."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class Trainer(DataParallelTrainer):
    """Starts no manager of Ray's own data sets, which it would also where there is none.

    own_ray: the Ray ends with the driver, and nobody has to give back what was reserved in it.
    """

    def __init__(self, *arguments: Any, own_ray: bool, **options: Any) -> None:
        self._left_out = (DatasetsCallback, PlacementGroupCleanerCallback) if own_ray else (DatasetsCallback,)
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, self._left_out)]
