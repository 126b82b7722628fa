"""Trained spans: where each answer begins and ends, and the proof that serving agrees."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtuner.data.chat_jinja import Rendered
from llmtuner.data.conversation import Message
from llmtuner.data.prompt import (
    GUARD_START,
    encode,
    guard,
    render_messages,
    split_thinking,
    unguarded,
)
from llmtuner.data.template import Template
from llmtuner.extras.errors import TemplateError


@dataclass(frozen=True)
class Turn:
    """The ids of one trained turn: the prompt that serving sends, and what the model answers."""

    number: int
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Draft:
    """A sample in the making.

    Attributes:
        ids: token ids.
        spans: [start, end) of each trained span.
        turns: numbers of the trained messages, one for each span.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    turns: list[int]


@dataclass(frozen=True)
class TurnText:
    """The rendered text of one trained turn, still with guards."""

    prompt: str
    answer: str


def encode_turn(
    messages: Sequence[Message],
    turn: int,
    *,
    tools: str | None,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> Turn:
    """Return the ids of the trained message number `turn`.

    Raises:
        TemplateError: training and serving would not agree.
    """
    text = prove_turn(messages, turn, tools=tools, template=template)
    answer = text.answer
    if template.is_space_added:
        # The tokenizer puts a space in front of a text by itself; the text must not bring a second.
        answer = answer.removeprefix(" ")
    ids = encode(answer, tokenizer)
    if (
        not ids
        or ids[-1] not in template.stop_ids
        or not set(template.stop_ids).isdisjoint(ids[:-1])
    ):
        reason = "the answer does not end in the one token that serving stops on"
        raise _unproved(reason, turn, text.answer, template)
    return Turn(turn, encode(text.prompt, tokenizer), ids)


def prove_turn(
    messages: Sequence[Message], turn: int, *, tools: str | None, template: Template
) -> TurnText:
    """Return prompt and answer of a turn under the setting that serving would use for it.

    Raises:
        TemplateError: under no setting does the rendered answer follow the rendered prompt.
    """
    message = split_thinking(messages[turn], template)
    proved: list[TurnText] = []
    problems: list[TemplateError] = []
    for setting in _settings(template, has_thinking=message.thinking is not None):
        try:
            text = _turn_text(messages, turn, tools, template, setting)
            _check_content(text, message, turn, template)
        except TemplateError as problem:
            problems.append(problem)
            continue
        if _is_own_text(text.answer, message, template):
            return text
        proved.append(text)
    if not proved:
        raise problems[0]
    return proved[0]


def join_turns(turns: Iterable[Turn]) -> list[Draft]:
    """Chain turns into one sample as long as each prompt continues the sample so far.

    A template that rewrites history, or history that is tokenised differently inside the later
    prompt, begins a new sample.
    """
    drafts: list[Draft] = []
    for turn in turns:
        last = drafts[-1] if drafts else None
        if last is not None and turn.prompt[: len(last.ids)] == last.ids:
            start = len(turn.prompt)
            drafts[-1] = Draft(
                turn.prompt + turn.answer,
                [*last.spans, (start, start + len(turn.answer))],
                [*last.turns, turn.number],
            )
        else:
            start = len(turn.prompt)
            ids = turn.prompt + turn.answer
            drafts.append(Draft(ids, [(start, len(ids))], [turn.number]))
    return drafts


def _settings(template: Template, *, has_thinking: bool) -> list[bool | None]:
    """Return the values of enable_thinking to try, the user's own first."""
    if not template.thinking_switches:
        return [template.enable_thinking]
    values = [template.enable_thinking, has_thinking, None, not has_thinking]
    return list(dict.fromkeys(values))


def _turn_text(
    messages: Sequence[Message],
    turn: int,
    tools: str | None,
    template: Template,
    setting: bool | None,
) -> TurnText:
    def rendered(until: int, *, generation_prompt: bool) -> Rendered:
        return render_messages(
            messages[:until],
            template=template,
            tools=tools,
            enable_thinking=setting,
            generation_prompt=generation_prompt,
        )

    prompt = rendered(turn, generation_prompt=True).text
    full = rendered(turn + 1, generation_prompt=False)
    if not full.text.startswith(prompt):
        reason = "the conversation does not begin with the prompt that serving sends"
        raise _unproved(reason, turn, full.text[-200:], template)
    if template.has_marks:
        end = _end_by_marks(full, len(prompt), turn, template)
    else:
        own = split_thinking(messages[turn], template).content
        end = _end_by_stop(
            full.text, len(prompt), guard(own, "assistant", template), turn, template
        )
    return TurnText(prompt, full.text[len(prompt) : end])


def _end_by_marks(full: Rendered, start: int, turn: int, template: Template) -> int:
    """Return where the generation mark of this turn ends; its last token must be a stop token."""
    ends = [end for _, end in full.marks if end > start]
    if not ends:
        raise _unproved("no generation mark holds the answer", turn, full.text[start:], template)
    # White space after the end token is the template's, not the model's.
    end = start + len(full.text[start : ends[-1]].rstrip())
    if not full.text.endswith(template.stop_tokens, start, end):
        problem = _unproved(
            "the generation mark closes before the token that ends the turn",
            turn,
            full.text[start:],
            template,
        )
        problem.fix = (
            "put the end token before {% endgeneration %}, or take the marks out: "
            "then llmtuner finds the answers by itself"
        )
        raise problem
    return end


def _end_by_stop(text: str, start: int, content: str, turn: int, template: Template) -> int:
    """Return where the first stop token after the answer's content ends."""
    own = content.strip()
    found = text.rfind(own, start) if own else start
    after = found + len(own) if found >= 0 else start
    stops = "|".join(map(re.escape, template.stop_tokens))
    match = re.compile(f"(?<!{GUARD_START})(?:{stops})").search(text, after)
    if match is None:
        raise _unproved("no stop token follows the answer", turn, text[start:], template)
    return match.end()


def _check_content(text: TurnText, message: Message, turn: int, template: Template) -> None:
    """Prove that all the row says in this turn is in the trained span."""
    own = [message.content, message.thinking or "", *(call.name for call in message.tool_calls)]
    for part in own:
        if guard(part, "assistant", template).strip() not in text.answer:
            raise _unproved("the template changes the answer", turn, part, template)


def _is_own_text(answer: str, message: Message, template: Template) -> bool:
    """Say whether nothing but the row's own words would be learned in front of the answer."""
    own = guard(message.thinking or message.content, "assistant", template).strip()
    if not own:
        return "<think>" not in answer
    before = answer[: answer.find(own)].strip()
    return before == "" or (message.thinking is not None and before == "<think>")


def _unproved(reason: str, turn: int, got: str, template: Template) -> TemplateError:
    return TemplateError(
        f"{template.label} does not train what is served: {reason} (message {turn}).",
        got=unguarded(got),
        fix="choose another --template",
    )
