"""The tensors of an adapter, sorted by the module they belong to and by what they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmtuner.extras.errors import ModelError
from llmtuner.model.adapters import WEIGHTS_FILE
from llmtuner.model.streaming.tensors import StoredTensor, stored_tensors

_PREFIX = "base_model.model."
# Ending of a tensor's name -> the part of a low-rank module that it is.
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_BASE_LAYER = ".base_layer."
_COPY = ".modules_to_save."
_ORIGINAL = ".original_module."


@dataclass
class AdapterTensors:
    """What an adapter's file holds.

    Attributes:
        where: the file, for messages.
        names: full names of the tensors that have an effect; the untrained twin of a module
            that was saved whole has none.
        low_rank: module -> part -> tensor.
        whole: parameter of the model -> the tensor that takes its place.
        base_layers: parameter -> the base's own weight as it was when the adapter was trained;
            adapters carry it where the vocabulary may have grown.
    """

    where: str
    names: list[str] = field(default_factory=list)
    low_rank: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    base_layers: dict[str, StoredTensor] = field(default_factory=dict)


def read_adapter_tensors(folder: Path) -> AdapterTensors:
    """Sort the tensors of an adapter by their names; loads no weights.

    Raises:
        ModelError: a name is of no known form, or two tensors mean the same and differ.
    """
    path = folder / WEIGHTS_FILE
    tensors = stored_tensors(path)
    found = AdapterTensors(str(path))
    for name, tensor in tensors.items():
        if not name.startswith(_PREFIX):
            raise _unknown(found, name)
        short = name.removeprefix(_PREFIX)
        if _is_twin(short, tensor, tensors):
            continue
        found.names.append(name)
        if not _put_part(short, tensor, found):
            _put_whole(short, tensor, found)
    return found


def _is_twin(name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> bool:
    """Tell whether a tensor repeats another: the weight before training, or the same once more."""
    if _ORIGINAL in name:
        return True
    twin = tensors.get(_PREFIX + name.replace(_COPY, "."))
    return _COPY in name and twin is not None and same_content(twin, tensor)


def _put_part(name: str, tensor: StoredTensor, found: AdapterTensors) -> bool:
    for ending, part in _PARTS.items():
        if name.endswith(ending):
            parts = found.low_rank.setdefault(name.removesuffix(ending), {})
            if part in parts:
                raise _unknown(found, name)
            parts[part] = tensor
            return True
    return False


def _put_whole(name: str, tensor: StoredTensor, found: AdapterTensors) -> None:
    if ".lora_" in name or ".token_adapter." in name:
        raise _unknown(found, name)
    places = found.base_layers if _BASE_LAYER in name else found.whole
    plain = name.replace(_BASE_LAYER, ".").replace(_COPY, ".")
    if plain in places:
        raise _unknown(found, name)
    places[plain] = tensor


def same_content(one: StoredTensor, other: StoredTensor) -> bool:
    """Tell whether two tensors hold the same bytes in the same shape."""
    if one == other:
        return True
    if (one.info.dtype, one.info.shape) != (other.info.dtype, other.info.shape):
        return False
    pairs = zip(one.read_bytes(), other.read_bytes(), strict=True)
    return all(left == right for left, right in pairs)


def _unknown(found: AdapterTensors, name: str) -> ModelError:
    return ModelError(
        "The adapter holds a tensor whose place in the model is not known.",
        where=found.where,
        got=name,
        fix="merge it with the peft that wrote it",
    )
