"""Defects of what is trained of a row: cut, dropped, unproved, without its end."""

from collections.abc import Iterator, Sequence

from llmtuner.data.audit.row import AuditedRow, Hit
from llmtuner.data.drafts import Draft
from llmtuner.data.render import Sample
from llmtuner.extras.errors import TemplateError


def contract_unproved(row: AuditedRow) -> Iterator[Hit]:
    """Find a row for which training and serving cannot be shown to agree."""
    if isinstance(row.refusal, TemplateError):
        yield Hit(None, row.refusal.problem)


def prompt_not_served(row: AuditedRow) -> Iterator[Hit]:
    """Find a prompt that was cut where serving would not cut it."""
    for draft in row.encoded.drafts:
        if not draft.is_provable:
            yield Hit(_turn_in_row(row, draft, draft.spans[0].turn))


def thought_unasked(row: AuditedRow) -> Iterator[Hit]:
    """Find an answer with a thought where serving asks for none, or without where it thinks."""
    for draft in row.encoded.drafts:
        for span in draft.spans:
            if span.is_thought_unasked:
                yield Hit(_turn_in_row(row, draft, span.turn))


def nothing_supervised(row: AuditedRow) -> Iterator[Hit]:
    """Find a row of which nothing is trained."""
    if row.refusal is None and row.encoded.is_left_out:
        is_cut = row.encoded.is_truncated
        yield Hit(None, "cutoff_len is too small for it" if is_cut else "no turn is to be trained")


def answer_cut(row: AuditedRow) -> Iterator[Hit]:
    """Find an answer that lost its tail, and its end token with it."""
    if not row.encoded.is_answer_cut:
        return
    cut = [(draft, span) for draft in row.encoded.drafts for span in draft.spans if span.is_cut]
    for draft, span in cut:
        kept = f"{span.end - span.start} tokens are left of it"
        yield Hit(_turn_in_row(row, draft, span.turn), kept)
    if not cut:
        yield Hit()


def prompt_cut(row: AuditedRow) -> Iterator[Hit]:
    """Find a row of which turns before the trained ones, or text in them, are gone."""
    if row.encoded.is_prompt_cut:
        yield Hit()


def turns_dropped(row: AuditedRow) -> Iterator[Hit]:
    """Find a row with answers that are not trained because they did not fit."""
    if row.encoded.num_turns_dropped and not row.encoded.is_left_out:
        yield Hit(None, f"{row.encoded.num_turns_dropped} trained turns")


def double_bos(row: AuditedRow) -> Iterator[Hit]:
    """Find two BOS in a row; where BOS also ends texts, only at the start."""
    bos_id = row.vocabulary.bos_id
    for sample in row.encoded.samples:
        ids = sample.input_ids
        if bos_id is None or ids.count(bos_id) < 2:
            continue
        is_end = bos_id in row.vocabulary.end_ids
        places = iter([0]) if is_end else _places(ids, bos_id)
        place = next((n for n in places if ids[n] == bos_id == ids[n + 1]), None)
        if place is not None:
            yield Hit(None, f"tokens {place} and {place + 1}")


def _places(ids: Sequence[int], token_id: int) -> Iterator[int]:
    """Yield where a token is, but for the last time."""
    place = -1
    for _ in range(ids.count(token_id) - 1):
        place = ids.index(token_id, place + 1)
        yield place


def missing_bos(row: AuditedRow) -> Iterator[Hit]:
    """Find a sample without the BOS that the tokenizer itself puts in front of every text."""
    if row.vocabulary.writes_bos and any(
        sample.input_ids[0] != row.vocabulary.bos_id for sample in row.encoded.samples
    ):
        yield Hit()


def end_token_not_learned(row: AuditedRow) -> Iterator[Hit]:
    """Find a whole answer or document of which the end token carries no label."""
    ends = row.vocabulary.end_ids
    samples, drafts = row.encoded.samples, row.encoded.drafts
    if not drafts:  # plain texts: the last piece holds the end
        if samples and not _is_end_learned(samples[-1], len(samples[-1].input_ids), ends):
            yield Hit()
        return
    for sample, draft in zip(samples, drafts, strict=True):
        for span in draft.spans:
            if not span.is_cut and not _is_end_learned(sample, span.end, ends):
                yield Hit(_turn_in_row(row, draft, span.turn))


def _is_end_learned(sample: Sample, end: int, ends: frozenset[int]) -> bool:
    """Say whether the token before `end` ends answers, and carries a label."""
    is_learned = any(first < end <= last for first, last in sample.trained)
    return is_learned and sample.input_ids[end - 1] in ends


def _turn_in_row(row: AuditedRow, draft: Draft, turn: int) -> int:
    """Return which turn of the row, counted from 1, a message of the sample is.

    A sample that had to be shortened lacks turns at its front, behind the system turn.
    """
    own, left = row.conversation.messages, draft.chat.messages
    text = left[turn].content
    for number in reversed(range(turn, turn + len(own) - len(left) + 1)):
        other = own[number]
        # thinking may have been moved into the text, or out of it
        is_same = other.content.endswith(text) or text.endswith(other.content)
        if other.role == left[turn].role and is_same:
            return number + 1
    return turn + 1
