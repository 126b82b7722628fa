"""Which samples share a pack: global best-fit-decreasing, decided by lengths and seed alone.

Packing never changes a sample and never lets samples see each other; it only chooses neighbours.
The result does not depend on the number of workers or ranks.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs


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
    by_length = sorted(order.tolist(), key=lambda number: -lengths[number])
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack number), sorted
    for number in by_length:
        length = lengths[number]
        if length > capacity:
            raise DataError(
                f"Sample {number} does not fit into a pack.", got=length, allowed=f"≤ {capacity}"
            )
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            free, chosen = rooms.pop(place)
        else:
            free, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(number)
        if free > length:
            bisect.insort(rooms, (free - length, chosen))
    return packs


def fill_ratio(packs: Sequence[Sequence[int]], lengths: Sequence[int], *, capacity: int) -> float:
    """Return the share of the packs' room that holds tokens (0 to 1)."""
    if not packs:
        return 0.0
    return sum(lengths[number] for group in packs for number in group) / (len(packs) * capacity)
