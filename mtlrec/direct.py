"""Large pieces of memory go to disk past the page cache, where the file system can.

Through the cache every byte is copied once more, into memory that the kernel has to find first: several times
the processor time, which a save beside training takes from training.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 4096
"""Addresses in memory, places in the file and lengths are multiples of it, as disks and kernels ask for."""
LEAST_BYTES = 2**20
"""What is smaller goes through the cache."""
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DirectFile:
    """A new file, written from its start to its end."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError where there is one."""
        self._file = open(path, "xb")  # noqa: SIM115 - closed by whoever made it

    def write(self, data: Any) -> int:
        """Write bytes, all of them: what is aligned, in memory and in the file, past the cache."""
        view = memoryview(data).cast("B")
        done = self._write_directly(view) if len(view) >= LEAST_BYTES else 0
        self._file.write(view[done:])
        return len(view)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def _write_directly(self, view: memoryview) -> int:
        """How many bytes from the start of `view` on were written; 0 where it cannot be done."""
        at, address = self._file.tell(), np.frombuffer(view, np.uint8).ctypes.data
        if at % ALIGNMENT or address % ALIGNMENT or not hasattr(os, "O_DIRECT"):
            return 0
        self._file.flush()
        descriptor, done = self._file.fileno(), 0
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            end = len(view) // ALIGNMENT * ALIGNMENT
            # A disk that is nearly full may take a part that is not aligned: the rest finds out.
            while done < end and done % ALIGNMENT == 0:
                done += os.pwrite(descriptor, view[done:end], at + done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        self._file.seek(at + done)
        return done
