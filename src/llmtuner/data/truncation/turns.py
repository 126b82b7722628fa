"""The usual way: make a sample fit into `cutoff_len` without changing what it means.

Whole exchanges are dropped from the oldest; the system prompt stays. When the last exchange alone
is too long, text of the user (or of a tool) is cut inside its own message, from the front, and an
answer that must be cut loses its tail: then no end token is learned.
"""

from collections.abc import Sequence

from llmtuner.data.conversation import Message
from llmtuner.data.drafts import Draft, cut_draft, draft_turns, last_length
from llmtuner.data.fitted import Fitted, MakeChat
from llmtuner.data.jobs import Job
from llmtuner.data.shorten import cut_texts, exchange_starts, first_that_fits


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
    starts = exchange_starts(messages)

    def without(start: int) -> tuple[list[Message], list[int]]:
        kept = [*messages[:num_system], *messages[start:]]
        return kept, [turn - start + num_system for turn in turns if turn >= start]

    def length_from(number: int) -> Job[int]:
        kept, left = without(starts[number])
        return (yield from last_length(make_chat(kept), left[-1], with_answer=True))

    sizes = [sum(len(message.content) for message in messages[start:]) for start in starts]
    first = yield from first_that_fits(length_from, sizes, len(draft.ids), cutoff_len)
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
    turns = [span.turn for span in draft.spans]
    first = turns[0]

    def measure(shown: Sequence[Message]) -> Job[int]:
        return (yield from last_length(make_chat(shown), first, with_answer=False))

    length = draft.spans[0].start
    before = messages[: first + 1]
    changed, _ = yield from cut_texts(before, measure, length=length, room=room)
    parts = yield from draft_turns(make_chat([*changed, *messages[first + 1 :]]), turns)
    return parts[0]
