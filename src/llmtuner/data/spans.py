"""Trained spans: where each answer begins and ends, and the proof that serving agrees."""

import re
from dataclasses import dataclass

from llmtuner.data.chat_jinja import Rendered
from llmtuner.data.conversation import Message
from llmtuner.data.prompt import GUARD_START, Chat, guard, unguarded
from llmtuner.data.template import Template
from llmtuner.extras.errors import TemplateError


@dataclass(frozen=True)
class TurnText:
    """The rendered text of one trained turn, still with guards around control tokens in it.

    Attributes:
        prompt: what serving sends.
        answer: what the model writes, with the token that ends it.
        enable_thinking: the setting under which serving sends this prompt.
    """

    prompt: str
    answer: str
    enable_thinking: bool | None


def prove_turn(chat: Chat, turn: int) -> TurnText:
    """Return prompt and answer of a turn under the setting that serving would use for it.

    Raises:
        TemplateError: under no setting does the rendered answer follow the rendered prompt.
    """
    message = chat.messages[turn]
    proved: list[TurnText] = []
    problems: list[TemplateError] = []
    for setting in _settings(chat.template, has_thinking=message.thinking is not None):
        try:
            text = _turn_text(chat, turn, setting)
            _check_content(text, turn, chat)
            _check_header(text, turn, chat, setting)
        except TemplateError as problem:
            problems.append(problem)
            continue
        if _is_own_text(text.answer, message, chat.template):
            return text
        proved.append(text)
    if not proved:
        raise problems[0]
    return proved[0]


def _settings(template: Template, *, has_thinking: bool) -> list[bool | None]:
    """Return the values of enable_thinking to try, the user's own first."""
    if not template.thinking_switches:
        return [template.enable_thinking]
    return list(dict.fromkeys([template.enable_thinking, has_thinking, None, not has_thinking]))


def _turn_text(chat: Chat, turn: int, setting: bool | None) -> TurnText:
    prompt = chat.render(turn, enable_thinking=setting, generation_prompt=True).text
    full = chat.render(turn + 1, enable_thinking=setting, generation_prompt=False)
    if not full.text.startswith(prompt):
        reason = "the conversation does not begin with the prompt that serving sends"
        raise unproved(reason, turn, full.text[-200:], chat.template)
    if chat.template.has_marks:
        end = _end_by_marks(full, len(prompt), turn, chat.template)
    else:
        end = _end_by_stop(full.text, len(prompt), turn, chat)
    return TurnText(prompt, full.text[len(prompt) : end], setting)


def _end_by_marks(full: Rendered, start: int, turn: int, template: Template) -> int:
    """Return where the generation mark of this turn ends; its last token must be a stop token."""
    marks = [mark for mark in full.marks if mark[1] > start]
    if not marks or full.text[start : marks[0][0]].replace("<think>", "").strip():
        reason = "the generation mark does not begin where the prompt ends"
        raise unproved(reason, turn, full.text[start:], template)
    # White space after the end token is the template's, not the model's.
    end = start + len(full.text[start : marks[-1][1]].rstrip())
    if not full.text.endswith(template.stop_tokens, start, end):
        raise unproved(
            "the generation mark closes before the token that ends the turn",
            turn,
            full.text[start:],
            template,
            fix="put the end token before {% endgeneration %}, or take the marks out: "
            "then llmtuner finds the answers by itself",
        )
    return end


def _end_by_stop(text: str, start: int, turn: int, chat: Chat) -> int:
    """Return where the first stop token after the answer's content ends."""
    template = chat.template
    own = guard(chat.messages[turn].content, "assistant", template).strip()
    found = text.rfind(own, start) if own else start
    after = found + len(own) if found >= 0 else start
    stops = "|".join(map(re.escape, template.stop_tokens))
    match = re.compile(f"(?<!{GUARD_START})(?:{stops})").search(text, after)
    if match is None:
        raise unproved("no stop token follows the answer", turn, text[start:], template)
    return match.end()


def _check_content(text: TurnText, turn: int, chat: Chat) -> None:
    """Prove that all that the row says in this turn is in the trained span."""
    message = chat.messages[turn]
    own = [message.content, message.thinking or "", *(call.name for call in message.tool_calls)]
    for part in own:
        if guard(part, "assistant", chat.template).strip() not in text.answer:
            raise unproved("the template changes the answer", turn, part, chat.template)


def _check_header(text: TurnText, turn: int, chat: Chat, setting: bool | None) -> None:
    """Prove that the header of an answer is in the prompt, where the template has one."""
    template = chat.template
    before = _before_own_text(text.answer, chat.messages[turn], template)
    # Some models write headers of their own (channels, recipients), with tokens of their own.
    if not any(token in before and token in text.prompt for token in template.guarded_tokens):
        return
    bare = chat.render(turn, enable_thinking=setting, generation_prompt=False).text
    if bare == text.prompt:
        reason = "the generation prompt lacks the header of the answer"
        raise unproved(reason, turn, text.answer, template)


def _is_own_text(answer: str, message: Message, template: Template) -> bool:
    """Say whether nothing but the row's own words would be learned in front of the answer."""
    if not (message.thinking or message.content.strip()):
        return "<think>" not in answer
    before = _before_own_text(answer, message, template).strip()
    return before == "" or (message.thinking is not None and before == "<think>")


def _before_own_text(answer: str, message: Message, template: Template) -> str:
    """Return what stands in the answer before the first word of the row."""
    own = guard(message.thinking or message.content, "assistant", template).strip()
    if own:
        return answer[: answer.find(own)]
    names = [guard(call.name, "assistant", template) for call in message.tool_calls]
    return answer.partition(names[0])[0] if names else ""


def unproved(
    reason: str, turn: int, got: str, template: Template, fix: str = "choose another --template"
) -> TemplateError:
    """Return the error for a turn of which training and serving would not agree."""
    return TemplateError(
        f"{template.label} does not train what is served: {reason} (message {turn}).",
        got=unguarded(got),
        fix=fix,
    )
