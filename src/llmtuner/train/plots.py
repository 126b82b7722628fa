"""Loss curves as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_SMOOTHING = 0.85


def plot_losses(history: Sequence[Mapping[str, Any]], output_dir: Path) -> list[Path]:
    """Draw `training_<metric>.png` for every loss in the log; return the files.

    Args:
        history: entries of `trainer_state.log_history`, with `step`.
        output_dir: where the files go.
    """
    names = dict.fromkeys(
        name for entry in history for name in entry if name == "loss" or name.endswith("_loss")
    )
    drawn = []
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if name == "train_loss" or not points:
            continue
        path = output_dir / f"training_{name.replace('/', '_')}.png"
        _draw(points, title=name, path=path)
        drawn.append(path)
    return drawn


def _draw(points: Sequence[tuple[int, float]], *, title: str, path: Path) -> None:
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    title = title.replace("$", r"\$")  # or matplotlib reads it as mathematics
    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, values, color="#7aa6c2", alpha=0.6, marker=".", label=title)
        if len(values) > 2:
            axes.plot(steps, _smooth(values), color="#1f4e79", label="smoothed")
        axes.set(xlabel="optimizer step", ylabel=title, title=f"{title} by step")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average that starts at the first value."""
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(_SMOOTHING * smoothed[-1] + (1 - _SMOOTHING) * value)
    return smoothed
