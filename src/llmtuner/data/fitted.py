"""What a truncation makes of a sample that is too long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmtuner.data.conversation import Message
from llmtuner.data.drafts import Draft
from llmtuner.data.jobs import Job
from llmtuner.data.prompt import Chat

MakeChat = Callable[[Sequence[Message]], Chat]
"""Brings a part of the conversation into the form that the template takes."""


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


class Fit(Protocol):
    """A truncation."""

    def __call__(
        self, draft: Draft, messages: Sequence[Message], *, make_chat: MakeChat, cutoff_len: int
    ) -> Job[Fitted]:
        """Return the draft unchanged where it fits, else what of it is kept."""
        ...
