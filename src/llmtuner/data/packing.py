"""Which samples share a pack: global best-fit-decreasing, decided by lengths and seed alone.

Packing never changes a sample and never lets samples see each other; it only chooses neighbours.
The result does not depend on the number of workers or ranks.
"""

import bisect
from collections.abc import Sequence
from itertools import chain

import numpy as np

from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

_PACK_BITS = 40
_PACK_MASK = (1 << _PACK_BITS) - 1


def is_packed(args: DataArgs, *, by_default: bool) -> bool:
    """Say whether samples are packed: as the user asked, else as the stage does by default."""
    return by_default if args.packing is None else args.packing


def pack(lengths: Sequence[int], *, capacity: int, seed: int) -> list[list[int]]:
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
    order = np.random.default_rng(seed).permutation(len(lengths))
    longest_first = np.argsort(-np.asarray(lengths, np.int64)[order], kind="stable")
    by_length = order[longest_first].tolist()
    packs: list[list[int]] = []
    # free tokens and pack number of each, sorted; in one number, which compares fastest
    rooms: list[int] = []
    for number in by_length:
        length = lengths[number]
        if length > capacity:
            raise DataError(
                f"Sample {number} does not fit into a pack.", got=length, allowed=f"≤ {capacity}"
            )
        place = bisect.bisect_left(rooms, length << _PACK_BITS)
        if place < len(rooms):
            room = rooms.pop(place)
            free, chosen = room >> _PACK_BITS, room & _PACK_MASK
        else:
            free, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(number)
        if free > length:
            bisect.insort(rooms, (free - length) << _PACK_BITS | chosen)
    return packs


def fill_ratio(packs: Sequence[Sequence[int]], lengths: Sequence[int], *, capacity: int) -> float:
    """Return the share of the packs' room that holds tokens (0 to 1)."""
    if not packs:
        return 0.0
    total = sum(map(lengths.__getitem__, chain.from_iterable(packs)))
    return total / (len(packs) * capacity)
