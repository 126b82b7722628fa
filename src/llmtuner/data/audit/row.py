"""What the audit looks at: one row beside what became of it, and what a detector says of it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import Conversation
from llmtuner.data.render import Encoded
from llmtuner.data.template import Template, any_of
from llmtuner.extras.errors import DataError


class Hit(NamedTuple):
    """One place of a defect inside a row.

    Attributes:
        turn: counted from 1 in the row; None where the row as a whole is meant.
        note: what exactly was found.
    """

    turn: int | None = None
    note: str = ""


class Text(NamedTuple):
    """One text of a row: a message, a thought, or the parts of a tool call.

    Attributes:
        turn: counted from 1; None for the tool definitions.
        role: who wrote it; "tools" for the tool definitions.
        value: byte for byte as in the file.
    """

    turn: int | None
    role: str
    value: str


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizer and template treat as control tokens.

    Attributes:
        bos_id: begins a text; None where there is none.
        writes_bos: the tokenizer puts it in front of a text by itself.
        end_ids: ids of which one must end every answer or document.
        guards: finds the control tokens in texts that must not become them.
        answer_guards: the same for answers, which may hold thinking tags.
        writes_arguments_as_text: tool calls stand in the prompt byte for byte.
    """

    bos_id: int | None
    writes_bos: bool
    end_ids: frozenset[int]
    guards: re.Pattern[str]
    answer_guards: re.Pattern[str]
    writes_arguments_as_text: bool = False


@dataclass(frozen=True)
class AuditedRow:
    """A row, and what became of it.

    Attributes:
        conversation: as the file has it.
        encoded: what is trained of it.
        vocabulary: the control tokens.
        refusal: why the row cannot be encoded; None where it can.
    """

    conversation: Conversation
    encoded: Encoded
    vocabulary: Vocabulary
    refusal: DataError | None = None

    @cached_property
    def texts(self) -> tuple[Text, ...]:
        """Every text of the row that is not empty."""
        return tuple(text for text in _texts(self.conversation) if text.value)


RowDetector = Callable[[AuditedRow], Iterator[Hit]]
"""Says where a row has the defect; says nothing of a good row."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> Vocabulary:
    """Find the control tokens of a run.

    Args:
        tokenizer: the one that encodes.
        template: None for plain texts.
    """
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    writes_bos = bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
    if template is not None:
        return Vocabulary(
            bos_id,
            writes_bos,
            frozenset(template.stop_ids),
            template.guards,
            template.answer_guards,
            template.abilities.arguments_as_text,
        )
    added = tokenizer.added_tokens_decoder.values()
    control = any_of([token.content for token in added if token.special and token.content.strip()])
    ends = frozenset() if eos_id is None else frozenset({eos_id})
    return Vocabulary(bos_id, writes_bos, ends, control, control)


def _texts(conversation: Conversation) -> Iterator[Text]:
    for turn, message in enumerate(conversation.messages, start=1):
        yield Text(turn, message.role, message.content)
        if message.thinking:
            yield Text(turn, message.role, message.thinking)
        for call in message.tool_calls:
            yield Text(turn, message.role, call.name)
            yield Text(turn, message.role, call.arguments)
    if conversation.tools:
        yield Text(None, "tools", conversation.tools)
