"""LLaMA-Factory's way: token counts decide, turn by turn from the oldest, and cut from the right.

For runs that must be comparable with LLaMA-Factory 0.9. A prompt can lose the end of the question
and the header of the answer, which serving never sends; such samples are counted and not proved.
Source: the behaviour of LLaMA-Factory 0.9.5, `infer_seqlen`.
"""

from collections.abc import Sequence
from dataclasses import replace

from llmtuner.data.conversation import Message
from llmtuner.data.drafts import Draft, Span
from llmtuner.data.fitted import Fitted, MakeChat
from llmtuner.data.jobs import Job


def fit(
    draft: Draft, messages: Sequence[Message], *, make_chat: MakeChat, cutoff_len: int
) -> Job[Fitted]:
    """Return `draft` unchanged where it fits, else its turns cut to shares of `cutoff_len`.

    Args:
        draft: made of `messages`.
        messages: unused; part of how every truncation is called.
        make_chat: unused.
        cutoff_len: longest sample in tokens.
    """
    yield from ()
    if len(draft.ids) <= cutoff_len:
        return Fitted([draft])
    ids: list[int] = []
    spans: list[Span] = []
    is_prompt_cut = False
    end = 0
    for span in draft.spans:
        room = cutoff_len - len(ids)
        if room <= 0:
            break
        prompt, answer = draft.ids[end : span.start], draft.ids[span.start : span.end]
        end = span.end
        num_prompt, num_answer = shares(len(prompt), len(answer), room)
        is_prompt_cut = is_prompt_cut or num_prompt < len(prompt)
        ids += prompt[:num_prompt]
        if num_answer:
            start = len(ids)
            ids += answer[:num_answer]
            is_cut = num_answer < len(answer)
            spans.append(replace(span, start=start, end=len(ids), is_cut=is_cut))
    if not spans:
        return Fitted([], len(draft.spans), is_prompt_cut=True)
    cut = Draft(ids[: spans[-1].end], tuple(spans), draft.chat, is_provable=not is_prompt_cut)
    return Fitted(
        [cut],
        len(draft.spans) - len(spans),
        is_prompt_cut=is_prompt_cut,
        is_answer_cut=any(span.is_cut for span in spans),
    )


def shares(num_prompt: int, num_answer: int, room: int) -> tuple[int, int]:
    """Return how many tokens of a prompt and of its answer are kept in `room` tokens."""
    if 2 * num_answer < room:
        most = room
    elif 2 * num_prompt < room:
        most = room - num_prompt
    else:
        most = room * num_answer // (num_prompt + num_answer)
    kept = min(most, num_answer)
    return min(max(room - kept, 0), num_prompt), kept
