"""The base model's files: every tensor by name, its settings, and which weights are tied."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ModelError
from llmtuner.extras.files import read_json
from llmtuner.model.streaming.tensors import StoredTensor, stored_tensors
from llmtuner.model.weights import check_weight_files, indexed_names, weight_files

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output_layer", "output")
# Models whose head is called otherwise than "lm_head".
_HEAD_NAMES = {"gpt_neox": "embed_out.weight"}
# transformers' models with Conv1D, and the modules in them that are: their matrix is [in, out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class BaseFiles:
    """What is on disk of the base model.

    Attributes:
        folder: the model's folder.
        tensors: by name, in the order of the files.
        config: `config.json`.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]

    def find(self, name: str) -> str | None:
        """Return the name in the files of a parameter of the model, None if there is none.

        Some files (GPT-2's) leave the first part of the names out.
        """
        for candidate in (name, name.partition(".")[2]):
            if candidate in self.tensors:
                return candidate
        return None

    @property
    def text_config(self) -> dict[str, Any]:
        """The settings of the language model, which multimodal models keep one level deeper."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def main_dtype(self) -> str:
        """Safetensors' name of the type of most of the numbers."""
        num_bytes: dict[str, int] = {}
        for tensor in self.tensors.values():
            dtype = tensor.info.dtype
            num_bytes[dtype] = num_bytes.get(dtype, 0) + tensor.info.num_bytes
        return max(num_bytes, key=lambda dtype: num_bytes[dtype])

    @cached_property
    def embedding(self) -> str | None:
        """Name of the embedding, None if it cannot be told."""
        found = [name for name in self.tensors if _module(name) in EMBEDDINGS and _is_matrix(name)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def stored_head(self) -> str | None:
        """Name of the head, None if the files have none of its own."""
        found = [name for name in self.tensors if is_head(name)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        for settings in (self.config, self.text_config):
            if "tie_word_embeddings" in settings:
                return bool(settings["tie_word_embeddings"])
        return self.stored_head is None

    @property
    def head(self) -> str:
        """Name of the head; where the files have none, what transformers calls it."""
        usual = _HEAD_NAMES.get(str(self.config.get("model_type")), "lm_head.weight")
        return self.stored_head or usual

    def is_conv1d(self, module: str, *, otherwise: bool) -> bool:
        """Tell whether a module keeps its matrix as [in, out], where the shape cannot tell.

        Args:
            module: full name.
            otherwise: what the adapter says of models that are not known here.
        """
        if self.config.get("model_type") in _CONV1D_MODELS:
            return module.rpartition(".")[2] in _CONV1D_MODULES
        return otherwise


def read_base(folder: Path) -> BaseFiles:
    """Read the headers of all weight files; loads no weights.

    Raises:
        ModelError: a file is missing, damaged, or of a kind that is not read.
    """
    check_weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        tensors |= stored_tensors(path)
    absent = indexed_names(folder) - tensors.keys()
    if absent or not tensors:
        raise ModelError(
            "The model's files lack some of its weights.",
            where=str(folder),
            got=sorted(absent),
            fix="copy or download the model again",
        )
    return BaseFiles(folder, tensors, _read_config(folder))


def is_head(name: str) -> bool:
    """Tell whether a tensor's name is that of an output head's matrix."""
    module = _module(name)
    is_top = name.count(".") <= 1  # "output" is also a part of many layers
    return _is_matrix(name) and module in _HEADS and (module != "output" or is_top)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"The model's config.json cannot be read ({error}).",
            where=str(folder),
            fix="copy or download the model again",
        ) from error
    if not isinstance(config, dict):
        raise ModelError("The model's config.json is not a JSON object.", where=str(path))
    return config


def _module(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight")
