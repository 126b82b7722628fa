"""From samples to the tensors of one micro-batch.

A flat batch lays its samples end to end in one row, without padding:

- `input_ids`, `position_ids`: [1, T]; positions restart at 0 with every sample.
- `cu_seq_lens_q`, `cu_seq_lens_k`: [samples + 1] int32, the borders of the samples.
- `max_length_q`, `max_length_k`: tokens of the longest sample.
- `kept`: [N] places in the row whose next token is trained: the only places that need a head.
- `targets`: [N] the tokens to be predicted there.

A padded batch is for models that cannot take a flat one: `input_ids` and `attention_mask` [B, L],
and `kept` counts places over the flattened [B * L] logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmtuner.data.conversation import IGNORE_INDEX

Row = Mapping[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True)
class FlatCollator:
    """Lay the samples of a micro-batch end to end."""

    def __call__(self, rows: Sequence[Row | Sequence[Row]]) -> Batch:
        """Build the batch; an empty micro-batch becomes one token without a target.

        Args:
            rows: samples with `input_ids` and `labels` (not shifted), or lists of samples (packs).
        """
        samples = _flatten(rows)
        ids = [token for sample in samples for token in sample["input_ids"]] or [0]
        lengths = [len(sample["input_ids"]) for sample in samples] or [1]
        kept, targets = _kept_and_targets(samples, starts=_starts(lengths))
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        longest = max(lengths)
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
            "kept": kept,
            "targets": targets,
        }


@dataclass(frozen=True)
class PaddedCollator:
    """Pad the samples of a micro-batch to the longest one, on the right.

    Attributes:
        pad_id: what fills the rest of a row; it is masked, so any id of the vocabulary will do.
    """

    pad_id: int = 0

    def __call__(self, rows: Sequence[Row | Sequence[Row]]) -> Batch:
        """Build the batch; see the module for its shapes."""
        samples = _flatten(rows)
        lengths = [len(sample["input_ids"]) for sample in samples] or [1]
        longest = max(lengths)
        input_ids = torch.full((len(lengths), longest), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for number, length in enumerate(lengths):
            attention_mask[number, :length] = 1
        for number, sample in enumerate(samples):
            input_ids[number, : lengths[number]] = torch.tensor(sample["input_ids"])
        starts = [number * longest for number in range(len(samples))]
        kept, targets = _kept_and_targets(samples, starts=starts)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "kept": kept,
            "targets": targets,
        }


def _flatten(rows: Sequence[Row | Sequence[Row]]) -> list[Row]:
    samples: list[Row] = []
    for row in rows:
        samples.extend([row] if isinstance(row, Mapping) else row)
    return samples


def _starts(lengths: Sequence[int]) -> list[int]:
    starts, place = [], 0
    for length in lengths:
        starts.append(place)
        place += length
    return starts


def _kept_and_targets(
    samples: Sequence[Row], *, starts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a trained token follows, and which; the first token of a sample never counts."""
    kept: list[int] = []
    targets: list[int] = []
    for start, sample in zip(starts, samples, strict=False):
        for offset, label in enumerate(sample["labels"][1:]):
            if label != IGNORE_INDEX:
                kept.append(start + offset)
                targets.append(label)
    return torch.tensor(kept, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
