"""Results as Markdown tables; everything here is text from figures."""

from collections.abc import Mapping, Sequence

from harness.results import (
    FLOP_FACTORS,
    LAST_STEPS,
    Figures,
    Measured,
    differing_steps,
    loss_distance,
    ratio,
)

_COLUMNS = (
    *("contender", "samples/s", "tokens/s", "supervised/s", "GFLOP/s", "of GEMM"),
    *("step s", "CPU s", "start s", "first step s", "peak GB", "loss 1", f"loss last {LAST_STEPS}"),
)


def figures_table(figures: Mapping[str, Figures], failures: Mapping[str, str]) -> str:
    """Return one row per contender; those that failed come last with their reason."""
    rows = [
        (
            name,
            f"{one.samples_per_s:.2f}",
            f"{one.tokens_per_s:.0f}",
            f"{one.supervised_per_s:.0f}",
            f"{one.flops / 1e9:.0f}",
            f"{100 * one.peak_share:.0f} %",
            f"{one.step_s:.2f}",
            f"{one.step_cpu_s:.2f}",
            f"{one.begin_s:.1f}",
            f"{one.first_step_s:.1f}",
            f"{one.peak_bytes / 1e9:.2f}",
            f"{one.first_loss:.4f}",
            f"{one.last_loss:.4f}",
        )
        for name, one in figures.items()
    ]
    lines = [_line(_COLUMNS), _rule(len(_COLUMNS)), *map(_line, rows)]
    if failures:
        lines += ["", *(f"No figures from {name}: {why}" for name, why in failures.items())]
    return "\n".join(lines)


def ratios_table(figures: Mapping[str, Figures], *, own: Sequence[str]) -> str:
    """Return how many times better each of our settings is than each of the others.

    Args:
        figures: of all contenders, by name.
        own: which of them are ours; the first is also held against the rest of ours.
    """
    columns = ("llmtuner over", "setting", "samples/s", "tokens/s", "memory", "first step")
    rows = []
    for ours in own:
        for other in figures:
            if other != ours and (other not in own or ours == own[0]):
                found = ratio(figures[ours], figures[other])
                values = (found.samples, found.tokens, found.memory, found.start)
                rows.append((other, ours, *(f"{value:.2f}x" for value in values)))
    return "\n".join([_line(columns), _rule(len(columns)), *map(_line, rows)])


def agreement(
    runs: Mapping[str, Measured], figures: Mapping[str, Figures], *, reference: str
) -> list[str]:
    """Say for each contender whether it trained the same tokens to the same loss as `reference`."""
    base = runs[reference]
    trained = sum(step.supervised for step in base.steps)
    read = sum(step.tokens for step in base.steps)
    lines = [f"{reference}: {len(base.steps)} steps, {read} tokens, {trained} of them supervised"]
    for name, run in runs.items():
        if name == reference:
            continue
        other_steps = differing_steps(run, base)
        tokens = f"other tokens in steps {other_steps}" if other_steps else "the same tokens"
        first = abs(figures[name].first_loss - figures[reference].first_loss)
        apart = 100 * loss_distance(figures[name], figures[reference])
        lines.append(f"{name}: {tokens}; first loss {first:.4f} apart, last ones {apart:.2f} %")
    return lines


def formula(method: str, parameters: int) -> str:
    """Say how the operations are counted."""
    return (
        f"FLOP/s = {FLOP_FACTORS[method]} x {parameters / 1e6:.1f} M parameters x real tokens/s; "
        "the GEMM is a bfloat16 product of 2048 x 2048 matrices"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(count: int) -> str:
    return "|-" * count + "|"
