"""Options of the export of a merged model."""

from typing import Literal

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import arg


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Where and how the merged model is written."""

    export_dir: str | None = arg(None, "Folder for the merged model.")
    export_size: int = arg(5, "Largest weight file.", unit="GB", low=1)
    export_device: Literal["cpu", "auto"] = arg("cpu", "Device that merges.")
