"""The usual way: make a sample fit into `cutoff_len` without changing what it means.

Whole exchanges are dropped from the oldest; the system prompt stays. When the last exchange alone
is too long, text of the user (or of a tool) is cut inside its own message, from the front, and an
answer that must be cut loses its tail: then no end token is learned.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from llmtuner.data.conversation import Message
from llmtuner.data.drafts import Draft, cut_draft, draft_turns, last_length
from llmtuner.data.fitted import Fitted, MakeChat
from llmtuner.data.jobs import Job

_NEAR_TOKENS = 4  # a cut text may stay this much shorter than it could


def fit(
    draft: Draft, messages: Sequence[Message], *, make_chat: MakeChat, cutoff_len: int
) -> Job[Fitted]:
    """Return `draft` unchanged where it fits, else what of it can be kept.

    Args:
        draft: made of `messages`.
        messages: the whole conversation.
        make_chat: makes a chat of a part of the conversation.
        cutoff_len: longest sample in tokens.
    """
    if len(draft.ids) <= cutoff_len:
        return Fitted([draft])
    turns = [span.turn for span in draft.spans]
    messages = messages[: turns[-1] + 1]
    num_system = int(messages[0].role == "system")
    starts = [
        number
        for number in range(num_system + 1, len(messages))
        if messages[number].role == "user" and messages[number - 1].role != "user"
    ]

    def without(start: int) -> tuple[list[Message], list[int]]:
        kept = [*messages[:num_system], *messages[start:]]
        return kept, [turn - start + num_system for turn in turns if turn >= start]

    def length_from(number: int) -> Job[int]:
        kept, left = without(starts[number])
        return (yield from last_length(make_chat(kept), left[-1], with_answer=True))

    sizes = [sum(len(message.content) for message in messages[start:]) for start in starts]
    first = yield from _first_that_fits(length_from, sizes, len(draft.ids), cutoff_len)
    for start in starts[first:]:
        kept, left = without(start)
        parts = yield from draft_turns(make_chat(kept), left)
        if all(len(part.ids) <= cutoff_len for part in parts):
            return Fitted(parts, len(turns) - len(left), is_prompt_cut=True)
    kept, left = without(starts[-1]) if starts else (list(messages), turns)
    parts = yield from draft_turns(make_chat(kept), left)
    cut = []
    for part in parts:
        cut.append((yield from _cut_exchange(part, kept, make_chat, cutoff_len)))
    return Fitted(
        [part for fitted in cut for part in fitted.drafts],
        len(turns) - len(left) + sum(fitted.num_turns_dropped for fitted in cut),
        is_prompt_cut=bool(starts) or any(fitted.is_prompt_cut for fitted in cut),
        is_answer_cut=any(fitted.is_answer_cut for fitted in cut),
    )


def _first_that_fits(
    length_from: Callable[[int], Job[int]], sizes: Sequence[int], length: int, cutoff_len: int
) -> Job[int]:
    """Return the first exchange from which the rest fits; `len(sizes)` when none does.

    The search starts where the number of characters says, so that few lengths are measured.

    Args:
        length_from: measures the tokens from an exchange on.
        sizes: characters from each exchange on, falling.
        length: tokens of the whole.
        cutoff_len: most tokens allowed.
    """
    low, high = 0, len(sizes)
    per_character = length / max(sizes[0] if sizes else 1, 1)
    guess = next((n for n, size in enumerate(sizes) if size * per_character <= cutoff_len), high)
    while low < high:
        middle = min(max(guess, low), high - 1)
        measured = yield from length_from(middle)
        if measured <= cutoff_len:
            high, guess = middle, middle - 1
        else:
            low, guess = middle + 1, middle + 1
    return low


def _cut_exchange(
    draft: Draft, messages: Sequence[Message], make_chat: MakeChat, cutoff_len: int
) -> Job[Fitted]:
    """Cut the text of one exchange; half of the room is the prompt's if it needs it."""
    num_turns, prompt_len = len(draft.spans), draft.spans[0].start
    answer_len = len(draft.ids) - prompt_len
    room = min(max(cutoff_len - answer_len, cutoff_len // 2), cutoff_len - 1)
    is_prompt_cut = prompt_len > room
    if is_prompt_cut:
        before = messages[: draft.spans[-1].turn + 1]
        draft = yield from _cut_prompt(draft, before, make_chat, room)
    cut = cut_draft(draft, cutoff_len)
    if cut is None:
        return Fitted([], num_turns, is_prompt_cut=True)
    return Fitted(
        [cut],
        num_turns - len(cut.spans),
        is_prompt_cut=is_prompt_cut,
        is_answer_cut=cut.spans[-1].is_cut,
    )


def _cut_prompt(
    draft: Draft, messages: Sequence[Message], make_chat: MakeChat, room: int
) -> Job[Draft]:
    """Cut the longest texts before the answer from the front until the prompt has `room` tokens."""
    changed = list(messages)
    turns = [span.turn for span in draft.spans]
    before = [n for n in range(turns[0]) if messages[n].role in ("user", "tool")]
    length = draft.spans[0].start
    for number in sorted(before, key=lambda n: len(messages[n].content), reverse=True):
        text = messages[number].content

        def kept(num_kept: int, number: int = number, text: str = text) -> list[Message]:
            content = text[len(text) - num_kept :]
            return [*changed[:number], replace(changed[number], content=content)]

        def length_with(num_kept: int, number: int = number) -> Job[int]:
            shown = [*kept(num_kept), *changed[number + 1 : turns[0] + 1]]
            return (yield from last_length(make_chat(shown), turns[0], with_answer=False))

        num_kept, length = yield from _most_that_fits(length_with, len(text), length, room)
        changed[: number + 1] = kept(num_kept)
        if length <= room:
            break
    parts = yield from draft_turns(make_chat(changed), turns)
    return parts[0]


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
