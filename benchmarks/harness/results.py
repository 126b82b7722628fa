"""From the probes' files to speeds, memory, losses and ratios: nothing here runs or reads a run."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WARM_UP_STEPS = 2
LAST_STEPS = 5
FLOP_FACTORS = {"full": 6, "lora": 4, "qlora": 4}
"""Floating point operations per parameter and token: 2 forward, 2 for the gradient of what goes in,
and 2 for the gradient of the weights, which frozen weights do not have. Attention is not counted,
and the head counts at every token, also where no label is."""


@dataclass(frozen=True)
class Step:
    """One optimizer step over all ranks.

    Attributes:
        seconds: of the slowest rank, reading of the batch included.
        cpu_seconds: that all threads of all ranks computed, or waited by spinning.
        tokens: real ones, without padding.
        slots: places of the batch, with padding.
        supervised: tokens that are learned.
        samples: rows of the data.
        loss: mean over the ranks.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    slots: int
    supervised: int
    samples: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of one contender.

    Attributes:
        wall_s: from the start of the command to its end.
        failure: why it gave no figures; empty where it did.
        begin_s: from the start of the command until the first batch is read.
        first_step_s: from the start of the command to the end of the first step.
        peak_bytes: largest resident memory of the training process, summed over ranks.
        steps: all optimizer steps.
        versions: of the libraries.
    """

    wall_s: float
    failure: str = ""
    begin_s: float = 0.0
    first_step_s: float = 0.0
    peak_bytes: int = 0
    steps: tuple[Step, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the tables show of one contender: medians over its runs.

    Attributes:
        samples_per_s: rows of the data.
        tokens_per_s: real tokens, without padding.
        supervised_per_s: tokens that are learned.
        flops: `FLOP_FACTORS` x parameters x real tokens, per second.
        peak_share: `flops` over those of the machine's matrix product.
        step_s: median time of a step.
        step_cpu_s: median seconds that its threads computed; far below `step_s` times the cores
            where other programs took the machine.
        begin_s: until the first batch is read.
        first_step_s: until the first step is done.
        peak_bytes: largest resident memory.
        first_loss: of the first step.
        last_loss: mean of the last `LAST_STEPS` steps.
    """

    samples_per_s: float
    tokens_per_s: float
    supervised_per_s: float
    flops: float
    peak_share: float
    step_s: float
    step_cpu_s: float
    begin_s: float
    first_step_s: float
    peak_bytes: float
    first_loss: float
    last_loss: float


def read_probes(texts: Sequence[str], *, wall_s: float) -> Measured:
    """Join the files that the ranks of one run wrote."""
    probes = [json.loads(text) for text in texts]
    if any(not probe["steps"] for probe in probes):
        return Measured(wall_s=wall_s, failure="it ended without an optimizer step")
    return Measured(
        wall_s=wall_s,
        begin_s=max(probe["begin_s"] for probe in probes),
        first_step_s=max(probe["first_step_s"] for probe in probes),
        peak_bytes=sum(probe["peak_bytes"] for probe in probes),
        steps=tuple(_joined(ranks) for ranks in zip(*(p["steps"] for p in probes), strict=True)),
        versions=probes[0]["versions"],
    )


def _joined(ranks: Sequence[Mapping[str, Any]]) -> Step:
    sums = {
        name: sum(rank[name] for rank in ranks)
        for name in ("cpu_seconds", "tokens", "slots", "supervised", "samples")
    }
    return Step(
        seconds=max(rank["seconds"] for rank in ranks),
        loss=statistics.fmean(rank["loss"] for rank in ranks),
        **sums,
    )


def summarise(
    runs: Sequence[Measured], *, method: str, parameters: int, gemm_flops: float
) -> Figures:
    """Return the figures of one contender from its runs that worked.

    Speeds are what the steps after the first `WARM_UP_STEPS` hold over the seconds that they take,
    as a user meets them. Steps hold unequal samples, so a median of their times would favour who
    is slow in the long ones.
    """
    each = [_figures(run, method, parameters, gemm_flops) for run in runs if not run.failure]
    names = Figures.__dataclass_fields__
    return Figures(
        **{name: statistics.median(getattr(one, name) for one in each) for name in names}
    )


def _figures(run: Measured, method: str, parameters: int, gemm_flops: float) -> Figures:
    steps = run.steps[WARM_UP_STEPS:] or run.steps[-1:]
    seconds = sum(step.seconds for step in steps)
    tokens_per_s = sum(step.tokens for step in steps) / seconds
    flops = FLOP_FACTORS[method] * parameters * tokens_per_s
    return Figures(
        samples_per_s=sum(step.samples for step in steps) / seconds,
        tokens_per_s=tokens_per_s,
        supervised_per_s=sum(step.supervised for step in steps) / seconds,
        flops=flops,
        peak_share=flops / gemm_flops,
        step_s=statistics.median(step.seconds for step in steps),
        step_cpu_s=statistics.median(step.cpu_seconds for step in steps),
        begin_s=run.begin_s,
        first_step_s=run.first_step_s,
        peak_bytes=run.peak_bytes,
        first_loss=run.steps[0].loss,
        last_loss=statistics.fmean(step.loss for step in run.steps[-LAST_STEPS:]),
    )


@dataclass(frozen=True)
class Ratio:
    """One contender over another; each is above 1 where the first one is better.

    Attributes:
        samples: rows per second.
        tokens: real tokens per second.
        memory: peak of the other over its own.
        start: time to the first step of the other over its own.
    """

    samples: float
    tokens: float
    memory: float
    start: float


def ratio(own: Figures, other: Figures) -> Ratio:
    """Return how many times better `own` is than `other`."""
    return Ratio(
        samples=own.samples_per_s / other.samples_per_s,
        tokens=own.tokens_per_s / other.tokens_per_s,
        memory=other.peak_bytes / own.peak_bytes,
        start=other.first_step_s / own.first_step_s,
    )


def differing_steps(one: Measured, other: Measured) -> list[int]:
    """Return the steps, from 1, whose real or supervised token counts differ."""
    pairs = zip(one.steps, other.steps, strict=False)
    found = [
        number
        for number, (left, right) in enumerate(pairs, start=1)
        if (left.tokens, left.supervised) != (right.tokens, right.supervised)
    ]
    shorter, longer = sorted((len(one.steps), len(other.steps)))
    return found + list(range(shorter + 1, longer + 1))


def loss_distance(one: Figures, other: Figures) -> float:
    """Return how far the mean losses of the last steps are apart, relative to the other."""
    return abs(one.last_loss - other.last_loss) / abs(other.last_loss)
