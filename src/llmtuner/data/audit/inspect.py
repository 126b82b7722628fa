"""What is noted of each row while it is tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtuner.data.audit.defects import ROW_DETECTORS
from llmtuner.data.audit.fingerprint import question_digest, row_digest
from llmtuner.data.audit.row import AuditedRow, Hit, Vocabulary
from llmtuner.data.conversation import Conversation
from llmtuner.data.render import Encoded
from llmtuner.extras.errors import DataError


@dataclass(frozen=True, slots=True)
class RowNotes:
    """What the audit keeps of one row.

    Attributes:
        place: `file:line` or `file#row`.
        num_turns: messages of the row.
        sample_tokens: tokens of each sample.
        supervised_tokens: tokens of the row that are trained.
        digest: hash of the row.
        question: hash of what comes before the last answer; None where there is none.
        hits: name of a defect and where it was found.
        refusal: why the row cannot be encoded; None where it can.
    """

    place: str
    num_turns: int
    sample_tokens: tuple[int, ...]
    supervised_tokens: int
    digest: int
    question: int | None
    hits: tuple[tuple[str, Hit], ...] = ()
    refusal: DataError | None = None


def inspect_rows(
    conversations: Sequence[Conversation],
    encoded: Sequence[Encoded | DataError],
    vocabulary: Vocabulary,
) -> list[RowNotes]:
    """Look at rows one by one.

    Args:
        conversations: as the file has them.
        encoded: what became of each, or why nothing could.
        vocabulary: the control tokens.
    """
    return [
        _inspect(conversation, result, vocabulary)
        for conversation, result in zip(conversations, encoded, strict=True)
    ]


def _inspect(
    conversation: Conversation, result: Encoded | DataError, vocabulary: Vocabulary
) -> RowNotes:
    refusal = result if isinstance(result, DataError) else None
    encoded = Encoded((), conversation.source) if isinstance(result, DataError) else result
    row = AuditedRow(conversation, encoded, vocabulary, refusal)
    hits = [(name, hit) for name, detect in ROW_DETECTORS.items() for hit in detect(row)]
    return RowNotes(
        place=conversation.source,
        num_turns=len(conversation.messages),
        sample_tokens=tuple(len(sample.input_ids) for sample in encoded.samples),
        supervised_tokens=sum(sample.supervised_tokens for sample in encoded.samples),
        digest=row_digest(conversation),
        question=question_digest(conversation),
        hits=tuple(hits),
        refusal=refusal,
    )
