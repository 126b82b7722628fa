"""Options of the SwanLab tracker."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class SwanlabArgs:
    """Where SwanLab keeps the curves of a run."""

    use_swanlab: bool = arg(False, "Report to SwanLab (the same as report_to swanlab).")
    swanlab_project: str = arg("llmtuner", "Project that the run belongs to.")
    swanlab_workspace: str | None = arg(None, "Workspace of the project.")
    swanlab_run_name: str | None = arg(None, "Name of the run. Unset: run_name.")
    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] = arg(
        "cloud", "Where the curves go."
    )
    swanlab_logdir: str | None = arg(None, "Folder of local SwanLab files.")
