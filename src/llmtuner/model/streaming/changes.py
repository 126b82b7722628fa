"""What adapters do to one tensor, computed a block of rows at a time, in float32.

Sources: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2402.09353 (DoRA).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmtuner.model.streaming.numbers import Float32
from llmtuner.model.streaming.tensors import StoredTensor, row_blocks


@dataclass(frozen=True)
class LowRank:
    """Add scale · B · A; with DoRA, then bring every output to its learned size.

    Attributes:
        up: lora_B [out, rank], or lora_embedding_B.
        down: lora_A [rank, in], or lora_embedding_A.
        scale: factor of the product.
        is_transposed: the weight is stored as [in, out]: embeddings, and GPT-2's Conv1D.
        magnitude: [out] size of each output; None without DoRA.
    """

    up: StoredTensor
    down: StoredTensor
    scale: float
    is_transposed: bool
    magnitude: StoredTensor | None = None

    @property
    def tensors(self) -> list[StoredTensor]:
        """The tensors that it is made of."""
        return [self.up, self.down, *([self.magnitude] if self.magnitude else [])]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight as it is stored."""
        straight = (self.up.info.shape[0], self.down.info.shape[1])
        return (straight[1], straight[0]) if self.is_transposed else straight


@dataclass(frozen=True)
class AddVector:
    """Add scale · vector: the bias of a B matrix."""

    vector: StoredTensor
    scale: float

    @property
    def tensors(self) -> list[StoredTensor]:
        """The tensors that it is made of."""
        return [self.vector]


Change = LowRank | AddVector


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result.

    Attributes:
        name: its name in the base model's files.
        source: the base's tensor, or the one that an adapter carries instead.
        changes: what the adapters do to it, in order.
    """

    name: str
    source: StoredTensor
    changes: tuple[Change, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.info.shape


def merged_blocks(tensor: MergedTensor) -> Iterator[Float32]:
    """Compute a tensor with all its changes, in blocks of rows [rows, columns]."""
    source = tensor.source
    ready: list[_Ready] = []
    for change in tensor.changes:
        ready.append(_prepare(change, source, ready))
    for start, stop in row_blocks(source.num_rows, source.num_columns):
        yield _block(source, ready, start, stop)


@dataclass(frozen=True)
class _Ready:
    """A change with its small tensors in memory.

    Attributes:
        change: what to do.
        right: [rank, columns] or, for a vector, all of it as [rows, 1].
        left: [rows, rank], where it has to be turned round; otherwise it is read by blocks.
        magnitude: [out] in float32.
        column_factors: [columns] learned over actual size, where outputs are columns.
    """

    change: Change
    right: Float32
    left: Float32 | None = None
    magnitude: Float32 | None = None
    column_factors: Float32 | None = None


def _prepare(change: Change, source: StoredTensor, before: Sequence[_Ready]) -> _Ready:
    if isinstance(change, AddVector):
        return _Ready(change, change.vector.read())
    magnitude = None if change.magnitude is None else change.magnitude.read().ravel()
    if not change.is_transposed:
        return _Ready(change, change.down.read(), magnitude=magnitude)
    left, right = np.ascontiguousarray(change.down.read().T), change.up.read().T
    if magnitude is None:
        return _Ready(change, right, left)
    # The size of a column is known only after all rows: one more pass.
    grown = [*before, _Ready(change, right, left)]
    squares = np.zeros(source.num_columns, np.float32)
    for start, stop in row_blocks(source.num_rows, source.num_columns):
        squares += np.square(_block(source, grown, start, stop)).sum(axis=0)
    return _Ready(
        change, right, left, column_factors=(magnitude / np.sqrt(squares)).astype(np.float32)
    )


def _block(source: StoredTensor, changes: Sequence[_Ready], start: int, stop: int) -> Float32:
    block = source.read(start, stop)
    for ready in changes:
        _apply(ready, block, start, stop)
    return block


def _apply(ready: _Ready, block: Float32, start: int, stop: int) -> None:
    change = ready.change
    if isinstance(change, AddVector):
        block += ready.right[start:stop] * np.float32(change.scale)
        return
    left = change.up.read(start, stop) if ready.left is None else ready.left[start:stop]
    delta = left @ ready.right
    delta *= np.float32(change.scale)
    block += delta
    if ready.magnitude is not None:
        sizes = np.linalg.norm(block, axis=1)
        block *= (ready.magnitude[start:stop] / sizes)[:, None]
    if ready.column_factors is not None:
        block *= ready.column_factors
