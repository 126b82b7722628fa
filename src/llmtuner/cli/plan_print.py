"""A plan as tables for people."""

from collections.abc import Iterator
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.table import Table

from llmtuner.train.plan.make import Plan

_UNITS = ("B", "kB", "MB", "GB", "TB")
_STEP = 1000.0


def print_plan(plan: Plan) -> None:
    """Print what the run needs, and what to change if it will not fit."""
    console = Console(markup=False, highlight=False)
    for title, rows in (
        ("memory of one process", _memory(plan)),
        ("work", _work(plan)),
        ("disk", _disk(plan)),
    ):
        table = Table("", title, box=box.ROUNDED, show_header=True)
        table.columns[1].justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in _verdict(plan):
        console.print(line, soft_wrap=True)


def readable(count: float) -> str:
    """Return bytes in the unit that reads best, in steps of a thousand."""
    unit = 0
    while abs(count) >= _STEP and unit < len(_UNITS) - 1:
        count, unit = count / _STEP, unit + 1
    return f"{count:.3g} {_UNITS[unit]}" if count < _STEP else f"{count:.0f} {_UNITS[unit]}"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    found = plan.forecast
    memory = found.memory
    parts = {
        "process without a model": memory.baseline,
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations, logits, casts (at most)": memory.working,
        "peak while loading": memory.load_peak,
        "peak while training": memory.train_peak,
    }
    if memory.eval_peak:
        parts["peak while evaluating"] = memory.eval_peak
    yield from ((name, readable(value)) for name, value in parts.items())
    if plan.probe is not None:
        yield "peak of two real steps", readable(plan.probe.peak_bytes)
        yield "peak, corrected by them", readable(plan.peak_bytes)
    yield f"there is ({found.device_type})", readable(found.limit_bytes)


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    found = plan.forecast
    work, largest = found.workload, found.workload.largest
    count = found.parameters
    yield "parameters that learn", f"{count.trainable:,} of {count.total:,} ({count.percent:.3g} %)"
    yield "precision, attention", f"{found.precision}, {found.attention}"
    if work.samples is None:
        yield "samples, tokens", "streamed: not known before the end"
    else:
        yield "samples", f"{work.samples:,}"
        yield "tokens in one epoch", f"{work.tokens:,}, {work.supervised_tokens:,} of them trained"
    epochs = "" if work.epochs is None else f" ({work.epochs:g} epochs)"
    yield "optimizer steps", f"{work.steps:,}{epochs}"
    yield (
        "largest micro-batch",
        f"{len(largest.lengths)} samples, {largest.num_tokens:,} tokens, "
        f"{largest.num_kept:,} trained",
    )
    yield "operations in a step", f"{found.flops / 1e12:.3g} TFLOP"
    source = "estimated" if plan.probe is None else "by two real steps"
    yield f"time of a step, {source}", f"{plan.seconds_per_step:.3g} s"
    seconds = round(plan.seconds_per_step * work.steps)
    yield "time of all steps", str(timedelta(seconds=seconds))


def _disk(plan: Plan) -> Iterator[tuple[str, str]]:
    disk = plan.forecast.disk
    yield "final model" + (" (adapter)" if disk.is_adapter else ""), readable(disk.model_bytes)
    yield "checkpoint", readable(disk.checkpoint_bytes)
    yield "checkpoints at once", f"{disk.checkpoints}"
    yield "in all", readable(disk.total_bytes)
    if disk.free_bytes is not None:
        yield "free at output_dir", readable(disk.free_bytes)


def _verdict(plan: Plan) -> Iterator[str]:
    found = plan.forecast
    peak, limit = readable(plan.peak_bytes), readable(found.limit_bytes)
    if plan.fits:
        yield f"It fits: {peak} of {limit}."
    else:
        yield f"It will not fit: {peak}, and there is {limit}."
    chosen = found.checkpointing
    yield f"Gradient checkpointing {'on' if chosen.enabled else 'off'}: {chosen.reason}."
    if found.changes:
        yield "Change, in this order, each on top of those above:"
    for number, change in enumerate(found.changes, start=1):
        verdict = "fits" if change.fits else "not yet"
        peak = readable(change.peak_bytes)
        yield f"  {number}. {change.flags}  ({change.effect}): {peak}, {verdict}"
    if found.changes and not found.changes[-1].fits:
        yield "Nothing of this is enough: use a smaller model, or a machine with more memory."
    disk = found.disk
    if disk.free_bytes is not None and disk.total_bytes > disk.free_bytes:
        yield (
            f"The disk will fill up: {readable(disk.total_bytes)} to write, "
            f"{readable(disk.free_bytes)} free. Set --save_total_limit, --save_only_model, or "
            "another --output_dir."
        )
