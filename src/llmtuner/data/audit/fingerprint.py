"""Short hashes of rows and questions, by which equal ones are found among millions."""

import hashlib
import re
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmtuner.data.conversation import Conversation, Message

Digests = NDArray[np.int64]

_PLACE = re.compile(r"(.*[:#])(\d+)", re.DOTALL)


def row_digest(conversation: Conversation) -> int:
    """Return 64 bits of a hash of all that a row says; its place does not count."""
    return _digest(conversation.messages, conversation.tools)


def question_digest(conversation: Conversation) -> int | None:
    """Return the same for all before the last answer; None where there is no question."""
    *before, last = conversation.messages
    if not before or not last.train:
        return None
    return _digest(before, conversation.tools)


def _digest(messages: Sequence[Message], tools: str | None) -> int:
    parts = [tools or ""]
    for message in messages:
        parts += [message.role, message.content, message.thinking or ""]
        for call in message.tool_calls:
            parts += ["call", call.name, call.arguments]
    # no text holds NUL: the reader refuses it
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)


class Places:
    """The `file:line` of many rows, in a few bytes each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}  # of the files
        self._file_numbers = array("l")
        self._row_numbers = array("q")

    def append(self, place: str) -> None:
        """Add the place of the next row."""
        found = _PLACE.fullmatch(place)
        file, row = (found[1], int(found[2])) if found else (place, -1)
        if file not in self._numbers:
            self._numbers[file] = len(self._files)
            self._files.append(file)
        self._file_numbers.append(self._numbers[file])
        self._row_numbers.append(row)

    def extend(self, other: "Places") -> None:
        """Add the places of the rows behind these."""
        numbers = [self._numbers.setdefault(file, len(self._numbers)) for file in other._files]
        self._files += list(self._numbers)[len(self._files) :]
        self._file_numbers.extend(numbers[number] for number in other._file_numbers)
        self._row_numbers.extend(other._row_numbers)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._row_numbers)

    def __getitem__(self, number: int) -> str:
        """Return the place of a row."""
        file = self._files[self._file_numbers[number]]
        row = self._row_numbers[number]
        return file if row < 0 else f"{file}{row}"
