"""Options of what `llmtuner data` shows and writes."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class ShowingArgs:
    """What to show of the data, and where to write reports."""

    row: int = arg(
        0, "Row to show, counted from 0 through all data sets, unusable rows included.", low=0
    )
    json: bool = arg(False, "Print one JSON object and nothing else on standard output.")
    report_dir: str | None = arg(None, "Folder for the report as JSON and as an HTML page.")
