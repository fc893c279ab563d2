"""Keeps TorchRec, fbgemm and torch from telling users what no user can act upon."""

from __future__ import annotations

import logging
import warnings

_LIBRARIES = ("torchrec", "fbgemm_gpu")

_MESSAGES = (
    # fbgemm registers its own autograd formula; the gradients are compared with plain PyTorch in our tests.
    r"fbgemm::.*an autograd kernel was not registered",
    # TorchRec's own calls.
    r"`torch\.distributed\.\w+` is deprecated",
)


def quiet_libraries() -> None:
    """Drop what these libraries log below ERROR, and a few of their warnings. Harmless to call again."""
    for name in (*_LIBRARIES, "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Both also log through the root logger, which must stay as the application set it for everyone else.
    root = logging.getLogger()
    if _of_others not in root.filters:
        root.addFilter(_of_others)
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)


def _of_others(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not any(
        f"/{library}/" in record.pathname.replace("\\", "/") for library in _LIBRARIES
    )
