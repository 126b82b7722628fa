"""Trained spans: where each answer begins and ends, and the proof that serving agrees.

The prompt is what the template writes for the turns before, and the answer is what the template
adds behind it when the answer is there. A few templates take back what their prompt began (a
thought), or drop earlier thoughts as soon as there is an answer; how such an answer is found
without guessing is said at each function below. What cannot be proved is refused.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from llmtuner.data.chat_jinja import Rendered
from llmtuner.data.conversation import Message
from llmtuner.data.prompt import GUARD_START, Chat, guard, unguarded
from llmtuner.data.template import Template, any_of
from llmtuner.extras.errors import TemplateError

_NO_THOUGHT = "\U000f0002"  # stands for a thought that is not there; rows cannot hold it
_OPENED = re.compile(r"<think>(\s*)(</think>\s*)?\Z")
_BEGUN = re.compile(r"\s*<think>\s*")
_NO_THOUGHT_SHOWN = re.compile(r"\A(<think>\s*)?</think>")
_CHANNEL = re.compile(r"\s*|\S+\n")  # a word right behind a token, as Gemma 4 names its channels
_RECIPIENT = re.compile(r"\S+\n")  # a line of its own, as functionary writes
_TAG = re.compile(r"</?[^\s<>]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class TurnText:
    """The rendered text of one trained turn, still with guards around control tokens in it.

    Attributes:
        prompt: what serving sends.
        answer: what the model writes, with the token that ends it.
        enable_thinking: the setting under which serving sends this prompt.
        is_thought_unasked: serving thinks otherwise than this answer does: it sends this prompt
            only under another setting than the user's, or the answer begins by ending a thought.
    """

    prompt: str
    answer: str
    enable_thinking: bool | None
    is_thought_unasked: bool = False


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
            own = _own_words(message, text.prompt, chat.template)
            _check_content(text, own, turn, chat)
            _check_around(text, own, turn, chat)
            before = _before_own_text(text, own, message, chat.template).strip()
            _check_header(text, before, turn, chat)
        except TemplateError as problem:
            problems.append(problem)
            continue
        if _is_own_text(text, before, message):
            return _with_notice(text, message, chat.template)
        proved.append(text)
    if not proved:
        raise problems[0]
    return _with_notice(proved[0], message, chat.template)


def _with_notice(text: TurnText, message: Message, template: Template) -> TurnText:
    """Say whether serving thinks otherwise than the answer, where the user has said how."""
    asked = template.enable_thinking
    is_other = bool(template.thinking_switches) and text.enable_thinking != asked
    ends_thought = message.thinking is None and text.answer.lstrip().startswith("</think>")
    if asked is None or not (is_other or ends_thought):
        return text
    return replace(text, is_thought_unasked=True)


def _settings(template: Template, *, has_thinking: bool) -> list[bool | None]:
    """Return the values of enable_thinking to try, the user's own first."""
    if not template.thinking_switches:
        return [template.enable_thinking]
    return list(dict.fromkeys([template.enable_thinking, has_thinking, None, not has_thinking]))


# --- where an answer begins -----------------------------------------------------------------------


def _turn_text(chat: Chat, turn: int, setting: bool | None) -> TurnText:
    prompt = chat.render(turn, enable_thinking=setting, generation_prompt=True).text
    full = chat.render(turn + 1, enable_thinking=setting, generation_prompt=False)
    message, abilities = chat.messages[turn], chat.template.abilities
    is_lost = abilities.thinking_dropped and message.thinking is not None
    if full.text.startswith(prompt) and not is_lost:
        answer: str | None = _answer(full, len(prompt), turn, chat)
    else:
        answer = (
            _answer_after_no_thought(prompt, chat, turn, setting)
            or _answer_after_opened_thought(prompt, full, turn, chat)
            or _answer_after_dropped_thoughts(full, chat, turn, setting)
        )
    if answer is None:
        reason = "the conversation does not begin with the prompt that serving sends"
        raise unproved(reason, turn, full.text[-200:], chat.template)
    return TurnText(prompt, answer, setting)


def _own_words(message: Message, prompt: str, template: Template) -> list[str]:
    """Return what the model is to say, guarded, without the tag that the prompt has already."""
    content = message.content
    opened = _OPENED.search(prompt)
    if opened and not opened[2] and (begun := _BEGUN.match(content)):
        content = content[begun.end() :]
    parts = [part for part in (message.thinking, content) if part and not part.isspace()]
    return [guard(part, template.answer_guards).strip() for part in parts]


