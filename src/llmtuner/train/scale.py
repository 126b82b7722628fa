"""What a run costs on many ranks: bytes that a rank sends, keeps and saves under ZeRO 0 to 3.

The formulas are those of ring collectives over what DeepSpeed does; `benchmarks/scale.py` counts
the same in real runs, and `docs/scaling.md` explains both.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009 (the ring); Rajbhandari
et al., "ZeRO", 2020, arXiv:1910.02054 (sections 5 and 7); DeepSpeed 0.19 (what it adds).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SHARDS_OPTIMIZER, _SHARDS_GRADIENTS, _SHARDS_WEIGHTS = 1, 2, 3
_ALIGNMENT = 2
"""Numbers in a flat buffer of ZeRO 1 and 2 are filled up to a multiple of this, per rank."""


@dataclass(frozen=True)
class Model:
    """What learns.

    Attributes:
        sizes: numbers in each weight.
        weight_bytes: of a number in the forward pass.
        gradient_bytes: of a number of the gradient, as it is sent.
        state_bytes: of a number in the optimizer, its float32 weight included.
    """

    sizes: Sequence[int]
    weight_bytes: int = 2
    gradient_bytes: int = 2
    state_bytes: int = 12

    @property
    def num_weights(self) -> int:
        """All of them."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Traffic:
    """Bytes that take part in the collectives of one optimizer step, each counted whole.

    Attributes:
        all_reduced: summed, with the sum on every rank.
        gathered: put together from all ranks, on every rank.
        scattered: summed, with a share of the sum on every rank.
    """

    all_reduced: float
    gathered: float
    scattered: float

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends around the ring, and receives as many."""
        return (ranks - 1) / ranks * (2 * self.all_reduced + self.gathered + self.scattered)

    def to_dict(self, ranks: int) -> dict[str, float]:
        """Return everything by name, with what a rank sends."""
        return {**vars(self), "sent": self.sent(ranks)}


@dataclass(frozen=True)
class Kept:
    """Bytes on one rank, without activations.

    Attributes:
        weights: between layers; ZeRO 3 gathers a layer at a time on top of it.
        gradients: when complete.
        optimizer: states and float32 weights.
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def traffic(
    model: Model, *, stage: int, ranks: int, passes: int = 1, persistent_below: int = 0
) -> Traffic:
    """Return what one optimizer step moves.

    Args:
        model: what learns.
        stage: of ZeRO.
        ranks: processes.
        passes: micro-batches of a rank in one step.
        persistent_below: ZeRO 3 keeps weights with at most so many numbers whole on every rank.
    """
    gradients = float(model.num_weights * model.gradient_bytes)
    if stage < _SHARDS_OPTIMIZER:
        return Traffic(gradients, 0.0, 0.0)
    if stage < _SHARDS_WEIGHTS:
        times = passes if stage >= _SHARDS_GRADIENTS else 1
        return Traffic(gradients * times, float(_flat(model, ranks) * model.weight_bytes), 0.0)
    padded = [(size, math.ceil(size / ranks) * ranks) for size in model.sizes]
    small = sum(full for size, full in padded if size <= persistent_below)
    large = sum(full for size, full in padded if size > persistent_below)
    gathered = (2 * passes * large + small) * model.weight_bytes
    return Traffic(0.0, float(gathered), float((large + small) * model.gradient_bytes * passes))


def kept_bytes(model: Model, *, stage: int, ranks: int) -> Kept:
    """Return what stays on a rank."""
    whole, flat = model.num_weights, _flat(model, ranks) // ranks
    parts = sum(math.ceil(size / ranks) for size in model.sizes)
    weights = parts if stage >= _SHARDS_WEIGHTS else whole
    gradients = weights if stage >= _SHARDS_WEIGHTS else flat
    gradients = gradients if stage >= _SHARDS_GRADIENTS else whole
    optimizer = (whole, flat, flat, parts)[stage]
    return Kept(
        float(weights * model.weight_bytes),
        float(gradients * model.gradient_bytes),
        float(optimizer * model.state_bytes),
    )


@dataclass(frozen=True)
class Saved:
    """Bytes of one checkpoint.

    Attributes:
        per_rank: the optimizer's share, written by every rank at the same time.
        by_first: whole weights, written by rank 0 alone.
    """

    per_rank: float
    by_first: float

    def seconds(self, ranks: int, *, rank_speed: float, shared_speed: float) -> float:
        """Return how long writing takes.

        Args:
            ranks: processes.
            rank_speed: bytes that one rank can write in a second.
            shared_speed: bytes that the storage takes from all of them in a second.
        """
        alone = (self.per_rank + self.by_first) / rank_speed
        return max(alone, (self.per_rank * ranks + self.by_first) / shared_speed)


def saved_bytes(model: Model, *, stage: int, ranks: int) -> Saved:
    """Return what a checkpoint writes: the weights as files of their own, and DeepSpeed's files.

    Up to ZeRO 2 DeepSpeed's files hold the weights a second time.
    """
    weights = float(model.num_weights * model.weight_bytes)
    states = kept_bytes(model, stage=stage, ranks=ranks).optimizer
    if stage < _SHARDS_OPTIMIZER:
        return Saved(0.0, 2 * weights + states)
    return Saved(states, weights if stage >= _SHARDS_WEIGHTS else 2 * weights)


def step_seconds(
    flops: float, sent_bytes: float, *, speed: float, link_speed: float, overlap: float = 0.0
) -> float:
    """Return the time of a step from work and traffic; latency is not in it.

    Args:
        flops: of one rank.
        sent_bytes: of one rank.
        speed: operations of a rank in a second.
        link_speed: bytes that a rank sends in a second.
        overlap: share of the traffic, 0 to 1, that hides behind computing where there is room.
    """
    computing, sending = flops / speed, sent_bytes / link_speed
    return max(computing, overlap * sending) + (1 - overlap) * sending


def _flat(model: Model, ranks: int) -> int:
    step = _ALIGNMENT * ranks
    return math.ceil(model.num_weights / step) * step
