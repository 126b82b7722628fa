"""Which samples share a pack: global best-fit-decreasing, decided by lengths and seed alone.

Packing never changes a sample and never lets samples see each other; it only chooses neighbours.
The result does not depend on the number of workers or ranks.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

Numbers = NDArray[np.int64]


def is_packed(args: DataArgs, *, by_default: bool) -> bool:
    """Say whether samples are packed: as the user asked, else as the stage does by default."""
    return by_default if args.packing is None else args.packing


def pack(lengths: ArrayLike, *, capacity: int, seed: int) -> list[list[int]]:
    """Group sample numbers so that each group holds at most `capacity` tokens.

    Samples are placed from the longest to the shortest, each into the fullest pack that still has
    room for it; samples of equal length come in an order drawn from `seed`.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a full pack.
        seed: decides between samples of equal length.

    Returns:
        Packs of sample numbers; together they hold every number once.

    Raises:
        DataError: a sample is longer than a pack.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    longest_first = order[np.argsort(-sizes[order], kind="stable")]
    sizes = sizes[longest_first]
    if len(sizes) and sizes[0] > capacity:
        problem = f"Sample {longest_first[0]} does not fit into a pack."
        raise DataError(problem, got=int(sizes[0]), allowed=f"≤ {capacity}")
    rooms = _Rooms(capacity)
    starts = np.flatnonzero(np.diff(sizes, prepend=-1)).tolist()
    chosen = [
        rooms.place(int(sizes[start]), num_samples=end - start)
        for start, end in pairwise([*starts, len(sizes)])
    ]
    pack_of = np.concatenate([np.zeros(0, np.int64), *chosen])
    by_pack = longest_first[np.argsort(pack_of, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(pack_of)).tolist()
    return [by_pack[start:end] for start, end in pairwise([0, *ends])]


class _Rooms:
    """The packs by their free tokens.

    Samples of one length are placed together. The fullest pack with room for them takes as many as
    fit, for it is the fullest one still after each of them.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_packs = 0
        self._by_free: dict[int, list[Numbers]] = {}
        self._free: list[int] = []  # its keys, sorted

    def place(self, length: int, *, num_samples: int) -> Numbers:
        """Return the pack of each sample; none that was placed before is shorter."""
        parts: list[Numbers] = []
        while num_samples:
            free, packs = self._fullest(length) or self._new(length, num_samples)
            parts.append(self._fill(packs, free, length, num_samples))
            num_samples -= len(parts[-1])
        return np.concatenate(parts)

    def _fullest(self, length: int) -> tuple[int, Numbers] | None:
        """Take out the packs with the least room that is enough."""
        place = bisect_left(self._free, length)
        if place == len(self._free):
            return None
        free = self._free.pop(place)
        return free, np.sort(np.concatenate(self._by_free.pop(free)))

    def _new(self, length: int, num_samples: int) -> tuple[int, Numbers]:
        first = self._num_packs
        self._num_packs += -(-num_samples // _times(self._capacity, length, num_samples))
        return self._capacity, np.arange(first, self._num_packs)

    def _fill(self, packs: Numbers, free: int, length: int, num_samples: int) -> Numbers:
        """Fill one after the other as far as there are samples; return the pack of each."""
        times = _times(free, length, num_samples)
        num_filled = min(-(-num_samples // times), len(packs))
        chosen = np.repeat(packs[:num_filled], times)[:num_samples]
        in_last = len(chosen) - (num_filled - 1) * times
        self._keep(packs[: num_filled - 1], free - times * length)
        self._keep(packs[num_filled - 1 : num_filled], free - in_last * length)
        self._keep(packs[num_filled:], free)
        return chosen

    def _keep(self, packs: Numbers, free: int) -> None:
        if not free or not len(packs):
            return
        if free not in self._by_free:
            self._by_free[free] = []
            insort(self._free, free)
        self._by_free[free].append(packs)


def _times(free: int, length: int, num_samples: int) -> int:
    """Return how many samples of a length one pack takes."""
    return free // length if length else num_samples


def fill_ratio(packs: Sequence[Sequence[int]], lengths: ArrayLike, *, capacity: int) -> float:
    """Return the share of the packs' room that holds tokens (0 to 1); each sample is in a pack."""
    return float(np.sum(lengths)) / (len(packs) * capacity) if packs else 0.0
