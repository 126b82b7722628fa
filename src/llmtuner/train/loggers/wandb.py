"""Weights & Biases; offline unless the user has logged in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import MissingExtraError

_PROJECT = "llmtuner"
_INIT_TIMEOUT_S = 30


class WandbLogger:
    """Sends metrics to a W&B run."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, run_name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "wandb", extra="wandb", needed_for="--report_to wandb"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        options = wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S, disable_git=True, save_code=False, console="off"
        )
        self._run = wandb.init(
            project=_PROJECT,
            name=run_name,
            dir=str(folder),
            config=dict(settings),
            settings=options,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_logger(*, settings: Mapping[str, Any], folder: Path, run_name: str) -> WandbLogger:
    """Start a W&B run with the resolved settings; secrets are not among them."""
    return WandbLogger(settings, folder, run_name)
