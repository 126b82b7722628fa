"""Ranks on one machine lend each other the cores that they do not use while they wait.

Batches of a step are not equally long, so one rank is done first and waits for the others'
gradients. Results do not depend on the number of threads.
"""

import atexit
import ctypes
import mmap
import os

from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

_SLOTS, _SLOT_BYTES = 64, 64


def share_cores(library: ctypes.CDLL) -> mmap.mmap | None:
    """Let the kernels of this rank see which others compute; without a launcher, do nothing.

    Args:
        library: with the functions of `cores.c`.

    Returns:
        Memory that has to stay as long as the library is called.
    """
    env = process_env()
    if env.world_size == 1 or env.local_rank >= _SLOTS:
        return None
    path = env.cache_dir / "cores" / env.job_id
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, _SLOTS * _SLOT_BYTES)
            memory = mmap.mmap(descriptor, _SLOTS * _SLOT_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.info("Ranks do not lend each other cores: %s", error)
        return None
    atexit.register(path.unlink, missing_ok=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    cores = len(os.sched_getaffinity(0))
    numbers = [ctypes.c_int64(number) for number in (_SLOTS, env.local_rank, cores)]
    library.share_cores(ctypes.c_void_p(start), *numbers)
    return memory
