"""The prompt that a model sees: one function for training and for serving.

Text of users, tools, system prompts and answers never becomes a control token: the guarded tokens
in it are encoded as ordinary text. Whoever serves the model with another program gets the same ids
from `tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from llmtuner.data.chat_jinja import Rendered, render_chat
from llmtuner.data.conversation import Message, ToolCall
from llmtuner.data.template import Template
from llmtuner.extras.errors import DataError, TemplateError

GUARD_START, GUARD_END = "\U000f0000", "\U000f0001"  # what mark_control_tokens writes
_GUARDS = str.maketrans("", "", GUARD_START + GUARD_END)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Chat:
    """A conversation in the form that templates take it.

    Attributes:
        messages: the turns, with thinking where the template wants it.
        wire: the same as `apply_chat_template` takes them, with guards.
        tools: tool definitions, with guards; None without tools.
        template: from `load_template`.
        answers: turns that look different while the model writes them: serving guards in its
            history what the model wrote as a control token.
    """

    messages: tuple[Message, ...]
    wire: tuple[Mapping[str, Any], ...]
    tools: list[Any] | None
    template: Template
    answers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def render(
        self, num_messages: int, *, enable_thinking: bool | None, generation_prompt: bool
    ) -> Rendered:
        """Render the first `num_messages` turns; the last is an answer or is to be answered."""
        wire = list(self.wire[:num_messages])
        if not generation_prompt and num_messages - 1 in self.answers:
            wire[-1] = self.answers[num_messages - 1]
        return render_chat(
            self.template.text,
            wire,
            tools=self.tools,
            variables=self.template.variables(enable_thinking),
            generation_prompt=generation_prompt,
        )

    def with_thought(self, turn: int, thought: str) -> "Chat":
        """Return the same chat with another thought of one answer."""
        messages, wire = list(self.messages), list(self.wire)
        messages[turn] = replace(messages[turn], thinking=thought)
        wire[turn] = {**wire[turn], "reasoning_content": thought}
        answers = dict(self.answers)
        if turn in answers:
            answers[turn] = {**answers[turn], "reasoning_content": thought}
        return replace(self, messages=tuple(messages), wire=tuple(wire), answers=answers)

    def without_thoughts(self, before: int) -> "Chat":
        """Return the same chat without the thoughts of the answers before a turn."""
        messages, wire = list(self.messages), list(self.wire)
        for number in range(before):
            message = messages[number]
            if message.role == "assistant":
                found = _THOUGHT.match(message.content)
                content = message.content[found.end() :] if found else message.content
                messages[number] = replace(message, thinking=None, content=content)
                texts = _texts(messages[number], self.template.guards)
                kept = {k: v for k, v in wire[number].items() if k != "reasoning_content"}
                wire[number] = {**kept, **texts}
        return replace(self, messages=tuple(messages), wire=tuple(wire))


def prompt_ids(
    messages: Sequence[Message],
    *,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    tools: str | None = None,
    enable_thinking: bool | None = None,
) -> list[int]:
    """Return the ids after which the model writes its answer.

    Args:
        messages: the conversation so far; it does not end with an answer.
        template: from `load_template`.
        tokenizer: the one the template was loaded for.
        tools: JSON text of the list of tool definitions.
        enable_thinking: another choice than the template's own for this one answer.
    """
    chat = prepare_chat(messages, template=template, tools=tools)
    setting = template.enable_thinking if enable_thinking is None else enable_thinking
    rendered = chat.render(len(messages), enable_thinking=setting, generation_prompt=True)
    return encode(rendered.text, tokenizer)


def prepare_chat(messages: Sequence[Message], *, template: Template, tools: str | None) -> Chat:
    """Bring a conversation into the form that the template takes.

    Raises:
        TemplateError: the template would drop a part of it without a word.
        DataError: tools or arguments are not JSON.
    """
    _check_abilities(messages, template=template, tools=tools)
    shown = tuple(split_thinking(m, template) if m.role == "assistant" else m for m in messages)
    definitions = _guard_all(parse_tools(tools), template) if tools else None
    wire = tuple(_to_wire(shown, template))
    answers = {}
    for number, message in enumerate(shown):
        if message.role == "assistant":
            entry = {**wire[number], **_texts(message, template.answer_guards)}
            if entry != wire[number]:
                answers[number] = entry
    return Chat(shown, wire, definitions or None, template, answers)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of rendered text; guarded tokens become ordinary text."""
    if GUARD_START in text or GUARD_END in text:
        guarded: list[int] = encode_marked_chat(tokenizer, text)
        return guarded
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def unguarded(text: str) -> str:
    """Return rendered text as people read it."""
    return text.translate(_GUARDS)


