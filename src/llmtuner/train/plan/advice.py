"""What to change when a run will not fit, from what costs least to what changes most."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from llmtuner.hparams.config import RunConfig

_SHORTEST = 256
_QUANTISED_BITS = 4


@dataclass(frozen=True)
class Change:
    """One change, on top of those before it.

    Attributes:
        flags: what to give to `llmtuner train`.
        effect: what it does to the result.
        peak_bytes: estimated peak with it and all changes before it.
        fits: whether that is within the limit.
    """

    flags: str
    effect: str
    peak_bytes: int
    fits: bool


def advise(
    config: RunConfig, *, limit_bytes: int, peak_of: Callable[[RunConfig], float]
) -> tuple[Change, ...]:
    """Return changes in the order to make them, up to the first that is enough.

    Args:
        config: of the run that does not fit.
        limit_bytes: what it may use.
        peak_of: estimates the peak of changed settings.
    """
    changes: list[Change] = []
    for change in _CHANGES:
        for changed, flags, effect in change(config):
            config = changed
            peak = round(peak_of(config))
            changes.append(Change(flags, effect, peak, peak <= limit_bytes))
            if changes[-1].fits:
                return tuple(changes)
    return tuple(changes)


_Changed = Iterator[tuple[RunConfig, str, str]]


def _smaller_batch(config: RunConfig) -> _Changed:
    size, passes = (
        config.train.per_device_train_batch_size,
        config.train.gradient_accumulation_steps,
    )
    while size > 1 and size % 2 == 0:
        size, passes = size // 2, passes * 2
        config = _train(
            config, per_device_train_batch_size=size, gradient_accumulation_steps=passes
        )
        flags = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {passes}"
        yield config, flags, "the same steps on the same samples, a little slower"
    if size > 1:
        passes *= size
        config = _train(config, per_device_train_batch_size=1, gradient_accumulation_steps=passes)
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {passes}"
        yield config, flags, "the same steps on the same samples, a little slower"


def _recompute(config: RunConfig) -> _Changed:
    if config.train.gradient_checkpointing:
        return
    model = replace(config.model, disable_gradient_checkpointing=False)
    changed = _train(replace(config, model=model), gradient_checkpointing=True)
    yield changed, "--gradient_checkpointing", "the same numbers, about a third slower"


def _low_rank(config: RunConfig) -> _Changed:
    if config.method.uses_adapters:
        return
    finetuning = replace(config.finetuning, finetuning_type="lora")
    changed = replace(config, finetuning=finetuning)
    yield changed, "--finetuning_type lora", "only small added matrices learn"


def _quantise(config: RunConfig) -> _Changed:
    if config.model.quantization_bit == _QUANTISED_BITS or not config.method.trains_quantized:
        return
    if find_spec("bitsandbytes") is None:
        return
    model = replace(config.model, quantization_bit=_QUANTISED_BITS)
    flags, effect = f"--quantization_bit {_QUANTISED_BITS}", "the frozen weights are rounded"
    yield replace(config, model=model), flags, effect


def _shorter(config: RunConfig) -> _Changed:
    most = config.data.cutoff_len
    while most // 2 >= _SHORTEST:
        most //= 2
        config = replace(config, data=replace(config.data, cutoff_len=most))
        yield config, f"--cutoff_len {most}", "longer samples lose text"


_CHANGES: tuple[Callable[[RunConfig], _Changed], ...] = (
    _smaller_batch,
    _recompute,
    _shorter,
    _low_rank,
    _quantise,
)


def _train(config: RunConfig, **values: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **values))
