"""SwanLab, in the cloud or in a local folder, as `swanlab_mode` says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import MissingExtraError


class SwanlabLogger:
    """Sends metrics to a SwanLab experiment."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, run_name: str) -> None:
        try:
            import swanlab
        except ImportError as error:
            raise MissingExtraError(
                "swanlab", extra="swanlab", needed_for="--report_to swanlab"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            project=settings["swanlab_project"],
            workspace=settings["swanlab_workspace"],
            experiment_name=settings["swanlab_run_name"] or run_name,
            config=dict(settings),
            logdir=settings["swanlab_logdir"] or str(folder),
            mode=settings["swanlab_mode"],
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the experiment."""
        self._run.finish()


def open_logger(*, settings: Mapping[str, Any], folder: Path, run_name: str) -> SwanlabLogger:
    """Start an experiment with the resolved settings; secrets are not among them."""
    return SwanlabLogger(settings, folder, run_name)
