"""The one exception that means: what the user handed in is wrong (exit code 2, no traceback)."""

from __future__ import annotations


class InputError(ValueError):
    """A job, file, option or environment that the user can correct.

    The message is one line: where (field path, file, column, row group), what is wrong (the value), what is
    allowed or what to do. Whoever catches it at the top prints it as it stands; nobody retries it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class FinalFailure(RuntimeError):
    """The run has failed, and would fail the same way if it were tried again (exit code 1).

    Raised on every rank; no restart of the workers is spent on it.
    """
