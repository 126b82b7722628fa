"""Safetensors files read by their headers: names, shapes and a fingerprint, without the weights."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ModelError
from llmtuner.extras.files import read_json

_SAMPLE_BYTES = 1024
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: safetensors' name of the type ("BF16").
        shape: sizes of the dimensions.
        start: offset of the first byte in the file.
        num_bytes: size of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the names, types and shapes of the tensors in a safetensors file, and check its size.

    Raises:
        ModelError: the file is cut short or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _tensor_info(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"The weight file is damaged ({error}).", where=str(path)) from error
    end = max((info.start + info.num_bytes for info in tensors.values()), default=8 + length)
    if end != size:
        raise ModelError(
            "The weight file is cut short or damaged.",
            where=str(path),
            got=f"{size} bytes",
            allowed=f"{end} bytes",
            fix="copy or download it again",
        )
    return tensors


def base_digest(model_dir: Path) -> str:
    """Return a sha256 that tells one base model from another in well under a second.

    It covers name, type, shape and the first and last KiB of every tensor, so that a fine-tuned
    sibling differs although its shapes agree, while another shard size does not matter.
    """
    parts: dict[str, str] = {}
    for path in weight_files(model_dir):
        header = read_header(path)
        with path.open("rb") as file:
            for name, info in header.items():
                digest = hashlib.sha256(f"{name}|{info.dtype}|{info.shape}|".encode())
                file.seek(info.start)
                digest.update(file.read(min(_SAMPLE_BYTES, info.num_bytes)))
                file.seek(info.start + max(0, info.num_bytes - _SAMPLE_BYTES))
                digest.update(file.read(min(_SAMPLE_BYTES, info.num_bytes)))
                parts[name] = digest.hexdigest()
    lines = "\n".join(f"{name} {parts[name]}" for name in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files that `from_pretrained` would read."""
    index = model_dir / _INDEX
    single = model_dir / "model.safetensors"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [model_dir / name for name in sorted(set(_weight_map(index).values()))]


def indexed_names(model_dir: Path) -> set[str]:
    """Return the tensors that the index of several weight files promises; none for one file."""
    index = model_dir / _INDEX
    is_used = index.is_file() and not (model_dir / "model.safetensors").is_file()
    return set(_weight_map(index)) if is_used else set()


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = read_json(index)["weight_map"]
        if not all(Path(name).name == name for name in found.values()):
            raise ValueError("a file name is a path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The index of the weight files is damaged ({error!r}).",
            where=str(index),
            fix="copy or download the model again",
        ) from error
    return found


def check_weight_files(model_dir: Path) -> None:
    """Check that the folder has all its weights, as safetensors.

    Raises:
        ModelError: files are missing, or pickled.
    """
    files = weight_files(model_dir)
    missing = [path.name for path in files if not path.is_file()]
    if files and not missing:
        return
    pickled = sorted(path.name for path in model_dir.glob("*.bin"))
    if pickled and not files:
        raise ModelError(
            "The model's weights are pickled, and reading them could run code.",
            where=str(model_dir),
            got=pickled,
            allowed="model.safetensors",
            fix="convert the model to safetensors on a machine that you do not mind losing",
        )
    raise ModelError(
        "The model's weights are missing.",
        where=str(model_dir),
        got=missing or sorted(path.name for path in model_dir.iterdir()),
        allowed="model.safetensors, or model.safetensors.index.json with all its files",
        fix="copy or download the model again",
    )


def _tensor_info(entry: dict[str, Any], data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)
