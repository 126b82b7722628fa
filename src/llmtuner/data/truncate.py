"""Making a sample fit into `cutoff_len` without changing what it means.

Whole exchanges are dropped from the oldest; the system prompt stays. When the last exchange alone
is too long, text of the user (or of a tool) is cut inside its own message, from the front, and an
answer that must be cut loses its tail: then no end token is learned.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from llmtuner.data.conversation import Message
from llmtuner.data.spans import Draft

EncodeDrafts = Callable[[Sequence[Message], Iterable[int]], list[Draft]]
"""Encodes messages of which the given numbers are trained."""


@dataclass(frozen=True)
class Fitted:
    """What became of one sample.

    Attributes:
        drafts: what is left of it.
        num_turns_dropped: trained turns that are gone.
        is_prompt_cut: turns before the trained ones, or text in them, are gone.
        is_answer_cut: an answer lost its tail.
    """

    drafts: list[Draft]
    num_turns_dropped: int = 0
    is_prompt_cut: bool = False
    is_answer_cut: bool = False


def fit(
    draft: Draft, messages: Sequence[Message], *, encode: EncodeDrafts, cutoff_len: int | None
) -> Fitted:
    """Return `draft` unchanged where it fits, else what of it can be kept.

    Args:
        draft: made of `messages`.
        messages: the whole conversation.
        encode: makes drafts of a part of the conversation.
        cutoff_len: longest sample in tokens; None for no limit.
    """
    if cutoff_len is None or len(draft.ids) <= cutoff_len:
        return Fitted([draft])
    messages = messages[: draft.turns[-1] + 1]
    num_system = int(messages[0].role == "system")
    starts = [
        number
        for number in range(num_system + 1, len(messages))
        if messages[number].role == "user" and messages[number - 1].role != "user"
    ]

    def without(start: int) -> tuple[list[Message], list[int]]:
        kept = [*messages[:num_system], *messages[start:]]
        shift = start - num_system
        return kept, [turn - shift for turn in draft.turns if turn >= start]

    # The fewest exchanges to drop; each one less makes the sample longer.
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        drafts = encode(*without(starts[middle]))
        if all(len(part.ids) <= cutoff_len for part in drafts):
            high = middle
        else:
            low = middle + 1
    if low < len(starts):
        kept, turns = without(starts[low])
        return Fitted(encode(kept, turns), len(draft.turns) - len(turns), is_prompt_cut=True)
    kept, turns = without(starts[-1]) if starts else (list(messages), draft.turns)
    parts = [_cut_exchange(part, kept, encode, cutoff_len) for part in encode(kept, turns)]
    return Fitted(
        [part for fitted in parts for part in fitted.drafts],
        len(draft.turns) - len(turns) + sum(fitted.num_turns_dropped for fitted in parts),
        is_prompt_cut=bool(starts) or any(fitted.is_prompt_cut for fitted in parts),
        is_answer_cut=any(fitted.is_answer_cut for fitted in parts),
    )


def _cut_exchange(
    draft: Draft, messages: Sequence[Message], encode: EncodeDrafts, cutoff_len: int
) -> Fitted:
    """Cut the text of one exchange; half of the room is the prompt's if it needs it."""
    num_turns, prompt_len = len(draft.turns), draft.spans[0][0]
    answer_len = len(draft.ids) - prompt_len
    room = min(max(cutoff_len - answer_len, cutoff_len // 2), cutoff_len - 1)
    is_prompt_cut = prompt_len > room
    if is_prompt_cut:
        draft = _cut_prompt(draft, messages[: draft.turns[-1] + 1], encode, room)
    if draft.spans[0][0] >= cutoff_len:
        return Fitted([], num_turns, is_prompt_cut=True)
    spans = [(start, min(end, cutoff_len)) for start, end in draft.spans if start < cutoff_len]
    cut = Draft(draft.ids[: spans[-1][1]], spans, draft.turns[: len(spans)])
    return Fitted(
        [cut],
        num_turns - len(spans),
        is_prompt_cut=is_prompt_cut,
        is_answer_cut=spans != draft.spans[: len(spans)],
    )


def _cut_prompt(
    draft: Draft, messages: Sequence[Message], encode: EncodeDrafts, room: int
) -> Draft:
    """Cut the longest texts before the answer from the front until the prompt has `room` tokens."""
    changed = list(messages)
    before = [n for n in range(draft.turns[0]) if messages[n].role in ("user", "tool")]
    for number in sorted(before, key=lambda n: len(messages[n].content), reverse=True):
        text = messages[number].content

        def with_last(num_kept: int, number: int = number, text: str = text) -> Draft:
            content = text[len(text) - num_kept :]
            changed[number] = replace(messages[number], content=content)
            return encode(changed, draft.turns)[0]

        low, high = 0, len(text)
        while low < high:  # the most characters that fit
            middle = (low + high + 1) // 2
            if with_last(middle).spans[0][0] <= room:
                low = middle
            else:
                high = middle - 1
        result = with_last(low)
        if result.spans[0][0] <= room:
            return result
    return encode(changed, draft.turns)[0]
