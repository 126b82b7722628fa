"""Making a conversation shorter without changing what it means: where, and by how much.

Lengths are known only after tokenising, so what measures them is passed in as a job.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial

from llmtuner.data.conversation import Message
from llmtuner.data.jobs import Job

_NEAR_TOKENS = 4  # a cut text may stay this much shorter than it could

Measure = Callable[[Sequence[Message]], Job[int]]
"""Returns the tokens of what is made of these turns."""


def exchange_starts(messages: Sequence[Message]) -> list[int]:
    """Return the turns at which the conversation could begin instead; the first one is left out."""
    return [
        number
        for number in range(int(messages[0].role == "system") + 1, len(messages))
        if messages[number].role == "user" and messages[number - 1].role != "user"
    ]


def first_that_fits(
    length_from: Callable[[int], Job[int]], sizes: Sequence[int], length: int, limit: int
) -> Job[int]:
    """Return the first exchange from which the rest fits; `len(sizes)` when none does.

    The search starts where the number of characters says, so that few lengths are measured.

    Args:
        length_from: measures the tokens from an exchange on.
        sizes: characters from each exchange on, falling.
        length: tokens of the whole.
        limit: most tokens allowed.
    """
    low, high = 0, len(sizes)
    per_character = length / max(sizes[0] if sizes else 1, 1)
    guess = next((n for n, size in enumerate(sizes) if size * per_character <= limit), high)
    while low < high:
        middle = min(max(guess, low), high - 1)
        measured = yield from length_from(middle)
        if measured <= limit:
            high, guess = middle, middle - 1
        else:
            low, guess = middle + 1, middle + 1
    return low


def cut_texts(
    messages: Sequence[Message], measure: Measure, *, length: int, room: int
) -> Generator[list[str], list[list[int]], tuple[list[Message], int]]:
    """Cut the longest texts of users and tools from the front until `room` tokens are left.

    Args:
        messages: too long by their texts.
        measure: tokens of such messages.
        length: tokens of `messages`.
        room: most tokens allowed.

    Returns:
        The messages, and their tokens: more than `room` when empty texts are not short enough.
    """
    changed = list(messages)
    texts = [n for n, message in enumerate(messages) if message.role in ("user", "tool")]
    for number in sorted(texts, key=lambda n: len(messages[n].content), reverse=True):
        length_with = partial(_measure_cut, tuple(changed), number, measure)
        num_characters = len(messages[number].content)
        num_kept, length = yield from _most_that_fits(length_with, num_characters, length, room)
        changed = _cut(changed, number, num_kept)
        if length <= room:
            break
    return changed, length


def _cut(messages: Sequence[Message], number: int, num_kept: int) -> list[Message]:
    """Return the messages with only the last characters of one text."""
    text = messages[number].content
    short = replace(messages[number], content=text[len(text) - num_kept :])
    return [*messages[:number], short, *messages[number + 1 :]]


def _measure_cut(
    messages: Sequence[Message], number: int, measure: Measure, num_kept: int
) -> Job[int]:
    return (yield from measure(_cut(messages, number, num_kept)))


def _most_that_fits(
    length_with: Callable[[int], Job[int]], num_characters: int, length: int, room: int
) -> Generator[list[str], list[list[int]], tuple[int, int]]:
    """Return how many characters to keep so that the prompt fits, and its length then.

    Interpolates, since tokens grow with characters; (0, length) when nothing is short enough.

    Args:
        length_with: measures the prompt with that many characters kept.
        num_characters: of the whole text, which is too long.
        length: tokens of the prompt with the whole text.
        room: most tokens allowed.
    """
    low, high = 0, num_characters
    low_length, high_length = (yield from length_with(0)), length
    is_even = False
    while high - low > 1 and not room - _NEAR_TOKENS <= low_length <= room and low_length <= room:
        share = (room - low_length) / max(high_length - low_length, 1)
        middle = (low + high) // 2 if is_even else low + int((high - low) * share)
        middle = min(max(middle, low + 1), high - 1)
        measured = yield from length_with(middle)
        if measured <= room:
            low, low_length = middle, measured
        else:
            high, high_length = middle, measured
        is_even = not is_even
    return low, low_length
