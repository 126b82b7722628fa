"""Locks of compilers that were killed: DeepSpeed would wait for them for ever.

torch compiles DeepSpeed's C++ parts under a lock file that the compiling process keeps open. If it
is killed, the file stays, and every later run waits without a word.
Source: torch/utils/file_baton.py, https://github.com/pytorch/pytorch/issues/25349.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from llmtuner.extras.env import torch_extensions_dir
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

_PATIENCE_S = 120.0  # for compilers on other machines that share the folder


def clear_build_locks(root: Path | None = None, *, patience_s: float = _PATIENCE_S) -> None:
    """Delete the locks of this user that no process holds, once they are old enough.

    Args:
        root: folder of compiled parts; None asks torch.
        patience_s: how old a lock must be, in seconds; waited for.
    """
    if root is None:
        root = torch_extensions_dir() or Path(get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        told = False
        while _is_left(lock):
            age = time.time() - lock.stat().st_mtime
            if age >= patience_s:
                logger.warning("Deleting %s: the process that compiled there was killed.", lock)
                lock.unlink(missing_ok=True)
            elif not told:
                logger.info("Waiting for %s, at most %.0f s.", lock, patience_s - age)
                told = True
            else:
                time.sleep(min(1.0, patience_s))


def _is_left(lock: Path) -> bool:
    try:
        return lock.stat().st_uid == os.getuid() and lock.resolve() not in _open_files()
    except OSError:  # it was released meanwhile
        return False


def _open_files() -> Iterator[Path]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield Path(os.readlink(link))
        except OSError:  # closed meanwhile, or of another user
            continue
