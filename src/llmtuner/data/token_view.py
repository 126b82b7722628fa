"""A sample token by token: which characters each token gives, and which tokens are learned.

A character may span several tokens (Chinese and emoji in byte-level vocabularies); these share one
cell, so that people see characters while every token keeps its number and its id.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import IGNORE_INDEX
from llmtuner.data.drafts import Span
from llmtuner.data.render import Encoded, Sample

_BROKEN = "\ufffd"  # what decoding writes for a part of a character
_MOST_TOKENS = 8  # of one cell; a character has at most four bytes, or a space and four
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token for one byte, which some vocabularies call special
_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_HIDDEN = ("Cc", "Cf", "Zl", "Zp")  # control and format characters, line and paragraph separators


@dataclass(frozen=True)
class Cell:
    """The fewest tokens that give whole characters.

    Attributes:
        text: what they add to the text of the sample; a broken character is U+FFFD.
        start: number of the first one in the sample.
        ids: their ids.
        is_trained: whether the model learns them.
        is_special: whether it is a control token.
    """

    text: str
    start: int
    ids: tuple[int, ...]
    is_trained: bool
    is_special: bool


@dataclass(frozen=True)
class TurnView:
    """One trained answer.

    Attributes:
        message: its number among the messages that are left of the row; None for a plain text.
        start: its first token in the sample.
        end: behind its last token.
        prompt_text: everything before it, which is what serving sends.
        trained_text: what is learned, end token included.
        is_cut: the tail is missing, and the end token with it.
    """

    message: int | None
    start: int
    end: int
    prompt_text: str
    trained_text: str
    is_cut: bool = False


@dataclass(frozen=True)
class SampleView:
    """One sequence as the model gets it.

    Attributes:
        source: `file:line` or `file#row` of the row.
        ids: token ids.
        mask: 1 where the token has a label, else 0.
        text: the decoded ids.
        cells: the same tokens in order, by characters.
        turns: the trained answers.
        notes: what the row lost to `cutoff_len`, in words.
    """

    source: str
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    text: str
    cells: tuple[Cell, ...]
    turns: tuple[TurnView, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_trained(self) -> int:
        """Tokens that are targets; the first one has nothing before it to be predicted from."""
        return sum(self.mask[1:])


def token_view(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[SampleView]:
    """Return the samples of one row, ready to be shown.

    Args:
        encoded: one row, from an encoder.
        tokenizer: the one that encoded it.
    """
    notes = losses(encoded)
    spans: list[tuple[Span, ...]] = [draft.spans for draft in encoded.drafts]
    spans = spans or [()] * len(encoded.samples)
    return [
        _view(sample, own, tokenizer, notes)
        for sample, own in zip(encoded.samples, spans, strict=True)
    ]


def losses(encoded: Encoded) -> tuple[str, ...]:
    """Return in words what the row lost to `cutoff_len`."""
    count = encoded.num_turns_dropped
    found = {
        f"{count} trained {'turn was' if count == 1 else 'turns were'} dropped": count > 0,
        "the prompt was cut": encoded.is_prompt_cut,
        "an answer was cut, and its end is not learned": encoded.is_answer_cut,
        "the prompt is not one that serving sends": not all(d.is_provable for d in encoded.drafts),
    }
    return tuple(words for words, is_true in found.items() if is_true)


def row_report(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, template: str | None
) -> dict[str, Any]:
    """Return one row as JSON values: its samples end to end, as they lie in a flat batch.

    Args:
        encoded: one row, from an encoder.
        tokenizer: the one that encoded it.
        template: the value of `--template`; None for the tokenizer's own, and for plain texts.
    """
    views = token_view(encoded, tokenizer)
    ids = [number for view in views for number in view.ids]
    ends = [sum(len(view.ids) for view in views[: n + 1]) for n in range(len(views))]
    samples = [
        {
            "start": end - len(view.ids),
            "end": end,
            "turns": [
                {
                    "message": turn.message,
                    "start": end - len(view.ids) + turn.start,
                    "end": end - len(view.ids) + turn.end,
                    "is_cut": turn.is_cut,
                }
                for turn in view.turns
            ],
        }
        for view, end in zip(views, ends, strict=True)
    ]
    return {
        "source": encoded.source,
        "template": template,
        "num_supervised_tokens": sum(view.num_trained for view in views),
        "is_prompt_cut": encoded.is_prompt_cut,
        "is_answer_cut": encoded.is_answer_cut,
        "num_turns_dropped": encoded.num_turns_dropped,
        "text": _decode(ids, tokenizer),
        "prompt_text": [turn.prompt_text for view in views for turn in view.turns],
        "trained_text": [turn.trained_text for view in views for turn in view.turns],
        "samples": samples,
        "ids": ids,
        "mask": [bit for view in views for bit in view.mask],
    }


def visible(text: str) -> str:
    """Return `text` with a sign for every character that one would not see, or that acts.

    A line break becomes ⏎ and stays a line break; escape sequences and changes of the writing
    direction lose their effect.
    """
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character] + ("\n" if character == "\n" else "")
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in _HIDDEN:
        return f"\\u{{{ord(character):x}}}"
    return character


def _view(
    sample: Sample,
    spans: Sequence[Span],
    tokenizer: PreTrainedTokenizerBase,
    notes: tuple[str, ...],
) -> SampleView:
    ids = sample.input_ids
    mask = [int(label != IGNORE_INDEX) for label in sample.labels]
    text = _decode(ids, tokenizer)
    turns = tuple(
        TurnView(
            message=span.turn,
            start=span.start,
            end=span.end,
            prompt_text=_decode(ids[: span.start], tokenizer),
            trained_text=_decode(ids[span.start : span.end], tokenizer),
            is_cut=span.is_cut,
        )
        for span in spans
    )
    return SampleView(
        source=sample.source,
        ids=tuple(ids),
        mask=tuple(mask),
        text=text,
        cells=tuple(_cells(ids, mask, tokenizer)),
        turns=turns or (TurnView(None, 0, len(ids), "", text),),
        notes=notes,
    )


def _cells(
    ids: Sequence[int], mask: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Cell]:
    special = _special_ids(tokenizer)
    cells: list[Cell] = []
    before = 0  # some tokenizers write a space only behind another token, so one is decoded along
    start = 0
    while start < len(ids):
        end, text = start + 1, _added(ids, before, start, start + 1, tokenizer)
        if _BROKEN in text and ids[start] not in special:
            end, text = _whole(ids, mask, special, before, start, tokenizer) or (end, text)
        piece = tuple(ids[start:end])
        cells.append(Cell(text, start, piece, bool(mask[start]), ids[start] in special))
        # A part of a character would spoil the text of whatever is decoded along with it.
        before, start = (end if _BROKEN in text else start), end
    return cells


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return {n for n in special if n not in added or not _BYTE.fullmatch(added[n].content)}


def _whole(
    ids: Sequence[int],
    mask: Sequence[int],
    special: set[int],
    before: int,
    start: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, str] | None:
    """Return the end and the text of the fewest tokens from `start` on that break no character.

    None when there are none: the text itself holds U+FFFD, or was cut inside a character.
    """
    for end in range(start + 2, min(start + _MOST_TOKENS, len(ids)) + 1):
        if ids[end - 1] in special or mask[end - 1] != mask[start]:
            return None
        text = _added(ids, before, start, end, tokenizer)
        if _BROKEN not in text:
            return end, text
    return None


def _added(
    ids: Sequence[int], before: int, start: int, end: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return what the tokens `start:end` add to the text of `before:start`."""
    known = _decode(ids[before:start], tokenizer)
    text = _decode(ids[before:end], tokenizer)
    return text[len(known) :] if text.startswith(known) else _decode(ids[start:end], tokenizer)


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: Any = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)
