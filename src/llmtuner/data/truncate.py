"""Making a sample fit into `cutoff_len` without changing what it means."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmtuner.data.conversation import Message
from llmtuner.data.spans import Draft

EncodeDrafts = Callable[[Sequence[Message], Iterable[int]], list[Draft]]


@dataclass(frozen=True)
class Fitted:
    """What became of one sample."""

    drafts: list[Draft]
    num_turns_dropped: int = 0
    is_prompt_cut: bool = False
    is_answer_cut: bool = False


def fit(
    draft: Draft, messages: Sequence[Message], *, encode: EncodeDrafts, cutoff_len: int | None
) -> Fitted:
    """Return the sample unchanged where it fits."""
    if cutoff_len is None or len(draft.ids) <= cutoff_len:
        return Fitted([draft])
    return Fitted([], num_turns_dropped=len(draft.turns))
