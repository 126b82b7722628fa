"""Short hashes of rows and questions, by which equal ones are found among millions."""

import hashlib
import re
import tempfile
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmtuner.data.conversation import Conversation, Message

Digests = NDArray[np.int64]

_PLACE = re.compile(r"(.*[:#])(\d{1,12})", re.DOTALL)
_ROW_BITS = 40
_NO_ROW = (1 << _ROW_BITS) - 1
_MOST_HELD = 1 << 16


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


class Numbers:
    """A growing list of 64-bit numbers in a file of its own: memory does not grow with it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the list
        self._last = array("q")
        self._num_written = 0

    def append(self, number: int) -> None:
        """Add one."""
        self._last.append(number)
        if len(self._last) == _MOST_HELD:
            self._write()

    def values(self) -> Digests:
        """Return all of them; the system may drop what it has read of the file."""
        self._write()
        if not self._num_written:
            return np.zeros(0, np.int64)
        return np.memmap(self._file, np.int64, "r")

    def _write(self) -> None:
        self._file.write(self._last)
        self._file.flush()
        self._num_written += len(self._last)
        del self._last[:]

    def __len__(self) -> int:
        """Return how many there are."""
        return self._num_written + len(self._last)


class Places:
    """The `file:line` of many rows."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}  # and their numbers
        self._numbers = Numbers()  # of file and row in one
        self._values: Digests = np.zeros(0, np.int64)

    def append(self, place: str) -> None:
        """Add the place of the next row."""
        found = _PLACE.fullmatch(place)
        file, row = (found[1], int(found[2])) if found else (place, _NO_ROW)
        number = self._files.setdefault(file, len(self._files))
        self._numbers.append(number << _ROW_BITS | row)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._numbers)

    def __getitem__(self, number: int) -> str:
        """Return the place of a row."""
        if len(self._values) != len(self):
            self._values = self._numbers.values()
        value = int(self._values[number])
        file, row = [*self._files][value >> _ROW_BITS], value & _NO_ROW
        return file if row == _NO_ROW else f"{file}{row}"
