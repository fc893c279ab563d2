"""What a loop may say to, and ask of, whoever runs it. The loops know no more of the outside than this."""

from __future__ import annotations

from typing import Any, Protocol


class Control(Protocol):
    """Handed to training, evaluation and prediction on every worker; rank 0's words reach the user."""

    def show(self, event: dict[str, Any]) -> None:
        """Pass a plain-data event (`{"kind": "progress", ...}`) to the user's screen."""

    def report(self, metrics: dict[str, float], checkpoint: str) -> None:
        """Tell the launcher of a finished checkpoint. Every worker calls it at the same step."""

    def should_stop(self) -> bool:
        """The user asked for an end at the next step. Any rank may hear it.

        Asked once a step, and once a batch while data.eval is measured.
        """

    def should_save(self) -> bool:
        """A checkpoint is wanted at the next step (a node is about to go). Any rank may hear it.

        Asked as `should_stop` is, and answered by yes once for every checkpoint that is wanted.
        """


class Silent:
    """No one is watching: for tests and programs that call a loop directly."""

    def show(self, event: dict[str, Any]) -> None:
        del event

    def report(self, metrics: dict[str, float], checkpoint: str) -> None:
        del metrics, checkpoint

    def should_stop(self) -> bool:
        return False

    def should_save(self) -> bool:
        return False
