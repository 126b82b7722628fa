"""How a model reads many texts that begin alike: the beginning once, then the rest of each.

On a CPU in bfloat16, layers with kernels of our own take the rests end to end; every other model
takes them padded, with copies of the key/value cache of the beginning.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from llmtuner.model.attention import (
    padded_attention,
    supports_kept_logits,
    varlen_attention_in,
)
from llmtuner.model.fast.attention import SharedPrefix
from llmtuner.model.fast.layer import can_share_prefix

Model = PreTrainedModel | PeftModel


class Reading(Protocol):
    """Reads a beginning, then any number of batches behind it."""

    def read_prefix(self, ids: Sequence[int]) -> bool:
        """Read the beginning; return whether what follows can be read behind it."""

    def last_logits(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Return the logits behind each sequence, float32 [n, vocabulary], and the tokens read."""


@contextmanager
def open_reading(model: Model) -> Iterator[Reading]:
    """Choose the way of reading that the model can do."""
    base = base_of(model)
    if supports_kept_logits(model) and can_share_prefix(base):
        with varlen_attention_in(base):
            yield _FlatReading(model)
    else:
        with padded_attention(base):
            yield _PaddedReading(model)


def base_of(model: Model) -> PreTrainedModel:
    """Return the model inside its adapter."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


@dataclass
class _FlatReading:
    model: Model
    prefix: SharedPrefix | None = None
    num_shared: int = 0

    def read_prefix(self, ids: Sequence[int]) -> bool:
        self.prefix, self.num_shared = SharedPrefix({}, is_recording=True), 0
        self._read([ids])
        self.prefix, self.num_shared = SharedPrefix(self.prefix.layers, False), len(ids)
        return True

    def last_logits(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        return self._read(sequences).float(), sum(map(len, sequences))

    def _read(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        ends = lengths.cumsum(0)
        borders = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        places = [torch.arange(len(sequence)) + self.num_shared for sequence in sequences]
        logits: Tensor = self.model(
            input_ids=torch.tensor([[token for sequence in sequences for token in sequence]]),
            position_ids=torch.cat(places)[None],
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            shared_prefix=self.prefix,
            logits_to_keep=ends - 1,
            use_cache=False,
        ).logits
        return logits[0]


@dataclass
class _PaddedReading:
    """Sequences are padded on the right, where nothing that counts looks."""

    model: Model
    prefix: Cache | None = None

    def read_prefix(self, ids: Sequence[int]) -> bool:
        tokens = torch.tensor([ids], device=base_of(self.model).device)
        output = self.model(
            input_ids=tokens, use_cache=True, **self._keep(torch.tensor([len(ids) - 1]))
        )
        cache = output.past_key_values
        self.prefix = cache if isinstance(cache, Cache) else None
        return self.prefix is not None

    def last_logits(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        device = base_of(self.model).device
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        kept, column = torch.unique(lengths - 1, return_inverse=True)
        options = self._keep(kept)
        if not options:
            column = lengths - 1
        logits = self.model(
            input_ids=ids.to(device),
            use_cache=self.prefix is not None,
            past_key_values=self._lend(len(sequences)),
            **options,
        ).logits
        return logits[torch.arange(len(sequences)), column].float().cpu(), ids.numel()

    def _keep(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the argument by which only some positions go through the head."""
        if not supports_kept_logits(self.model):
            return {}
        return {"logits_to_keep": positions.to(base_of(self.model).device)}

    def _lend(self, count: int) -> Cache | None:
        """Return a cache of `count` equal rows; what a pass adds does not reach the original."""
        if self.prefix is None:
            return None
        lent = copy.deepcopy(self.prefix)
        lent.reorder_cache(torch.zeros(count, dtype=torch.long))  # type: ignore[arg-type]
        return lent