@lru_cache(maxsize=32)  # a proof asks for the same few texts again and again
def guard(text: str, guards: re.Pattern[str]) -> str:
    """Return `text` with guards around the control tokens in it."""
    if guards.search(text) is None and GUARD_START not in text and GUARD_END not in text:
        return text  # what marking would give, for less
    guarded: str = mark_control_tokens(text, guards)
    return guarded


def split_thinking(message: Message, template: Template) -> Message:
    """Return the answer in the form that the template shows best.

    Templates that know thinking get it apart from the answer, also where the data has both in one
    text; for the others it is put in front of the answer. Where the template drops every thought,
    `prove_turn` puts it behind the prompt. An empty thought is no thought.
    """
    thinking, content = message.thinking, message.content
    is_apart = template.abilities.thinking or template.abilities.thinking_dropped
    found = _THOUGHT.match(content) if thinking is None and is_apart else None
    if found is not None:
        thinking, content = found[1].strip("\n"), content[found.end() :]
    if thinking is not None and not thinking.strip():
        thinking = None
    if thinking is not None and not is_apart:
        thinking, content = None, f"<think>\n{thinking}\n</think>\n\n{content}"
    if content is message.content and thinking is message.thinking:
        return message
    return replace(message, content=content, thinking=thinking)


def parse_tools(tools: str) -> list[Any]:
    """Return the tool definitions in the form that templates expect."""
    parsed = _parse_json(tools)
    definitions = parsed if isinstance(parsed, list) else [parsed]
    return [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "function" not in tool
        else tool
        for tool in definitions
    ]


def _check_abilities(messages: Sequence[Message], *, template: Template, tools: str | None) -> None:
    """Refuse a conversation of which the template would drop a part without a word."""
    can = template.abilities
    lost = None
    if not can.system and any(message.role == "system" for message in messages):
        lost = "system prompts"
    elif not can.tools and tools:
        lost = "tool definitions"
    elif not can.tool_calls and any(message.tool_calls for message in messages):
        lost = "tool calls"
    elif not can.tool_results and any(message.role == "tool" for message in messages):
        lost = "tool results"
    if lost is not None:
        raise TemplateError(
            f"{template.label} cannot show {lost}.",
            fix="choose a template that can, for example qwen or llama3, or leave them out",
        )


def _to_wire(messages: Sequence[Message], template: Template) -> list[dict[str, Any]]:
    """Return messages as `apply_chat_template` takes them; results know the calls they answer."""
    wire: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    num_calls = 0
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, **_texts(message, template.guards)}
        if message.tool_calls:
            # Some templates insist on ids of nine letters and digits.
            ids = [f"call{num_calls + number:05d}" for number in range(len(message.tool_calls))]
            num_calls += len(ids)
            entry["tool_calls"] = [
                _call_to_wire(call, call_id, template)
                for call, call_id in zip(message.tool_calls, ids, strict=True)
            ]
            waiting = list(entry["tool_calls"])
        if message.role == "tool" and waiting:
            call = waiting.pop(0)
            entry |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        wire.append(entry)
    return wire


def _texts(message: Message, guards: re.Pattern[str]) -> dict[str, str]:
    texts = {"content": guard(message.content, guards)}
    if message.thinking is not None:
        texts["reasoning_content"] = guard(message.thinking, guards)
    return texts


def _call_to_wire(call: ToolCall, call_id: str, template: Template) -> dict[str, Any]:
    arguments = _parse_json(call.arguments)
    if not isinstance(arguments, dict):
        raise DataError("The arguments of a tool call are not a JSON object.", got=call.arguments)
    given = _guard_all(
        call.arguments if template.abilities.arguments_as_text else arguments, template
    )
    function = {"name": guard(call.name, template.guards), "arguments": given}
    return {"id": call_id, "type": "function", "function": function}


def _guard_all(value: Any, template: Template) -> Any:
    return mark_control_tokens(value, template.guards)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as problem:
        raise DataError("Tools and arguments must be JSON.", got=text) from problem
