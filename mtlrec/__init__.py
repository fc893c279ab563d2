"""mtlrec: multi-task, multi-scenario and cross-domain recommenders on Ray and TorchRec."""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'mtlrec' has no attribute {name!r}")
    from importlib.metadata import version

    return version("mtlrec")
