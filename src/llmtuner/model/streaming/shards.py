"""Weight files written tensor by tensor, in the layout of transformers' `save_pretrained`.

Source: https://huggingface.co/docs/safetensors (the format).
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmtuner.extras.errors import ModelError
from llmtuner.extras.files import write_json
from llmtuner.model.streaming.changes import MergedTensor, merged_blocks
from llmtuner.model.streaming.numbers import DTYPE_NAMES, STORED, all_finite, from_float32

_ALIGNMENT = 8
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write.

    Attributes:
        tensor: how its numbers come about.
        dtype: safetensors' name of the type to write.
    """

    tensor: MergedTensor
    dtype: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.tensor.name

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of its source."""
        return not self.tensor.changes and self.dtype == self.tensor.source.info.dtype

    @property
    def num_bytes(self) -> int:
        """Its size."""
        if self.is_copy:
            return self.tensor.source.info.num_bytes
        return math.prod(self.tensor.shape) * STORED[self.dtype].itemsize


def write_shards(folder: Path, tensors: Sequence[OutputTensor], *, shard_bytes: int) -> list[Path]:
    """Compute and write all tensors, each file as large as allowed, and the index of several.

    Args:
        folder: exists.
        tensors: in the order to write them.
        shard_bytes: largest file; only a single larger tensor makes a larger one.

    Returns:
        The weight files.

    Raises:
        ModelError: a number is not finite, or does not fit its new type.
    """
    shards = list(_split(tensors, shard_bytes))
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        # Wide types first, so that every tensor begins at a multiple of its own width.
        ordered = sorted(shard, key=lambda tensor: -_width(tensor))
        with (folder / name).open("wb") as file:
            _write_header(file, ordered)
            for tensor in ordered:
                _write_tensor(file, tensor)
    if len(shards) > 1:
        _write_index(folder, dict(zip(names, shards, strict=True)))
    return [folder / name for name in names]


def _split(tensors: Iterable[OutputTensor], shard_bytes: int) -> Iterator[list[OutputTensor]]:
    shard: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]


def _width(tensor: OutputTensor) -> int:
    numbers = math.prod(tensor.tensor.shape)
    return tensor.num_bytes // numbers if numbers else 0


def _write_header(file: BinaryIO, tensors: Sequence[OutputTensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        shape = list(tensor.tensor.shape)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(file: BinaryIO, tensor: OutputTensor) -> None:
    if tensor.is_copy:
        for part in tensor.tensor.source.read_bytes():
            file.write(part)
        return
    for block in merged_blocks(tensor.tensor):
        if not all_finite(block, "F32"):
            raise ModelError(
                f"The merged weights hold numbers that are not finite, in {tensor.name}.",
                where=str(tensor.tensor.source.path),
                fix="give another checkpoint: the base or an adapter is damaged, or its training "
                "diverged",
            )
        rounded = from_float32(block, tensor.dtype)
        if not all_finite(rounded, tensor.dtype):
            raise ModelError(
                f"The weights of {tensor.name} are too large for {DTYPE_NAMES[tensor.dtype]}.",
                got=float(abs(block).max()),
                fix="give --export_dtype bfloat16 or float32",
            )
        file.write(rounded.data.cast("B"))


def _write_index(folder: Path, shards: dict[str, list[OutputTensor]]) -> None:
    everything = [tensor for shard in shards.values() for tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.tensor.shape) for tensor in everything),
            "total_size": sum(tensor.num_bytes for tensor in everything),
        },
        "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
    }
    write_json(folder / INDEX_FILE, index)
