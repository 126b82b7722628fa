"""Packing, dealing out and collating: nothing lost, nothing twice, the same steps everywhere."""

import itertools
import math

import numpy as np
import pytest
import torch

from llmtuner.data.batches import Layout, StepBatches, level
from llmtuner.data.collate import FlatCollator, PaddedCollator
from llmtuner.data.packing import fill_ratio, pack
from llmtuner.extras.errors import DataError


def log_normal_lengths(count: int, *, capacity: int, seed: int = 0, mean: float = 5.5) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(mean, 1.0, count)
    return [int(length) for length in np.clip(drawn, 4, capacity)]


def test_packs_hold_every_sample_once_and_fit() -> None:
    lengths = log_normal_lengths(5000, capacity=4096)
    packs = pack(lengths, capacity=4096, seed=1)
    assert sorted(itertools.chain.from_iterable(packs)) == list(range(5000))
    assert all(sum(lengths[n] for n in group) <= 4096 for group in packs)


@pytest.mark.parametrize(
    ("capacity", "mean", "least"), [(4096, 5.5, 0.995), (16384, 6.0, 0.99), (16384, 8.0, 0.99)]
)
def test_packs_are_full(capacity: int, mean: float, least: float) -> None:
    lengths = log_normal_lengths(20_000, capacity=capacity, mean=mean)
    packs = pack(lengths, capacity=capacity, seed=1)
    assert fill_ratio(packs, lengths, capacity=capacity) >= least


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("capacity", "mean"), [(2048, 5.5), (16, 1.0), (99_999, 9.0)])
def test_packs_are_those_of_the_plain_way(seed: int, capacity: int, mean: float) -> None:
    lengths = log_normal_lengths(2000, capacity=capacity, mean=mean)
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    packs: list[list[int]] = []
    free: list[int] = []
    for number in sorted(order, key=lambda one: -lengths[one]):
        fitting = [(room, n) for n, room in enumerate(free) if room >= lengths[number]]
        if not fitting:
            packs.append([])
            free.append(capacity)
        chosen = min(fitting)[1] if fitting else len(packs) - 1
        packs[chosen].append(number)
        free[chosen] -= lengths[number]
    assert pack(lengths, capacity=capacity, seed=seed) == packs


def test_packs_depend_on_the_seed_alone() -> None:
    lengths = [10] * 50
    assert pack(lengths, capacity=40, seed=3) == pack(lengths, capacity=40, seed=3)
    assert pack(lengths, capacity=40, seed=3) != pack(lengths, capacity=40, seed=4)


def test_a_sample_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(DataError, match="does not fit"):
        pack([10, 50], capacity=40, seed=0)


LAYOUTS = [
    [Layout(8)],
    [Layout(2, accumulation_steps=4)],
    [Layout(1, accumulation_steps=8)],
    [Layout(2, accumulation_steps=2, rank=rank, world_size=2) for rank in (0, 1)],
    [Layout(1, accumulation_steps=2, rank=rank, world_size=4) for rank in range(4)],
]


def steps_of(ranks: list[Layout], num_samples: int, epoch: int) -> list[list[int]]:
    """Return the samples of every optimizer step, over all ranks and accumulations."""
    accumulation = ranks[0].accumulation_steps
    per_rank = []
    for layout in ranks:
        batches = StepBatches(num_samples, layout=layout, seed=5, shuffle=True)
        batches.set_epoch(epoch)
        seen = list(batches)
        assert len(seen) == len(batches)
        per_rank.append(seen)
    assert len({len(seen) for seen in per_rank}) == 1, "ranks must take the same number of passes"
    steps = []
    for start in range(0, len(per_rank[0]), accumulation):
        chunk = [seen[start : start + accumulation] for seen in per_rank]
        steps.append(sorted(n for part in chunk for batch in part for n in batch))
    return steps


@pytest.mark.parametrize("num_samples", [64, 61, 9, 3])
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_trains_the_same_steps(ranks: list[Layout], num_samples: int) -> None:
    expected = steps_of([Layout(8)], num_samples, epoch=1)
    assert steps_of(ranks, num_samples, epoch=1) == expected
    assert sorted(itertools.chain.from_iterable(expected)) == list(range(num_samples))


