"""The audit of one data set: what was counted, what was found and where."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtuner.data.audit.defects import DEFECTS, SET_DETECTORS
from llmtuner.data.audit.fingerprint import Numbers, Places
from llmtuner.data.audit.inspect import RowNotes
from llmtuner.data.audit.row import Hit
from llmtuner.data.audit.set_defects import SetPrint
from llmtuner.extras.errors import DataError, TemplateError

MOST_PLACES = 1000
"""Places that a report lists of one class and data set; all are counted."""

_COUNTS = ("rows", "refused_rows", "turns", "samples", "tokens", "supervised_tokens")
_SHORT = 16  # tokens; shorter samples are not told apart
_COLUMN = re.compile(r"(:\d+):\d+$")


@dataclass
class Finding:
    """One class of defect in one data set.

    Attributes:
        rows: how many rows have it.
        places: the first ones, each `{"where", "turn", "note"}`.
    """

    rows: int = 0
    places: list[dict[str, Any]] = field(default_factory=list)

    def add(self, where: str, hits: Iterable[Hit]) -> None:
        """Count a row and keep its places."""
        self.rows += 1
        for hit in hits:
            if len(self.places) < MOST_PLACES:
                self.places.append({"where": where, "turn": hit.turn, "note": hit.note})


@dataclass
class SetAudit:
    """The audit of one data set.

    Attributes:
        rows: rows that were read and kept.
        refused_rows: rows that cannot be used.
        turns: messages of the kept rows.
        samples: sequences to train on.
        tokens: in them.
        supervised_tokens: of them, those that are trained.
        longest_tokens: of one sample.
        lengths: samples by the power of two that holds their tokens.
        findings: by name of the defect.
        unreadable: why the set could not be read to its end; None where it could.
    """

    rows: int = 0
    refused_rows: int = 0
    turns: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)
    unreadable: str | None = None

    def count(self, notes: RowNotes) -> None:
        """Add one row."""
        if notes.refusal is None or isinstance(notes.refusal, TemplateError):
            self.rows += 1
        else:
            self.refuse(notes.refusal)
        self.turns += notes.num_turns
        self.samples += len(notes.sample_tokens)
        self.tokens += sum(notes.sample_tokens)
        self.supervised_tokens += notes.supervised_tokens
        self.longest_tokens = max(self.longest_tokens, *notes.sample_tokens, 0)
        self.lengths.update(_bucket(length) for length in notes.sample_tokens)
        for name in dict.fromkeys(name for name, _ in notes.hits):
            self.add(name, notes.place, (hit for other, hit in notes.hits if other == name))

    def extend(self, other: "SetAudit") -> None:
        """Add the rows behind these, or another set."""
        for name in _COUNTS:
            vars(self)[name] += vars(other)[name]
        self.longest_tokens = max(self.longest_tokens, other.longest_tokens)
        self.lengths.update(other.lengths)
        for name, found in other.findings.items():
            finding = self.findings.setdefault(name, Finding())
            finding.rows += found.rows
            finding.places += found.places[: MOST_PLACES - len(finding.places)]

    def refuse(self, error: DataError) -> None:
        """Count a row that cannot be used."""
        self.refused_rows += 1
        self.add(error.kind, _COLUMN.sub(r"\1", error.where or ""), [Hit(None, error.problem)])

    def add(self, name: str, where: str, hits: Iterable[Hit]) -> None:
        """Count a row with a defect."""
        assert name in DEFECTS, name
        self.findings.setdefault(name, Finding()).add(where, hits)

    def share(self, name: str) -> float:
        """Return the share of the rows that have a defect."""
        finding = self.findings.get(name)
        return finding.rows / max(self.rows + self.refused_rows, 1) if finding else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values, the worst findings first."""
        names = [name for name in DEFECTS if name in self.findings]
        return {
            **{name: vars(self)[name] for name in _COUNTS},
            "supervised_share": round(self.supervised_tokens / max(self.tokens, 1), 4),
            "longest_tokens": self.longest_tokens,
            "length_histogram": {
                f"{1 if high == _SHORT else high // 2 + 1}-{high}": self.lengths[high]
                for high in sorted(self.lengths)
            },
            "unreadable": self.unreadable,
            "findings": {
                name: {
                    "severity": DEFECTS[name].severity,
                    "meaning": DEFECTS[name].meaning,
                    "rows": self.findings[name].rows,
                    "share": round(self.share(name), 6),
                    "places": self.findings[name].places,
                }
                for name in names
            },
        }


@dataclass(frozen=True)
class BlockNotes:
    """What is noted of some rows, in few objects, which cross processes quickly.

    Attributes:
        audit: of each row by itself.
        prints: place, hash of the row, and of its question, or 0; of each row.
    """

    audit: SetAudit
    prints: list[tuple[str, int, int]]


def block_notes(notes: Iterable[RowNotes]) -> BlockNotes:
    """Sum up the notes of rows."""
    block = BlockNotes(SetAudit(), [])
    for one in notes:
        block.audit.count(one)
        block.prints.append((one.place, one.digest, one.question or 0))
    return block


class Auditor:
    """Takes the notes of the rows of one data set, in file order, and compares them at the end."""

    def __init__(self) -> None:
        self.audit = SetAudit()
        self._rows, self._questions, self._places = Numbers(), Numbers(), Places()

    def add(self, block: BlockNotes) -> None:
        """Take the next rows."""
        self.audit.extend(block.audit)
        for place, row, question in block.prints:
            self._places.append(place)
            self._rows.append(row)
            self._questions.append(question)

    def prints(self) -> SetPrint:
        """Return the fingerprints of the rows so far."""
        return SetPrint(self._rows.values(), self._questions.values(), self._places)

    def finish(self) -> SetAudit:
        """Compare the rows, and return all that was found."""
        prints = self.prints()
        for name, compare in SET_DETECTORS.items():
            for number, hit in compare(prints):
                self.audit.add(name, self._places[number], [hit])
        return self.audit


def from_dict(values: Mapping[str, Any]) -> SetAudit:
    """Return an audit that was stored."""
    audit = SetAudit()
    for name in _COUNTS:
        vars(audit)[name] = values[name]
    audit.longest_tokens, audit.unreadable = values["longest_tokens"], values["unreadable"]
    audit.lengths.update(
        {int(span.split("-")[1]): count for span, count in values["length_histogram"].items()}
    )
    for name, found in values["findings"].items():
        audit.findings[name] = Finding(found["rows"], list(found["places"]))
    return audit


def joined(audits: Iterable[SetAudit]) -> SetAudit:
    """Return the audit of several data sets together."""
    total = SetAudit()
    for audit in audits:
        total.extend(audit)
    return total


def _bucket(length: int) -> int:
    """Return the power of two, at least 16, that holds a length."""
    return max(_SHORT, 1 << (length - 1).bit_length())
