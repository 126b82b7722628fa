"""The figures as a picture: speed and memory side by side, and the losses step by step."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from harness.results import Figures, Measured

matplotlib.use("agg")

from matplotlib import pyplot


def plot(
    path: Path, figures: Mapping[str, Figures], runs: Mapping[str, Measured], *, title: str
) -> None:
    """Draw one method: samples per second, peak memory, and the losses of all that share steps.

    Args:
        path: the PNG file to write.
        figures: of all contenders, by name.
        runs: one run of each of those that train the same rows in the same steps.
        title: of the picture.
    """
    figure, (speed, memory, losses) = pyplot.subplots(1, 3, figsize=(15, 1.5 + 0.4 * len(figures)))
    names = list(figures)[::-1]
    colours = ["tab:orange" if name.startswith("llmtuner") else "tab:grey" for name in names]
    speed.barh(names, [figures[name].samples_per_s for name in names], color=colours)
    speed.set_xlabel("samples per second")
    memory.barh(names, [figures[name].peak_bytes / 1e9 for name in names], color=colours)
    memory.set_xlabel("peak memory, GB")
    memory.set_yticks([])
    for name, run in runs.items():
        values = [step.loss for step in run.steps]
        losses.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
    losses.set_xlabel("step")
    losses.set_ylabel("loss")
    losses.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
