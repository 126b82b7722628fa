"""Streaming: rows are read, encoded and shuffled in a buffer while training goes on.

The stream has no end, so `max_steps` decides how long training is. Every rank reads all rows and
keeps its own share; a rank never waits for another one.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info

from llmtuner.data.counts import note_bad_rows, start_counts, tally
from llmtuner.data.dataset_info import DatasetSpec
from llmtuner.data.packing import pack
from llmtuner.data.records import BadRows
from llmtuner.data.render import Sample
from llmtuner.data.rows import load_conversations
from llmtuner.data.tokenise import Encoder
from llmtuner.extras.env import process_env
from llmtuner.extras.errors import DataError
from llmtuner.hparams.data import DataArgs

TrainRow = dict[str, Any]


class SampleStream(IterableDataset[TrainRow | list[TrainRow]]):
    """Endless samples (or packs of samples) of this rank.

    Args:
        specs: the data sets; their rows come one set after another, in every epoch.
        args: `buffer_size`, `cutoff_len` and how to read.
        encode: makes samples of a conversation.
        seed: decides the order inside the buffer, together with the epoch.
        packing: yield lists of samples that fill `cutoff_len`.
        num_held_out: rows at the head that belong to validation.

    `counts` tells, per data set, what this process has read of the first epoch so far.
    """

    def __init__(
        self,
        specs: Sequence[DatasetSpec],
        args: DataArgs,
        *,
        encode: Encoder,
        seed: int,
        packing: bool,
        num_held_out: int = 0,
    ) -> None:
        self._specs = specs
        self._args = args
        self._encode = encode
        self._seed = seed
        self._packing = packing
        self._num_held_out = num_held_out
        self.counts = {spec.name: start_counts(spec) for spec in specs}

    def __iter__(self) -> Iterator[TrainRow | list[TrainRow]]:
        """Yield this rank's share for ever.

        Raises:
            DataError: a whole pass over the data gave no sample.
        """
        worker = get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        env = process_env()
        share, shares = env.rank * num_workers + worker_id, env.world_size * num_workers
        for epoch in itertools.count():
            num_samples = 0
            for unit in self._epoch(epoch, share=share, shares=shares):
                num_samples += 1
                yield unit
            if num_samples == 0:
                raise DataError(
                    "The stream holds no sample for one of the processes.",
                    got=[spec.name for spec in self._specs],
                    fix="use more data, fewer processes, or a smaller val_size",
                )

    def _epoch(self, epoch: int, *, share: int, shares: int) -> Iterator[TrainRow | list[TrainRow]]:
        order = random.Random(f"{self._seed}-{epoch}")
        samples = self._samples(epoch, share=share, shares=shares)
        while buffer := list(islice(samples, self._args.buffer_size)):
            order.shuffle(buffer)
            if not self._packing:
                yield from map(_to_row, buffer)
                continue
            lengths = [len(sample.input_ids) for sample in buffer]
            for group in pack(lengths, capacity=self._args.cutoff_len, seed=self._seed):
                yield [_to_row(buffer[number]) for number in group]

    def _samples(self, epoch: int, *, share: int, shares: int) -> Iterator[Sample]:
        """Yield the samples of this rank's rows, counting them in the first epoch."""
        number = -self._num_held_out
        for spec in self._specs:
            bad_rows = BadRows(self._args.on_bad_row)
            for row in load_conversations(spec, data_args=self._args, bad_rows=bad_rows):
                if number >= 0 and number % shares == share:
                    encoded = self._encode([row])[0]
                    if epoch == 0:
                        tally(self.counts[spec.name], encoded)
                        note_bad_rows(self.counts[spec.name], bad_rows)
                    yield from encoded.samples
                number += 1
            if epoch == 0:
                note_bad_rows(self.counts[spec.name], bad_rows)


def held_out_samples(
    specs: Sequence[DatasetSpec], args: DataArgs, *, encode: Encoder, num_rows: int
) -> Dataset:
    """Return the samples of the first rows, for validation."""
    rows = chain.from_iterable(
        load_conversations(spec, data_args=args, bad_rows=BadRows(args.on_bad_row))
        for spec in specs
    )
    encoded = encode(list(islice(rows, num_rows)))
    return Dataset.from_list([_to_row(sample) for row in encoded for sample in row.samples])


def _to_row(sample: Sample) -> TrainRow:
    return {"input_ids": sample.input_ids, "labels": sample.labels, "source": sample.source}
