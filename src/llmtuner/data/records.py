"""A raw row with its place, and the book of rows that cannot be used."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from llmtuner.extras.error_kinds import ErrorKind
from llmtuner.extras.errors import DataError

_NUM_LISTED = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its source.

    Attributes:
        value: an object, a bare list of messages, or a plain text.
        where: `file:line` where a line is a row, else `file#row` with rows counted from 0.
    """

    value: dict[str, Any] | list[Any] | str
    where: str


@dataclass
class BadRows:
    """Raises at the first bad row, or counts bad rows when the user asked to skip them.

    Attributes:
        on_bad_row: "error" raises, "skip" counts.
        count: rows left out so far.
        num_good: rows read and kept so far.
        kinds: the same count for each kind of error.
        examples: the messages of the first 20 of them, each with its place.
        on_bad: called with every refused row (its `kind`, `where` and message), before an error is
            raised; nothing else keeps them all.
    """

    on_bad_row: Literal["error", "skip"] = "error"
    count: int = 0
    num_good: int = 0
    kinds: Counter[ErrorKind] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    on_bad: Callable[[DataError], None] | None = None

    def add(self, error: DataError) -> None:
        """Raise `error`, or count it and keep its message.

        Raises:
            DataError: bad rows are errors.
        """
        if self.on_bad is not None:
            self.on_bad(error)
        if self.on_bad_row == "error":
            raise error
        self.count += 1
        self.kinds[error.kind] += 1
        if len(self.examples) < _NUM_LISTED:
            self.examples.append(str(error))
