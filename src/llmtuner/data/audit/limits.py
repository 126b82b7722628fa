"""Which share of rows may have a defect before it stops a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtuner.data.audit.defects import DEFECTS
from llmtuner.data.audit.findings import SetAudit
from llmtuner.extras.errors import ConfigError, DataError, nearest

Limits = Mapping[str, float]
"""Name of a defect -> largest share of the rows of a data set that may have it."""

DEFAULT_LIMITS: Limits = {"double_bos": 0.0, "end_token_not_learned": 0.0}
"""Faults of template or tokenizer, not of the data: training on them makes a worse model."""

_NUM_PLACES = 3


@dataclass(frozen=True)
class Excess:
    """A data set with more of a defect than allowed."""

    dataset: str
    defect: str
    rows: int
    share: float
    limit: float
    places: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line with class, share, limit and the first places."""
        return (
            f"{self.dataset}: {self.defect} in {self.rows} rows ({self.share:.2%}), "
            f"allowed are {self.limit:.2%}; {', '.join(self.places)}"
        )


def parse_limits(words: Sequence[str] | None) -> Limits:
    """Read `audit_limits`; the defaults stay for what is not named.

    Raises:
        ConfigError: an unknown defect, or a share that is no number from 0 to 1.
    """
    limits = dict(DEFAULT_LIMITS)
    for word in words or ():
        name, _, share = word.partition("=")
        name = name.strip()
        if name not in DEFECTS:
            guess = nearest(name, DEFECTS)
            raise ConfigError(
                "Unknown defect.",
                where="--audit_limits",
                got=name,
                allowed=None if guess else DEFECTS,
                fix=f"did you mean {guess}?" if guess else "name one of the table in docs/audit.md",
            )
        limits[name] = _share(word, share)
    return limits


def _share(word: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(
            "A limit is not a share of the rows.",
            where="--audit_limits",
            got=word,
            allowed="defect=share with a share from 0 to 1, such as duplicate_row=0.01",
        )
    return share


def find_excess(audits: Mapping[str, SetAudit], limits: Limits) -> list[Excess]:
    """Return where more rows than allowed have a defect.

    Args:
        audits: by name of the data set.
        limits: from `parse_limits`.
    """
    return [
        Excess(
            name,
            defect,
            audit.findings[defect].rows,
            audit.share(defect),
            limit,
            tuple(place["where"] for place in audit.findings[defect].places[:_NUM_PLACES]),
        )
        for name, audit in audits.items()
        for defect, limit in limits.items()
        if audit.share(defect) > limit
    ]


def check_excess(excess: Sequence[Excess]) -> None:
    """Stop where something is above its limit.

    Raises:
        DataError: names class, share, limit and the first places.
    """
    if excess:
        raise DataError(
            "The audit found more defects than allowed:\n  " + "\n  ".join(map(str, excess)) + "\n",
            fix="repair the rows, or set another limit with --audit_limits "
            f"{excess[0].defect}={min(excess[0].share * 1.1, 1):.2g}",
            kind="audit_limit",
        )
