"""Options of the audit that runs before training, and of `llmtuner data audit`."""

from pydantic.dataclasses import dataclass

from llmtuner.hparams.arg import CHECKED_WHEN_MADE, arg


@dataclass(frozen=True, kw_only=True, config=CHECKED_WHEN_MADE)
class AuditArgs:
    """What is looked for in the data before training, and what stops the run."""

    audit: bool = arg(True, "Audit the data before training; the result is in run.json.")
    audit_limits: tuple[str, ...] | None = arg(
        None,
        "Stop when more than this share of the rows has a defect, as defect=share "
        "with commas between (duplicate_row=0.01,answer_cut=0).",
    )
    verify_rows: int = arg(
        64,
        "Rows of each data set of which training proves, against the saved tokenizer and "
        "template, that serving sends the same ids.",
        unit="rows",
        low=0,
    )
