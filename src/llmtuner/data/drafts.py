"""From proved turns to token ids, in as few samples as the contract with serving allows.

Prompt and answer are tokenised apart, as serving does. A turn continues the sample of the turn
before when its prompt continues that sample id by id; where a template rewrites history, or history
is tokenised differently inside the later prompt, a new sample begins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmtuner.data.jobs import Job
from llmtuner.data.prompt import GUARD_START, Chat
from llmtuner.data.spans import TurnText, prove_turn, unproved
from llmtuner.data.template import Template


@dataclass(frozen=True)
class Span:
    """One trained answer inside a sample.

    Attributes:
        start: its first token.
        end: behind its last token.
        turn: number of the message in the chat.
        enable_thinking: the setting under which serving sends the prompt of this answer.
        is_cut: the tail is missing, and the end token with it.
        is_thought_unasked: serving thinks otherwise than this answer, unless it is told.
    """

    start: int
    end: int
    turn: int
    enable_thinking: bool | None = None
    is_cut: bool = False
    is_thought_unasked: bool = False


@dataclass(frozen=True)
class Draft:
    """A sample in the making.

    Attributes:
        ids: token ids.
        spans: the trained answers, in order; at least one.
        chat: what the sample was made of.
        is_provable: serving could send these prompts; not so when tokens were cut out of them.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    chat: Chat
    is_provable: bool = True


@dataclass(frozen=True)
class _Piece:
    """The texts to tokenise for one turn.

    Attributes:
        text: the rendered turn.
        prompt: the prompt; behind `end` where the turn before is repeated word for word.
        history: the same with the answer, as a later prompt repeats it.
        end: the control token that ends what stands before, at which every text is cut anyway;
            None where this prompt must be tokenised whole.
        head: what stands before where that is no earlier turn: the beginning of the prompt, which
            many rows share and which is tokenised once for all of them.
    """

    turn: int
    text: TurnText
    prompt: str
    history: str
    end: str | None
    head: str | None = None

    @property
    def continues(self) -> bool:
        """Whether the ids of the turn before are the beginning of this one."""
        return self.end is not None and self.head is None


def draft_turns(chat: Chat, trained: Iterable[int]) -> Job[list[Draft]]:
    """Prove and tokenise the trained turns of a chat.

    Raises:
        TemplateError: training and serving would not agree.
    """
    pieces: list[_Piece] = []
    for turn in trained:
        text = prove_turn(chat, turn)
        pieces.append(_piece(turn, text, pieces[-1].text if pieces else None, chat.template))
    answers = [_answer_text(piece.text.answer, chat.template) for piece in pieces]
    prompts = [piece.prompt for piece in pieces]
    heads = [number for number, piece in enumerate(pieces) if piece.head is not None]
    continued = [number for number, piece in enumerate(pieces[1:]) if piece.continues]
    texts = [*answers, *prompts, *(pieces[number].head or "" for number in heads)]
    ids = yield [*texts, *(pieces[number].history for number in continued)]
    num_pieces = len(pieces)
    answer_ids, prompt_ids = ids[:num_pieces], ids[num_pieces : 2 * num_pieces]
    head_ids = dict(zip(heads, ids[2 * num_pieces : len(texts)], strict=True))
    history_ids = dict(zip(continued, ids[len(texts) :], strict=True))
    drafts: list[Draft] = []
    before: list[int] = []  # ids of all text up to the end of the turn before
    for number, piece in enumerate(pieces):
        _check_answer(answer_ids[number], piece, chat.template)
        start = head_ids.get(number, before)
        prompt = _joined(start, prompt_ids[number], piece)
        if number in history_ids:
            before = _joined(start, history_ids[number], piece)
        _append(drafts, chat, piece, prompt=prompt, answer=answer_ids[number])
    return drafts


def last_length(chat: Chat, turn: int, *, with_answer: bool) -> Job[int]:
    """Return the tokens of the sample that ends with `turn`, or of its prompt alone."""
    text = prove_turn(chat, turn)
    parts = [text.prompt, _answer_text(text.answer, chat.template)]
    ids = yield parts if with_answer else parts[:1]
    return sum(map(len, ids))


def cut_draft(draft: Draft, length: int) -> Draft | None:
    """Return the first `length` tokens of a sample; None when no trained token is among them."""
    spans = [
        replace(span, end=min(span.end, length), is_cut=span.end > length)
        for span in draft.spans
        if span.start < length
    ]
    if not spans:
        return None
    return Draft(draft.ids[: spans[-1].end], tuple(spans), draft.chat)


def _piece(turn: int, text: TurnText, before: TurnText | None, template: Template) -> _Piece:
    end = _ending(before.answer, template) if before is not None else None
    known = before.prompt + before.answer if before is not None else ""
    head = None
    if end is None or not text.prompt.startswith(known):
        head = known = _head(text.prompt, template)
        end = _ending(head, template)
    prompt = text.prompt if end is None else end + text.prompt[len(known) :]
    return _Piece(turn, text, prompt, prompt + text.answer, end, head or None)


def _head(prompt: str, template: Template) -> str:
    """Return the prompt up to its first cutting stop; "" where there is none to be sure of."""
    places = [(prompt.find(stop), -len(stop)) for stop in template.cutting_stops.values()]
    found = [(place, size) for place, size in places if place >= 0]
    if not found or GUARD_START in prompt:
        return ""
    place, size = min(found)
    return prompt[: place - size]


def _ending(text: str, template: Template) -> str | None:
    ends = [token for token in template.cutting_stops.values() if text.endswith(token)]
    return max(ends, key=len, default=None)


def _joined(before: Sequence[int], ids: Sequence[int], piece: _Piece) -> list[int]:
    """Return the ids of the whole text, exactly as if it were tokenised at once."""
    return list(ids) if piece.end is None else [*before, *ids[1:]]


def _append(
    drafts: list[Draft], chat: Chat, piece: _Piece, *, prompt: list[int], answer: list[int]
) -> None:
    ids = prompt + answer
    span = Span(
        len(prompt),
        len(ids),
        piece.turn,
        piece.text.enable_thinking,
        is_thought_unasked=piece.text.is_thought_unasked,
    )
    last = drafts[-1] if drafts else None
    if last is not None and prompt[: len(last.ids)] == last.ids:
        drafts[-1] = Draft(ids, (*last.spans, span), chat)
    else:
        drafts.append(Draft(ids, (span,), chat))


def _answer_text(text: str, template: Template) -> str:
    # A tokenizer that puts a space in front of every text must not get a second one.
    return text.removeprefix(" ") if template.is_space_added else text


def _check_answer(ids: Sequence[int], piece: _Piece, template: Template) -> None:
    stops = set(template.stop_ids)
    text = piece.text.answer
    is_lost = len(ids) < 2 and text not in template.stop_tokens
    if is_lost or ids[-1] not in stops or sum(map(ids.count, stops)) > 1:
        reason = "the tokens of the answer do not end in the one that serving stops on"
        raise unproved(reason, piece.turn, text, template)