def _answer_after_no_thought(
    prompt: str, chat: Chat, turn: int, setting: bool | None
) -> str | None:
    """Return the answer of a row without a thought where the prompt begins one.

    The template says how thoughts end: it renders the answer with a thought, which is taken out.
    """
    if not chat.template.abilities.thinking or chat.messages[turn].thinking is not None:
        return None
    thinking = chat.with_thought(turn, _NO_THOUGHT)
    full = thinking.render(turn + 1, enable_thinking=setting, generation_prompt=False)
    if not full.text.startswith(prompt):
        return None
    front, thought, rest = _answer(full, len(prompt), turn, chat).partition(_NO_THOUGHT)
    is_thought_first = thought and not front.strip() and _NO_THOUGHT not in rest
    return front + rest if is_thought_first else None


def _answer_after_opened_thought(prompt: str, full: Rendered, turn: int, chat: Chat) -> str | None:
    """Return the answer where the template begins a thought in its prompt and shows none later.

    DeepSeek-R1 and QwQ do: what the model writes is the thought, `</think>` and what the template
    shows behind the header. The line feeds are those of these models.
    """
    opened = _OPENED.search(prompt)
    message, abilities = chat.messages[turn], chat.template.abilities
    is_lost = abilities.thinking_dropped or not (message.thinking or _BEGUN.match(message.content))
    if opened is None or not is_lost or not full.text.startswith(prompt[: opened.start()]):
        return None
    shown = _answer(full, opened.start(), turn, chat)
    thinking = message.thinking
    if opened[2]:
        return shown if thinking is None else None
    line = "\n" if "\n" in opened[1] else ""
    thought = guard(thinking.strip("\n"), chat.template.answer_guards) if thinking else ""
    return f"{thought}{line}</think>{2 * line}{_NO_THOUGHT_SHOWN.sub('', shown)}"


def _answer_after_dropped_thoughts(
    full: Rendered, chat: Chat, turn: int, setting: bool | None
) -> str | None:
    """Return the answer where the template drops earlier thoughts once the answer is there.

    gpt-oss does: calls of tools keep their thoughts until the final answer. The same chat without
    these thoughts is rendered: it must look the same with the answer, and follow its own prompt.
    """
    bare = chat.without_thoughts(turn)
    if bare.messages == chat.messages:
        return None
    prompt = bare.render(turn, enable_thinking=setting, generation_prompt=True).text
    same = bare.render(turn + 1, enable_thinking=setting, generation_prompt=False)
    if unguarded(same.text) != unguarded(full.text) or not same.text.startswith(prompt):
        return None
    return _answer(same, len(prompt), turn, chat)


# --- where it ends --------------------------------------------------------------------------------


def _answer(full: Rendered, start: int, turn: int, chat: Chat) -> str:
    """Return the answer that begins at `start`, with the token that ends it."""
    ends = chat.template.ends
    closing = ends.after_call if chat.messages[turn].tool_calls else ends.after_answer
    if chat.template.has_marks:
        _check_mark(full, start, turn, chat.template)
        text = full.text[start : full.marks[-1][1]]
    else:
        text = full.text[start:]
    end = _end_of_answer(text, turn, chat)
    if end is not None:
        return text[:end]
    if closing and not full.text[start + len(text) :].strip():
        return text + closing
    if chat.template.has_marks:
        raise unproved(
            "the generation mark closes before the token that ends the turn",
            turn,
            full.text[start:],
            chat.template,
            fix="put the end token before {% endgeneration %}, or take the marks out: "
            "then llmtuner finds the answers by itself",
        )
    raise unproved("no stop token follows the answer", turn, text, chat.template)


def _check_mark(full: Rendered, start: int, turn: int, template: Template) -> None:
    marks = [mark for mark in full.marks if mark[1] > start]
    if not marks or full.text[start : marks[0][0]].replace("<think>", "").strip():
        reason = "the generation mark does not begin where the prompt ends"
        raise unproved(reason, turn, full.text[start:], template)


def _end_of_answer(text: str, turn: int, chat: Chat) -> int | None:
    """Return where the first stop token after the answer's own words ends."""
    message, template = chat.messages[turn], chat.template
    after = 0
    for part in (message.content, *(call.name for call in message.tool_calls)):
        words = guard(part, template.answer_guards).strip()
        found = text.rfind(words) if words else -1
        after = max(after, found + len(words)) if found >= 0 else after
    match = _unguarded_stops(template.stop_tokens).search(text, after)
    return match.end() if match else None


@lru_cache(maxsize=8)
def _unguarded_stops(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"(?<!{GUARD_START})(?:{any_of(tokens).pattern})")


# --- what is in it --------------------------------------------------------------------------------


