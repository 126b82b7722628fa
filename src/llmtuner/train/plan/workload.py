"""What a run has to do: tokens, optimizer steps, and its micro-batches, the largest one first."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from datasets import Dataset

from llmtuner.data.batches import Layout, StepBatches
from llmtuner.data.build import BuiltData
from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.data.packing import pack
from llmtuner.hparams.config import RunConfig
from llmtuner.train.plan.simulate import MicroBatch

_MOST_BATCHES = 200_000
"""Micro-batches that are looked at; the largest of more is hardly ever larger."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of every sample.

    Attributes:
        tokens: int64 [samples].
        kept: int64 [samples], places whose next token is trained.
    """

    tokens: np.ndarray
    kept: np.ndarray

    def cut(self, most: int) -> "Lengths":
        """Return what a shorter cutoff would leave, roughly."""
        tokens = np.minimum(self.tokens, most)
        return Lengths(tokens, np.minimum(self.kept, tokens - 1))


@dataclass(frozen=True)
class Workload:
    """What a run has to do.

    Attributes:
        samples: in the training set; None where it is streamed.
        tokens: of one epoch; None where it is streamed.
        supervised_tokens: trained tokens of one epoch; None where it is streamed.
        epochs: passes over the data; None where it is streamed.
        steps: optimizer steps in all.
        micro_batches: forward passes of one rank in one step.
        mean_tokens: of a micro-batch.
        largest: the micro-batch that needs most memory.
        largest_eval: the same of evaluation; None without.
    """

    samples: int | None
    tokens: int | None
    supervised_tokens: int | None
    epochs: float | None
    steps: int
    micro_batches: int
    mean_tokens: float
    largest: MicroBatch
    largest_eval: MicroBatch | None


def lengths_of(dataset: Dataset) -> Lengths:
    """Count the tokens and the trained places of every sample."""
    table = dataset.with_format("arrow")[:]
    labels = _joined(table.column("labels"))
    sizes = np.diff(np.asarray(labels.offsets, dtype=np.int64))
    is_trained = np.asarray(labels.flatten()) != IGNORE_INDEX
    starts = np.concatenate([[0], np.cumsum(sizes)])
    is_trained[starts[:-1][sizes > 0]] = False  # nothing stands before the first token
    sums = np.concatenate([[0], np.cumsum(is_trained)])
    return Lengths(sizes, sums[starts[1:]] - sums[starts[:-1]])


def _joined(column: pa.ChunkedArray) -> pa.ListArray:
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def work_of(
    config: RunConfig, data: BuiltData, *, world_size: int, is_packed: bool, is_flat: bool = True
) -> "Work":
    """Return what the workload of this run follows from."""
    train = lengths_of(data.train) if isinstance(data.train, Dataset) else None
    evals = [lengths_of(part) for part in data.evals.values()] if config.train.do_eval else []
    return Work(config, train, tuple(evals), data.packs, world_size, is_packed, is_flat)


@dataclass(frozen=True, eq=False)
class Work:
    """The settings and lengths that decide the workload; changed settings give another one.

    Attributes:
        config: of the run.
        train: lengths of the training set; None where it is streamed.
        evals: lengths of the sets that are evaluated.
        packs: samples that go together; None without packing.
        world_size: ranks.
        is_packed: whether units are packs.
        is_flat: whether samples lie end to end, without padding.
    """

    config: RunConfig
    train: Lengths | None
    evals: tuple[Lengths, ...]
    packs: Sequence[Sequence[int]] | None
    world_size: int
    is_packed: bool
    is_flat: bool

    def with_config(self, config: RunConfig) -> "Work":
        """Return the work of changed settings; a shorter cutoff cuts the samples."""
        most = config.data.cutoff_len
        if most >= self.config.data.cutoff_len or self.train is None:
            return replace(self, config=config)
        train = self.train.cut(most)
        packs = self.packs
        if packs is not None:
            packs = pack(train.tokens.tolist(), capacity=most, seed=config.train.seed)
        evals = tuple(lengths.cut(most) for lengths in self.evals)
        return replace(self, config=config, train=train, evals=evals, packs=packs)

    def workload(self, *, token_weight: float, kept_weight: float) -> Workload:
        """Lay the run out as the trainer will.

        Args:
            token_weight: bytes that a token costs, roughly; tells which micro-batch is largest.
            kept_weight: bytes that a trained place costs.
        """
        args, train = self.config.train, self.train
        passes = args.gradient_accumulation_steps
        largest_eval = self._largest_eval(token_weight, kept_weight)
        if train is None:
            batch = self._full_batch(args.per_device_train_batch_size)
            tokens = float(batch.num_tokens)
            nothing = (None, None, None, None)
            return Workload(*nothing, args.max_steps, passes, tokens, batch, largest_eval)
        batches = self._batches(train)
        per_epoch = max(1, math.ceil(len(batches) / passes))
        steps = args.max_steps
        if steps <= 0:
            steps = max(1, math.ceil(args.num_train_epochs * per_epoch))
        numbers = self._numbers(batches, min(steps * passes, _MOST_BATCHES))
        best = max(
            (sum(train.tokens[n]) * token_weight + sum(train.kept[n]) * kept_weight, place)
            for place, n in enumerate(numbers)
        )[1]
        seen = sum(int(train.tokens[n].sum()) for n in numbers)
        return Workload(
            samples=len(train.tokens),
            tokens=int(train.tokens.sum()),
            supervised_tokens=int(train.kept.sum()),
            epochs=round(steps / per_epoch, 4),
            steps=steps,
            micro_batches=min(passes, len(batches)),
            mean_tokens=seen / max(len(numbers), 1),
            largest=_micro_batch(train, numbers[best]),
            largest_eval=largest_eval,
        )

    def _batches(self, train: Lengths) -> StepBatches:
        args = self.config.train
        strategy = args.other.get("train_sampling_strategy", "random")
        by_length = strategy == "group_by_length" and not self.is_packed
        return StepBatches(
            len(train.tokens),
            layout=Layout(
                args.per_device_train_batch_size,
                args.gradient_accumulation_steps,
                world_size=self.world_size,
            ),
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=not self.config.finetuning.disable_shuffling and strategy != "sequential",
            packs=self.packs if self.is_packed else None,
            lengths=train.tokens.tolist() if by_length else None,
            levelled=train.tokens.tolist() if self.is_flat and not self.is_packed else None,
            drop_last=bool(args.other.get("dataloader_drop_last", False)),
        )

    def _numbers(self, batches: StepBatches, most: int) -> list[np.ndarray]:
        def epochs() -> Iterator[list[int]]:
            for epoch in itertools.count():
                batches.set_epoch(epoch)
                yield from batches

        taken = itertools.islice(epochs() if len(batches) else iter([[0]]), most)
        return [np.array(numbers, dtype=np.int64) for numbers in taken]

    def _largest_eval(self, token_weight: float, kept_weight: float) -> MicroBatch | None:
        size = self.config.train.per_device_eval_batch_size
        found = [
            (
                lengths.tokens[start : start + size].sum() * token_weight
                + lengths.kept[start : start + size].sum() * kept_weight,
                _micro_batch(lengths, np.arange(start, min(start + size, len(lengths.tokens)))),
            )
            for lengths in self.evals
            for start in range(0, len(lengths.tokens), size)
        ]
        return max(found, key=lambda one: one[0])[1] if found else None

    def _full_batch(self, size: int) -> MicroBatch:
        most = self.config.data.cutoff_len
        return MicroBatch((most,) * size, size * (most - 1))


def _micro_batch(lengths: Lengths, numbers: np.ndarray) -> MicroBatch:
    tokens = tuple(lengths.tokens[numbers].tolist()) or (1,)
    return MicroBatch(tokens, int(lengths.kept[numbers].sum()))
