"""The audit of all data sets of a run: totals, limits, what is logged and written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtuner.data.audit.defects import DEFECTS
from llmtuner.data.audit.findings import SetAudit, from_dict, joined
from llmtuner.data.audit.limits import Excess, Limits, check_excess, find_excess
from llmtuner.extras.errors import DataError
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Audit:
    """What was found in the data of a run.

    Attributes:
        train: training sets by name.
        evals: evaluation sets by name; a split is called "validation split".
        limits: the shares that are allowed.
    """

    train: Mapping[str, SetAudit]
    evals: Mapping[str, SetAudit] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)

    @property
    def sets(self) -> Mapping[str, SetAudit]:
        """All data sets by name; the evaluation set of a name that trains too has a mark."""
        evals = {
            f"{name} (evaluation)" if name in self.train else name: audit
            for name, audit in self.evals.items()
        }
        return {**self.train, **evals}

    def excess(self) -> list[Excess]:
        """Return what is above its limit."""
        return find_excess(self.sets, self.limits)

    def check(self) -> None:
        """Stop where something is above its limit.

        Raises:
            DataError: names class, share, limit and the first places; or a set is unreadable.
        """
        for audit in self.sets.values():
            if audit.unreadable is not None:
                raise DataError(f"A data set cannot be read: {audit.unreadable}")
        check_excess(self.excess())

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return {
            "totals": joined(self.sets.values()).to_dict() | {"datasets": len(self.sets)},
            "datasets": {
                name: {"used_for": "training" if name in self.train else "evaluation"}
                | audit.to_dict()
                for name, audit in self.sets.items()
            },
            "limits": dict(self.limits),
            "exceeded": [str(excess) for excess in self.excess()],
        }

    def log(self) -> None:
        """Log one line for each data set, and one for each class with its first place."""
        for name, audit in self.sets.items():
            if not audit.findings:
                logger.info("Audit of %s: nothing found in %d rows.", name, audit.rows)
                continue
            num_rows = audit.rows + audit.refused_rows
            logger.info("Audit of %s: %d rows, found:", name, num_rows)
            for defect in (defect for defect in DEFECTS if defect in audit.findings):
                found = audit.findings[defect]
                first = found.places[0]
                turn = f" turn {first['turn']}" if first["turn"] else ""
                note = f" ({first['note']})" if first["note"] else ""
                logger.info(
                    "  %s %s: %d rows (%.2f %%), first %s%s%s",
                    *(DEFECTS[defect].severity, defect, found.rows, 100 * audit.share(defect)),
                    *(first["where"], turn, note),
                )


def audit_from_dict(values: Mapping[str, Any], limits: Limits) -> Audit:
    """Return an audit that was written, to be held against other limits."""
    parts: dict[str, dict[str, SetAudit]] = {"training": {}, "evaluation": {}}
    for name, audit in values["datasets"].items():
        parts[audit["used_for"]][name] = from_dict(audit)
    return Audit(parts["training"], parts["evaluation"], limits)
