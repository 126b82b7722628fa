"""What the frozen lower layers make of each sample, kept from the first epoch for the later ones.

Below the lowest layer that learns, a sample gives the same hidden states in every epoch: attention
does not leave the sample, and nothing there is random or changes. So they are computed once and
written to a nameless file, which the system deletes with the process; later epochs read them and
begin at the first layer that learns.
"""

import hashlib
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from llmtuner.data.collate import Batch
from llmtuner.data.lengths import sample_lengths
from llmtuner.extras.env import process_env
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.model.attention import uses_flat_batches
from llmtuner.model.frozen import frozen_layers

logger = get_logger(__name__)

_GB = 1e9
_KEY_BYTES = 16


class FrozenCache:
    """Keeps the output of the last of some frozen layers for every sample.

    Args:
        layers: from the lowest; all of them are left out where everything is kept.
        folder: where the nameless file is.
        num_tokens: of all samples that may come.
        most_bytes: size of the file at most.
    """

    def __init__(
        self, layers: list[nn.Module], *, folder: Path, num_tokens: int, most_bytes: float
    ) -> None:
        self.hits = self.misses = 0
        self._layers = layers
        self._folder, self._num_tokens, self._most_bytes = folder, num_tokens, most_bytes
        self._places: dict[bytes, slice] = {}
        self._rows: Tensor | None = None  # [num_tokens, n], in the file
        self._used = 0
        self._is_open = True
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._kept: Tensor | None = None
        self._before = [vars(layer).get("forward") for layer in layers]  # of the fast layers
        for layer in layers:
            own = partial(self._forward, layer.forward, is_last=layer is layers[-1])
            layer.forward = own  # type: ignore[method-assign]

    @contextmanager
    def serving(self, inputs: Batch) -> Iterator[None]:
        """Leave the layers out in a forward pass over samples that are all kept; else keep them.

        Args:
            inputs: a flat batch.
        """
        if not self._is_open:
            yield
            return
        self._lengths = inputs["cu_seq_lens_q"].diff().tolist()
        samples = inputs["input_ids"][0].split(self._lengths)
        self._keys = [_key(sample) for sample in samples]
        if self._rows is not None and all(key in self._places for key in self._keys):
            self._kept = torch.cat([self._rows[self._places[key]] for key in self._keys])[None]
            self.hits += len(self._keys)
        else:
            self.misses += len(self._keys)
        try:
            yield
        finally:
            self._kept, self._keys = None, []

    def close(self) -> None:
        """Give the layers their forward passes back and let the file go."""
        for layer, before in zip(self._layers, self._before, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before
        self._layers, self._rows, self._is_open = [], None, False
        logger.info(
            "Frozen layers: %d samples were read from the cache, %d were computed.",
            *(self.hits, self.misses),
        )

    def _forward(
        self, original: Any, hidden_states: Tensor, *args: Any, is_last: bool, **kwargs: Any
    ) -> Tensor:
        if self._kept is not None:
            return self._kept if is_last else hidden_states
        output: Tensor = original(hidden_states, *args, **kwargs)
        if is_last and self._keys and isinstance(output, Tensor):
            self._keep(output.detach()[0])
        return output

    def _keep(self, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = self._open(rows)
        if self._rows is None:
            return
        for key, part in zip(self._keys, rows.split(self._lengths), strict=True):
            end = self._used + len(part)
            if key not in self._places and end <= self._num_tokens:
                self._rows[self._used : end] = part
                self._places[key] = slice(self._used, end)
                self._used = end

    def _open(self, rows: Tensor) -> Tensor | None:
        """Return the file as a tensor; None, and no more trying, where it would be too large."""
        size = self._num_tokens * rows.shape[1] * rows.element_size()
        free = shutil.disk_usage(self._folder).free
        if size > min(self._most_bytes, free):
            logger.warning(
                "Frozen layers are computed in every epoch: keeping what they make takes %.2f GB; "
                "cache_frozen_layers allows %.2f GB, and %.2f GB of the disk are free.",
                *(size / _GB, self._most_bytes / _GB, free / _GB),
            )
            self._is_open = False
            return None
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(mapped, dtype=rows.dtype).view(self._num_tokens, -1)


def open_frozen_cache(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    train: Any,
    *,
    folder: Path,
) -> FrozenCache | None:
    """Return the cache if it is asked for; None, with the reason in the log, if it cannot be.

    Args:
        config: the resolved settings.
        model: ready to train.
        train: the training set.
        folder: for the file.
    """
    most_gb = config.train.cache_frozen_layers
    if not most_gb or not config.train.do_train:
        return None
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = frozen_layers(inner)
    problem = _problem(config, inner, layers, train)
    if problem is not None:
        logger.warning("cache_frozen_layers has no effect: %s.", problem)
        return None
    logger.info("Frozen layers: the lowest %d are computed once for each sample.", len(layers))
    return FrozenCache(
        layers,
        folder=folder,
        num_tokens=int(sample_lengths(train).sum()),
        most_bytes=most_gb * _GB,
    )


def _problem(
    config: RunConfig, model: PreTrainedModel, layers: list[nn.Module], train: Any
) -> str | None:
    """Return why outputs cannot be kept, or None."""
    reasons = {
        "every layer learns, or an embedding does": not layers,
        "it keeps samples that are laid end to end": not uses_flat_batches(
            model.config._attn_implementation
        ),
        "the balance of experts looks at every layer": bool(
            model.config.get_text_config().to_dict().get("output_router_logits")
        ),
        "a stream has no epochs": not isinstance(train, Dataset),
        "there is one epoch only": config.train.max_steps <= 0
        and config.train.num_train_epochs <= 1,
        "neftune_noise_alpha changes the embeddings": config.train.neftune_noise_alpha is not None,
        "the frozen layers have dropout": _has_dropout(model),
        "it is for one process": process_env().world_size > 1 or config.train.deepspeed is not None,
        "it is for CPUs": model.device.type != "cpu" or torch.cuda.is_available(),
        "torch_compile compiles the layers": config.train.compiles,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_dropout(model: PreTrainedModel) -> bool:
    """Tell whether the model itself, without adapters, drops anything."""
    values = model.config.get_text_config().to_dict().items()
    of_settings = [value for name, value in values if "drop" in name]
    if any(isinstance(value, float) and value > 0 for value in of_settings):
        return True
    return any(
        isinstance(module, _DropoutNd) and module.p > 0 and "lora" not in name
        for name, module in model.named_modules()
    )


def _key(ids: Tensor) -> bytes:
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=_KEY_BYTES).digest()