def _check_content(text: TurnText, own: Sequence[str], turn: int, chat: Chat) -> None:
    """Prove that all that the row says in this turn is in the trained span."""
    message, template = chat.messages[turn], chat.template
    for part in own:
        if part not in text.answer:
            raise unproved("the template changes the answer", turn, part, template)
    for call in message.tool_calls:
        for part in (call.name, *_texts_in(json.loads(call.arguments))):
            spellings = _spellings(part)
            if not any(guard(one, template.guards).strip() in text.answer for one in spellings):
                raise unproved("the template changes a tool call", turn, part, template)


def _texts_in(value: Any) -> Iterator[Any]:
    """Yield the keys and values of JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)
    else:
        yield value


def _spellings(value: Any) -> list[str]:
    """Return how templates write a key or value: as it is, as JSON, or as JSON in JSON."""
    spellings = [value] if isinstance(value, str) else [str(value)]
    for is_ascii in (False, True):
        once = json.dumps(value, ensure_ascii=is_ascii)
        twice = json.dumps(once, ensure_ascii=is_ascii)[1:-1]
        if isinstance(value, str):
            once, twice = once[1:-1], twice[2:-2]
        spellings += [once, twice]
    return spellings


def _check_around(text: TurnText, own: Sequence[str], turn: int, chat: Chat) -> None:
    """Prove that the template adds only control tokens and tags to the words of an answer.

    Words may stand between control tokens (channels), or be a header that the model chooses.
    """
    message, template = chat.messages[turn], chat.template
    rest = text.answer
    for number, part in enumerate(own):
        before, _, rest = rest.partition(part)
        tokens = [(found.start(), found.end()) for found in _tokens_in(before, template)]
        is_open = bool(tokens) and not before[: tokens[0][0]].strip()
        behind = before[tokens[-1][1] :] if tokens else before
        is_closed = bool(tokens) and _CHANNEL.fullmatch(behind) is not None
        is_header = number == 0 and template.ends.is_header_chosen
        is_header = is_header and (is_closed or _RECIPIENT.fullmatch(before) is not None)
        if before.strip() and not (is_open and is_closed) and not is_header:
            raise _added(before, turn, template)
    if own and not message.tool_calls:
        first = next(_tokens_in(rest, template), None)
        if first is None or rest[: first.start()].strip():
            raise _added(rest, turn, template)


def _tokens_in(text: str, template: Template) -> Iterator[re.Match[str]]:
    """Yield the control tokens and tags of a text."""
    return _tokens_or_tags(template.guards.pattern).finditer(text)


@lru_cache(maxsize=8)
def _tokens_or_tags(tokens: str) -> re.Pattern[str]:
    return re.compile(f"{tokens}|{_TAG.pattern}")


def _added(added: str, turn: int, template: Template) -> TemplateError:
    reason = "the template adds words of its own to the answer"
    return unproved(reason, turn, added, template)


def _check_header(text: TurnText, before: str, turn: int, chat: Chat) -> None:
    """Prove that the header of an answer is in the prompt, where the template has one.

    Some models write headers of their own (channels, recipients, calls). These are known by one of
    three things: the generation prompt adds a header before; or what opens a turn is not in them,
    and the prompt opens the model's turn by itself, or plain answers have nothing in front.
    """
    template = chat.template
    if not before or before in ("<think>", "</think>"):
        return
    setting = text.enable_thinking
    bare = chat.render(turn, enable_thinking=setting, generation_prompt=False).text
    asked = guard(chat.messages[turn - 1].content, template.guards).strip()
    if text.prompt.count(asked) < bare.count(asked):
        raise unproved("the prompt lacks the question", turn, text.answer, template)
    if bare.rstrip() != text.prompt.rstrip():
        return
    openers = template.ends.openers
    if not before.startswith(openers):
        tail = text.prompt.rpartition(asked)[2]
        if not template.ends.header.strip() or any(token in tail for token in openers):
            return
    reason = "the generation prompt lacks the header of the answer"
    raise unproved(reason, turn, text.answer, template)


def _is_own_text(text: TurnText, before: str, message: Message) -> bool:
    """Say whether nothing but the row's own words would be learned in front of the answer."""
    if not (message.thinking or message.content.strip()):
        return "<think>" not in text.answer and "</think>" not in text.answer
    return before == "" or (message.thinking is not None and before == "<think>")


def _before_own_text(
    text: TurnText, own: Sequence[str], message: Message, template: Template
) -> str:
    """Return what stands in the answer before the first word of the row."""
    if own:
        return text.answer.partition(own[0])[0]
    names = [guard(call.name, template.guards) for call in message.tool_calls]
    return text.answer.partition(names[0])[0] if names else ""


def unproved(
    reason: str, turn: int, got: str, template: Template, fix: str = "choose another --template"
) -> TemplateError:
    """Return the error for a turn of which training and serving would not agree."""
    return TemplateError(
        f"{template.label} does not train what is served: {reason} (message {turn}).",
        got=unguarded(got),
        fix=fix,
    )
