"""TensorBoard: event files in a local folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import MissingExtraError


class TensorboardLogger:
    """Writes scalars to event files."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "tensorboard", extra="tensorboard", needed_for="--report_to tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def open_logger(*, settings: Mapping[str, Any], folder: Path, run_name: str) -> TensorboardLogger:
    """Start an event file in `folder`."""
    return TensorboardLogger(folder)