@pytest.mark.parametrize("world", [1, 2, 8, 64, 512, 4096])
def test_up_to_4096_ranks_take_the_order_of_one_rank_apart(world: int) -> None:
    (whole,) = StepBatches(4100, layout=Layout(4100), seed=5, shuffle=True)
    passes = 4096 // world  # so that a step is 4,096 samples, whoever takes them
    layouts = [Layout(1, passes, rank, world) for rank in range(world)]
    per_rank = [list(StepBatches(4100, layout=one, seed=5, shuffle=True)) for one in layouts]
    dealt = [batch for one_pass in zip(*per_rank, strict=True) for batch in one_pass]
    assert [number for batch in dealt for number in batch] == whole
    assert len(dealt) == 4096 + math.ceil(4 / world) * world


class Rows:
    """A data set that remembers which rows were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> int:
        self.read.append(number)
        return number


def test_a_rank_reads_its_own_rows_only() -> None:
    read = []
    for rank in range(4):
        rows = Rows()
        batches = StepBatches(100, layout=Layout(3, 2, rank, 4), seed=1, shuffle=True)
        loader = torch.utils.data.DataLoader(rows, batch_sampler=batches, collate_fn=list)
        assert [number for batch in loader for number in batch] == rows.read
        assert len(rows.read) in (25, 26, 24)
        read += rows.read
    assert sorted(read) == list(range(100))


SPREADS = [
    Layout(1, accumulation_steps=8),
    Layout(4, accumulation_steps=4),
    Layout(2, accumulation_steps=2, world_size=4),
    Layout(8, world_size=2),
]


def micro_batches(layout: Layout, lengths: list[int], *, levels: bool) -> list[list[list[int]]]:
    """Return the micro-batches of each step: first pass, all ranks, then the next pass."""
    per_rank = [
        list(
            StepBatches(
                len(lengths),
                layout=Layout(
                    layout.micro_batch_size, layout.accumulation_steps, rank, layout.world_size
                ),
                seed=7,
                shuffle=True,
                levelled=lengths if levels else None,
            )
        )
        for rank in range(layout.world_size)
    ]
    passes = [list(one_pass) for one_pass in zip(*per_rank, strict=True)]
    size = layout.accumulation_steps
    return [
        list(itertools.chain.from_iterable(passes[start : start + size]))
        for start in range(0, len(passes), size)
    ]


def test_a_sample_goes_where_it_fits_exactly_even_into_the_first_pack() -> None:
    assert pack([5, 3], capacity=8, seed=0) == [[0, 1]]


@pytest.mark.parametrize("num_samples", [640, 613, 5])
@pytest.mark.parametrize("layout", SPREADS)
def test_levelling_keeps_the_samples_of_a_step(layout: Layout, num_samples: int) -> None:
    lengths = log_normal_lengths(num_samples, capacity=2048)
    plain = micro_batches(layout, lengths, levels=False)
    levelled = micro_batches(layout, lengths, levels=True)
    assert len(plain) == len(levelled)
    for before, after in zip(plain, levelled, strict=True):
        assert [bool(one) for one in before] == [bool(one) for one in after]  # no rank runs dry
        assert sorted(itertools.chain(*before)) == sorted(itertools.chain(*after))
    assert levelled == micro_batches(layout, lengths, levels=True)


@pytest.mark.parametrize("layout", SPREADS[1:])
def test_levelling_lowers_the_longest_micro_batch(layout: Layout) -> None:
    lengths = log_normal_lengths(640, capacity=2048)

    def longest(*, levels: bool) -> list[int]:
        steps = micro_batches(layout, lengths, levels=levels)
        return [max(sum(lengths[n] for n in batch) for batch in step) for step in steps]

    before, after = longest(levels=False), longest(levels=True)
    assert sum(after) < 0.9 * sum(before)
    assert max(after) < 0.9 * max(before)


def test_levelling_deals_the_longest_first_to_the_emptiest() -> None:
    assert level([5, 1, 9, 3, 2, 8], 3) == [[4, 5], [2], [0, 1, 3]]
    assert level([4, 4, 4], 2) == [[0, 2], [1]]  # the longest group first
    assert level([7], 2) == [[0], []]


def test_ranks_get_groups_of_like_length_in_a_pass_and_take_turns_with_the_longest() -> None:
    groups = level([1, 2, 3, 4, 5, 6, 7, 8, 9], 9, ranks=3)
    assert groups == [[8], [7], [6], [3], [4], [5], [2], [1], [0]]


def test_levelling_makes_ranks_wait_less() -> None:
    lengths = log_normal_lengths(640, capacity=2048)

    def slowest_rank(*, levels: bool) -> int:
        steps = micro_batches(Layout(2, 2, world_size=4), lengths, levels=levels)
        tokens = [[sum(lengths[n] for n in batch) for batch in step] for step in steps]
        return sum(max(sum(step[rank::4]) for rank in range(4)) for step in tokens)

    assert slowest_rank(levels=True) < 0.85 * slowest_rank(levels=False)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_levelled_groups_differ_by_less_than_the_longest_unit(count: int) -> None:
    lengths = log_normal_lengths(count * 16, capacity=4096, seed=count)
    groups = level(lengths, count)
    totals = [sum(lengths[n] for n in group) for group in groups]
    assert max(totals) - min(totals) <= max(lengths)


def test_one_micro_batch_in_a_step_keeps_its_order() -> None:
    lengths = log_normal_lengths(64, capacity=2048)
    plain, levelled = (micro_batches(Layout(8), lengths, levels=levels) for levels in (False, True))
    assert plain == levelled


def test_epochs_have_different_orders_and_no_shuffle_keeps_the_file_order() -> None:
    assert steps_of([Layout(8)], 64, epoch=0) != steps_of([Layout(8)], 64, epoch=1)
    in_order = StepBatches(10, layout=Layout(4), seed=0, shuffle=False)
    assert list(in_order) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_packs_stay_together() -> None:
    batches = StepBatches(5, layout=Layout(1), seed=0, shuffle=False, packs=[[4, 0], [1, 2, 3]])
    assert list(batches) == [[4, 0], [1, 2, 3]]


def test_length_groups_lose_nothing_and_reduce_spread() -> None:
    lengths = log_normal_lengths(400, capacity=1000)
    plain = StepBatches(400, layout=Layout(8), seed=0, shuffle=True)
    grouped = StepBatches(400, layout=Layout(8), seed=0, shuffle=True, lengths=lengths)
    assert sorted(itertools.chain.from_iterable(grouped)) == list(range(400))

    def spread(batches: StepBatches) -> float:
        return sum(max(lengths[n] for n in b) - min(lengths[n] for n in b) for b in batches)

    assert spread(grouped) < 0.2 * spread(plain)


ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9, 10, 11], "labels": [8, -100, 10, 11]},
]


def test_flat_batch() -> None:
    batch = FlatCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 7]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 4
    # A label is predicted at the place before it; the first token of a sample by nothing at all.
    assert batch["kept"].tolist() == [0, 1, 4, 5]
    assert batch["targets"].tolist() == [6, 7, 10, 11]


def test_padded_batch_keeps_the_same_targets() -> None:
    batch = PaddedCollator(pad_id=3)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["targets"].tolist() == [6, 7, 10, 11]
    assert batch["kept"].tolist() == [0, 1, 5, 6]


@pytest.mark.parametrize("collator", [FlatCollator(), PaddedCollator()])
def test_an_empty_micro_batch_is_one_token_without_a_target(collator: FlatCollator) -> None:
    batch = collator([])
    assert batch["input_ids"].shape == (1, 1)
    assert batch["targets"].numel() == 0


def test_nested_rows_are_packs() -> None:
    assert FlatCollator()([ROWS])["input_ids"].shape == (1, 7)
