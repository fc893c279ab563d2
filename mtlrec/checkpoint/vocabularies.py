"""The vocabularies in a checkpoint: which raw ids the rows of its tables are. Needs no torch."""

from __future__ import annotations

import numpy as np

from mtlrec.checkpoint.folder import MANIFEST
from mtlrec.checkpoint.manifest import Manifest, broken
from mtlrec.checkpoint.ranges import read_whole
from mtlrec.data.vocabulary import Vocabulary


def load_vocabularies(url: str, manifest: Manifest) -> dict[str, Vocabulary]:
    """Those of the checkpoint in `url`, by table. InputError where a file is missing, damaged or absurd.

    manifest: as `read_manifest` gives it, which has checked shapes against the sizes of the files, so that no
    more memory is taken than they have bytes.
    """
    found = {}
    for known in manifest.meta["schema"]["tables"]:
        if known.get("ids") == "vocabulary" and known["name"] not in manifest.vocabularies:
            raise broken(url, MANIFEST, f"the vocabulary of table {known['name']!r} is missing")
    for table, entry in manifest.vocabularies.items():
        arrays = {
            name: np.frombuffer(read_whole(url, entry, name), np.uint8 if tensor.dtype == "U8" else np.int64)
            for name, tensor in entry.tensors.items()
        }
        try:
            found[table] = Vocabulary.from_arrays(arrays, entry.kind, entry.reserved)
        except ValueError as error:
            raise broken(url, entry.file, str(error)) from None
    return found
