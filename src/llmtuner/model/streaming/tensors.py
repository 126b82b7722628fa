"""Tensors in safetensors files, read a few rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtuner.extras.errors import ModelError
from llmtuner.model.streaming.numbers import STORED, Float32, to_float32
from llmtuner.model.weights import TensorInfo, read_header

BLOCK_NUMBERS = 1 << 20
"""Numbers that are held at a time: some MB, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        path: the file.
        name: the tensor's name in it.
        info: type, shape and place.
    """

    path: Path
    name: str
    info: TensorInfo

    @property
    def is_floating(self) -> bool:
        """Whether its numbers can be read as float32."""
        return self.info.dtype in STORED

    @property
    def num_rows(self) -> int:
        """Size of the first dimension; 1 for a single number."""
        return self.info.shape[0] if self.info.shape else 1

    @property
    def num_columns(self) -> int:
        """Numbers in a row."""
        return math.prod(self.info.shape[1:])

    def read_stored(self, start: int, stop: int) -> np.ndarray:
        """Read the rows [start, stop) as they are stored: [rows, columns].

        Raises:
            ModelError: the file cannot be read, or has become shorter.
        """
        dtype = STORED[self.info.dtype]
        rows = np.empty((stop - start, self.num_columns), dtype)
        offset = self.info.start + start * self.num_columns * dtype.itemsize
        _read_into(self.path, offset, rows.data.cast("B"))
        return rows

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        """Read the rows [start, stop), or all, in float32: [rows, columns]."""
        last = self.num_rows if stop is None else stop
        return to_float32(self.read_stored(start, last), self.info.dtype)

    def read_bytes(self) -> Iterator[memoryview]:
        """Read the whole tensor in parts, as it is; each part is valid until the next."""
        buffer = bytearray(min(self.info.num_bytes, 4 * BLOCK_NUMBERS))
        for offset in range(0, self.info.num_bytes, max(len(buffer), 1)):
            part = memoryview(buffer)[: self.info.num_bytes - offset]
            _read_into(self.path, self.info.start + offset, part)
            yield part


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, in the order they lie in it.

    Raises:
        ModelError: the file is damaged.
    """
    header = sorted(read_header(path).items(), key=lambda item: item[1].start)
    return {name: StoredTensor(path, name, info) for name, info in header}


def row_blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks of about `BLOCK_NUMBERS` numbers."""
    step = max(1, BLOCK_NUMBERS // max(num_columns, 1))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _read_into(path: Path, offset: int, target: memoryview) -> None:
    # Unbuffered reads leave nothing behind; a memory map would count as used memory.
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while target:
                count = file.readinto(target)
                if not count:
                    raise OSError("it has become shorter")
                target = target[count:]
    except OSError as error:
        raise ModelError(
            f"The weight file cannot be read ({error.strerror or error}).", where=str(path)
        ) from error
