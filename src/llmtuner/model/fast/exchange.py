"""Ranks of one machine exchange tensors through memory that they share, without sockets.

A socket's tensors are copied four times more and into new memory, and sums in bfloat16 are rounded
once for every rank; here they are added in float32, in the order of the ranks, and rounded once.
"""

import ctypes
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llmtuner.extras.errors import DistributedError
from llmtuner.extras.logs import get_logger
from llmtuner.model.fast.kernels import load_kernels

logger = get_logger(__name__)

_FOLDER = Path("/dev/shm")  # nothing in it is ever written to a disk
_MARK_BYTES = 64
_PART_BYTES = 1 << 19  # two for each rank; of a few ranks they stay in the cache
_MOST_RANKS = 64
_ENDED = 1  # what the C functions say of rank n: 2 n + 1, it has ended, 2 n + 2, it is too late
_TYPES = (torch.float32, torch.bfloat16)


class Exchange:
    """The memory of one group of ranks, and what they do with it, all in the same order."""

    def __init__(
        self, library: ctypes.CDLL, memory: mmap.mmap, *, rank: int, size: int, limit: timedelta
    ) -> None:
        """Take memory that every rank has mapped.

        Args:
            library: with the functions of `exchange.c`.
            memory: of `_num_bytes(size)` bytes, zero at first.
            rank: of this process in the group.
            size: ranks of the group.
            limit: how long to wait for a rank.
        """
        self._library = library
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._place = (rank, size, _PART_BYTES, max(int(limit.total_seconds()), 1))

    def can_add(self, x: Tensor) -> bool:
        """Tell whether `add_up_` takes such a tensor."""
        return x.dtype in _TYPES and x.is_contiguous() and x.device.type == "cpu"

    def add_up_(self, x: Tensor) -> None:
        """Set x to its sum over all ranks.

        Raises:
            DistributedError: another rank has ended, or does not come.
        """
        self._call("add_up", x.data_ptr(), x.numel(), x.dtype == torch.bfloat16)

    def hand_round(self, own: Tensor, out: Tensor) -> None:
        """Set out [ranks, …], contiguous, to what `own` [] is on every rank.

        Raises:
            DistributedError: another rank has ended, or does not come.
        """
        self._call("hand_round", own.data_ptr(), out.data_ptr(), own.numel() * own.element_size())

    def _call(self, name: str, *numbers: int) -> None:
        function = self._library[name]
        function.restype = ctypes.c_int64
        problem = function(*map(ctypes.c_int64, (self._address, *numbers, *self._place)))
        if not problem:
            return
        rank, what = divmod(problem - 1, 2)
        raise DistributedError(
            f"Rank {rank} has ended while this one waits for its tensors."
            if what + 1 == _ENDED
            else f"Rank {rank} has not sent its tensors in {self._place[-1]} s.",
            fix="see what that rank said before; if it said nothing, the system may have ended it "
            "for lack of memory: lower --per_device_train_batch_size or --cutoff_len",
        )


def join_exchange(store: dist.Store, *, rank: int, size: int, limit: timedelta) -> Exchange | None:
    """Meet the other ranks of a group in shared memory.

    Args:
        store: of this group alone.
        rank: of this process in the group.
        size: ranks of the group.
        limit: how long to wait for a rank, later.

    Returns:
        None, on every rank alike, where they are not all on one machine, or it has too little
        shared memory or no C compiler; says why.
    """
    kernels = load_kernels() if 1 < size <= _MOST_RANKS else None
    memory = None
    problem = "there is no shared memory" if kernels else "there are no C functions for it"
    with _announced(store, rank, size, is_able=kernels is not None) as path:
        if path is not None and kernels is not None:
            try:
                memory = _map(path, size)
                struct.pack_into("=Ii", memory, rank * _MARK_BYTES, 0, os.getpid())
            except OSError as error:
                problem = str(error)
        processes = _told(store, "process", rank, size, "" if memory is None else str(os.getpid()))
    sees_all = memory is not None and all(
        _is_there(memory, other, process) for other, process in enumerate(processes)
    )
    all_see = all(_told(store, "sees", rank, size, "yes" if sees_all else ""))
    if kernels is None or memory is None or not all_see:
        if size > 1:
            logger.info(
                "Ranks exchange tensors over the network: %s.",
                problem if memory is None else "they do not share one machine's memory",
            )
        return None
    return Exchange(kernels.library, memory, rank=rank, size=size, limit=limit)


@contextmanager
def _announced(store: dist.Store, rank: int, size: int, *, is_able: bool) -> Iterator[Path | None]:
    """Yield the path of rank 0's new file; it is only needed until all have mapped it."""
    if rank != 0:
        name = store.get("memory").decode()
        yield Path(name) if name else None
        return
    path = _new_file(size) if is_able else None
    store.set("memory", "" if path is None else str(path))
    try:
        yield path
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _new_file(size: int) -> Path | None:
    try:
        descriptor, name = tempfile.mkstemp(prefix="llmtuner-", dir=_FOLDER)
    except OSError:
        return None
    try:  # reserved now: later, too little room would end the process
        os.posix_fallocate(descriptor, 0, _num_bytes(size))
    except OSError:
        os.unlink(name)
        return None
    finally:
        os.close(descriptor)
    return Path(name)


def _map(path: Path, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        return mmap.mmap(descriptor, _num_bytes(size))
    finally:
        os.close(descriptor)


def _num_bytes(size: int) -> int:
    return size * (_MARK_BYTES + 2 * _PART_BYTES)


def _told(store: dist.Store, key: str, rank: int, size: int, value: str) -> list[str]:
    """Tell the others; return what each rank tells."""
    store.set(f"{key}{rank}", value)
    return [store.get(f"{key}{other}").decode() for other in range(size)]


def _is_there(memory: mmap.mmap, rank: int, process: str) -> bool:
    """Tell whether a rank has written to this very memory, and we could see it end."""
    _, written = struct.unpack_from("=Ii", memory, rank * _MARK_BYTES)
    if not process or int(process) != written:
        return False
    try:
        os.kill(written, 0)
    except OSError:
        return False
    return True
