"""Which samples a rank sees in which micro-batch: the same optimizer steps for every layout.

The order of an epoch is cut into optimizer steps first, and each step is then dealt out to ranks
and micro-batches. So 1 rank x 8 samples, 2 x 4 and 1 x 2 with 4 accumulations train on the same
samples in the same step. Given the tokens of the samples, a step is dealt out so that its
micro-batches are about equally long: no rank waits for another, and none needs more memory; the
number of samples in each may then differ. Nothing is repeated to make the ranks even: a rank that
has no sample left gets an empty micro-batch, which the collator turns into one token without a
target.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_LENGTH_WINDOW_STEPS = 50


@dataclass(frozen=True)
class Layout:
    """How the samples of one optimizer step are spread.

    Attributes:
        micro_batch_size: samples (packs, when packing) in one forward pass, on average of a step.
        accumulation_steps: forward passes of one rank in one optimizer step.
        rank: this process.
        world_size: processes that train together.
    """

    micro_batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def num_batches(self) -> int:
        """Micro-batches of one optimizer step over all ranks."""
        return self.accumulation_steps * self.world_size

    @property
    def step_size(self) -> int:
        """Samples (packs) of one optimizer step over all ranks."""
        return self.micro_batch_size * self.num_batches


class StepBatches:
    """A batch sampler: yields the sample numbers of each micro-batch of one rank.

    Args:
        num_samples: samples in the dataset.
        layout: how a step is spread over ranks and micro-batches.
        seed: decides the order, together with the epoch.
        shuffle: draw a new order every epoch; False keeps the file order.
        packs: sample numbers that go together; None when every sample is its own unit.
        lengths: tokens per unit, given to put units of like length into the same step.
        levelled: tokens per unit, given to make the micro-batches of a step about equally long.
        drop_last: leave out the last step of an epoch when it is not full.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        layout: Layout,
        seed: int,
        shuffle: bool,
        packs: Sequence[Sequence[int]] | None = None,
        lengths: Sequence[int] | None = None,
        levelled: Sequence[int] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.layout = layout
        self.epoch = 0
        self._packs = packs
        self._num_units = num_samples if packs is None else len(packs)
        self._drop_last = drop_last
        self._seed = seed
        self._shuffle = shuffle
        self._lengths = lengths
        self._levelled = None if levelled is None else np.asarray(levelled)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the given epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the micro-batches of this rank in one epoch."""
        full_steps, rest = divmod(self._num_units, self.layout.step_size)
        rest = 0 if self._drop_last else rest
        return full_steps * self.layout.accumulation_steps + self._passes(rest)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of sample numbers; a list may be empty in the last step of the epoch."""
        order = self._order()
        step_size = self.layout.step_size
        rest = self._num_units % step_size if self._drop_last else 0
        for start in range(0, self._num_units - rest, step_size):
            yield from self._deal(order[start : start + step_size])

    def _deal(self, units: np.ndarray) -> Iterator[list[int]]:
        """Yield this rank's share of each pass."""
        passes = self._passes(len(units))
        if passes == 0:
            return
        ranks = self.layout.world_size
        count = passes * ranks
        if self._levelled is None or count == 1:
            groups = np.array_split(units, count)  # they differ by one unit at most
        else:
            tokens = self._levelled[units].tolist()
            groups = [units[group] for group in level(tokens, count, ranks=ranks)]
        for own in groups[self.layout.rank :: ranks]:
            yield [number for unit in own.tolist() for number in self._members(unit)]

    def _passes(self, num_units: int) -> int:
        layout = self.layout
        return math.ceil(math.ceil(num_units / layout.micro_batch_size) / layout.world_size)

    def _members(self, unit: int) -> Sequence[int]:
        return [unit] if self._packs is None else self._packs[unit]

    def _order(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._num_units)
        random = np.random.default_rng([self._seed, self.epoch])
        order = random.permutation(self._num_units)
        if self._lengths is None:
            return order
        return self._group_by_length(order, np.asarray(self._lengths), random)

    def _group_by_length(
        self, order: np.ndarray, lengths: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Sort by length inside windows of some steps, then shuffle the steps of each window."""
        window = _LENGTH_WINDOW_STEPS * self.layout.step_size
        grouped = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(-lengths[part], kind="stable")]
            whole = len(part) // self.layout.step_size * self.layout.step_size
            steps = part[:whole].reshape(-1, self.layout.step_size)
            grouped += [random.permutation(steps).reshape(-1), part[whole:]]
        return np.concatenate(grouped)


def level(tokens: Sequence[int], count: int, *, ranks: int = 1) -> list[list[int]]:
    """Deal units out so that every group has about the same number of tokens.

    The longest unit goes first, each to the group with the fewest tokens, so no group is empty
    where there are enough units. Groups of like length then stand in one pass, and the rank that
    has the longest one in a pass has the shortest in the next.

    Args:
        tokens: of each unit.
        count: of groups.
        ranks: groups of one pass.

    Returns:
        Numbers of the units in each group, in their order; the first `ranks` groups are those of
        the first pass.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [(0, place) for place in range(count)]
    for number in sorted(range(len(tokens)), key=lambda number: -tokens[number]):
        total, place = totals[0]
        groups[place].append(number)
        heapq.heapreplace(totals, (total + tokens[number], place))
    order = [place for _, place in sorted(totals, key=lambda pair: (-pair[0], pair[1]))]
    passes = [order[start : start + ranks] for start in range(0, len(order), ranks)]
    turned = [one[::-1] if index % 2 else one for index, one in enumerate(passes)]
    return [sorted(groups[place]) for place in itertools.chain.from_iterable(turned)]
