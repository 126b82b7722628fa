"""What a chat template can show and where it ends a turn, found out by rendering small chats."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtuner.data.chat_jinja import render_chat
from llmtuner.extras.errors import TemplateError


@dataclass(frozen=True)
class Abilities:
    """What a template shows to the model; the rest would be lost without a word.

    Attributes:
        system: system prompts.
        tools: tool definitions.
        tool_calls: calls of tools.
        tool_results: what the tools answered.
        thinking: thoughts, apart from the answer.
        arguments_as_text: arguments of calls must be JSON text.
        thinking_dropped: thoughts are dropped, also from the answer that has them in its text.
    """

    system: bool
    tools: bool
    tool_calls: bool
    tool_results: bool
    thinking: bool
    arguments_as_text: bool
    thinking_dropped: bool = False


@dataclass(frozen=True)
class Ends:
    """How turns end and begin.

    Attributes:
        stops: the tokens that end an answer, or a turn of tool calls.
        after_answer: what the model writes to end an answer although the template only writes it
            in front of the next turn, as GLM does; "" where answers have ends of their own.
        after_call: the same for turns of tool calls.
        openers: the control tokens that stand in front of a question.
        header: what the template writes between the prompt and an answer.
        is_header_chosen: calls have another one; so the model itself chooses it, as a recipient.
    """

    stops: tuple[str, ...]
    after_answer: str
    after_call: str
    openers: tuple[str, ...]
    header: str
    is_header_chosen: bool


_USER = {"role": "user", "content": "probe-question"}
_NEXT = {"role": "user", "content": "probe-other-question"}
_ANSWER = {"role": "assistant", "content": "probe-answer"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe-description",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "probe-key"}},
            "required": ["key"],
        },
    },
}
_RESULT = {
    "role": "tool",
    "name": "probe_tool",
    "tool_call_id": "call00000",
    "content": "probe-result",
}


@dataclass(frozen=True)
class Prober:
    """Renders probe chats with one template.

    Attributes:
        text: the template.
        variables: for the template's use.
        label: what messages call it.
    """

    text: str
    variables: Mapping[str, Any]
    label: str

    def render(
        self, *messages: Mapping[str, Any], tools: Any = None, generation_prompt: bool = False
    ) -> str:
        """Return the rendered chat."""
        return render_chat(
            self.text,
            messages,
            tools=tools,
            variables=self.variables,
            generation_prompt=generation_prompt,
        ).text

    def shows(self, needle: str, *messages: Mapping[str, Any], tools: Any = None) -> bool:
        """Say whether `needle` is in the rendered chat; a chat that is refused shows nothing."""
        try:
            return needle in self.render(*messages, tools=tools)
        except TemplateError:
            return False

    def tail(self, needle: str, *messages: Mapping[str, Any], tools: Any = None) -> str:
        """Return what stands behind `needle`.

        Raises:
            TemplateError: it is not there.
        """
        rendered = self.render(*messages, tools=tools)
        _, found, tail = rendered.rpartition(needle)
        if not found:
            raise TemplateError(
                f"{self.label} changes or drops the answer.",
                got=rendered,
                fix="choose another --template",
            )
        return tail


def probe_abilities(prober: Prober) -> Abilities:
    """Return what the template shows."""
    shows = prober.shows
    system = {"role": "system", "content": "probe-system"}
    thought = {**_ANSWER, "reasoning_content": "probe-thought"}
    inline = {**_ANSWER, "content": "<think>\nprobe-thought\n</think>\n\nprobe-answer"}
    call = _call({"key": "probe-value"})
    text_call = _call('{"key": "probe-value"}')
    has_call = shows("probe-value", _USER, call, tools=[_TOOL])
    has_text_call = not has_call and shows("probe-value", _USER, text_call, tools=[_TOOL])
    used_call = text_call if has_text_call else call
    has_thinking = shows("probe-thought", _USER, thought)
    is_dropped = shows("probe-answer", _USER, inline) and not shows("probe-thought", _USER, inline)
    return Abilities(
        system=shows("probe-system", system, _USER, _ANSWER)
        or shows("probe-system", system, _USER, _ANSWER, tools=[_TOOL]),
        tools=shows("probe-description", _USER, _ANSWER, tools=[_TOOL]),
        tool_calls=has_call or has_text_call,
        tool_results=shows("probe-result", _USER, used_call, _RESULT, _ANSWER, tools=[_TOOL]),
        thinking=has_thinking,
        arguments_as_text=has_text_call,
        thinking_dropped=is_dropped and not has_thinking,
    )


def probe_ends(
    prober: Prober, abilities: Abilities, tokens: re.Pattern[str], *, named: Sequence[str] = ()
) -> Ends:
    """Return how the template ends an answer and a turn of tool calls.

    Args:
        prober: renders the template.
        abilities: what it shows.
        tokens: finds what can end a turn.
        named: the stop tokens, where the template itself names them.

    Raises:
        TemplateError: nothing ends an answer.
    """
    # A few templates are for chats with tools only.
    tools = None if prober.shows("probe-answer", _USER, _ANSWER) else [_TOOL]
    tail = prober.tail("probe-answer", _USER, _ANSWER, tools=tools)
    longer = _between("probe-answer", prober, _USER, _ANSWER, _NEXT, tools=tools)
    asked = prober.render(_USER, tools=tools)
    if "probe-" not in asked.casefold():
        problem = f"{prober.label} drops the question."
        raise TemplateError(problem, got=asked, fix="choose another --template")
    front, _, question = asked.partition("probe-question")
    _check_start(front, longer, prober)
    openers = set(tokens.findall(front)) | set(tokens.findall(_last_token(longer, tokens)))
    header, is_chosen = _header(prober, abilities, tools)
    if named:
        stops = dict.fromkeys(named)
        return Ends(tuple(stops), "", "", tuple(openers.difference(stops)), header, is_chosen)
    stop = _stop_in(tail, longer, prober, tokens)
    after_answer = ""
    if stop is None and not tail.strip():
        has_end = tokens.search(question) is not None
        after_answer = _next_token(tail, longer, tokens, refused=openers if has_end else set())
        stop = after_answer.strip()
    eos = prober.variables.get("eos_token")
    if not stop or stop == prober.variables.get("bos_token") != eos:
        raise TemplateError(
            f"{prober.label} ends its turns in nothing: no special token follows the answer.",
            got=tail,
            fix="choose another --template, or end the answer with {{ eos_token }} in it",
        )
    call_stop, after_call = _end_of_call(prober, abilities, tokens, stop)
    stops = dict.fromkeys([stop, call_stop])
    opening = tuple(openers.difference([] if after_answer else stops))
    return Ends(tuple(stops), after_answer, after_call, opening, header, is_chosen)


def _check_start(front: str, longer: str, prober: Prober) -> None:
    bos = prober.variables.get("bos_token")
    # Where BOS begins every turn too (ChatML), the first turn may follow a BOS of the text.
    begins_turns = bos and bos in longer and bos != prober.variables.get("eos_token")
    num_fine = 2 if begins_turns else 1
    if bos and front.lstrip().startswith((num_fine + 1) * bos):
        raise TemplateError(
            f"{prober.label} writes the token that begins a text twice.",
            got=front[:100],
            fix="take one of them out of the template",
        )


def _end_of_call(
    prober: Prober, abilities: Abilities, tokens: re.Pattern[str], stop: str
) -> tuple[str, str]:
    """Return the token that ends a turn of tool calls, and what the next turn begins with if it."""
    if not abilities.tool_calls:
        return stop, ""
    call = _probe_call(abilities)
    tail = prober.tail("probe-value", _USER, call, tools=[_TOOL])
    found = tokens.findall(tail)
    if stop in found or prober.variables.get("eos_token") in found:
        return stop, ""
    if found:
        # Calls have brackets of special tokens; what ends the turn is the last one of all.
        return found[-1], ""
    after = ""
    if abilities.tool_results:
        longer = _between("probe-value", prober, _USER, call, _RESULT, tools=[_TOOL])
        after = _next_token(tail, longer, tokens, refused=set())
    return after.strip() or stop, after


def _stop_in(tail: str, longer: str, prober: Prober, tokens: re.Pattern[str]) -> str | None:
    """Return the token that ends an answer, whether or not another turn follows."""
    eos = prober.variables.get("eos_token")
    pairs = zip(tail, longer, strict=False)
    num_same = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    both = tokens.findall(tail[: min(len(tail), len(longer)) if num_same is None else num_same])
    if both:
        return eos if eos in both else both[-1]
    found = tokens.findall(tail)
    if not found:
        return None
    return eos if eos in found else found[0]


def _next_token(tail: str, longer: str, tokens: re.Pattern[str], *, refused: set[str]) -> str:
    """Return what a following turn adds behind a turn that has no end, up to its first token."""
    match = tokens.match(longer[len(tail) :].lstrip()) if longer.startswith(tail) else None
    if match is None or match[0] in refused:
        return ""
    added = longer[len(tail) :]
    return added[: added.find(match[0]) + len(match[0])]


def _last_token(text: str, tokens: re.Pattern[str]) -> str:
    """Return the last token of a text and what follows, "" without any."""
    found = list(tokens.finditer(text))
    return text[found[-1].start() :] if found else ""


def _between(needle: str, prober: Prober, *messages: Mapping[str, Any], tools: Any) -> str:
    """Return what stands between `needle` and the content of the last message."""
    try:
        tail = prober.tail(needle, *messages, tools=tools)
    except TemplateError:
        return ""
    return tail.partition(str(messages[-1]["content"]))[0]


def _header(prober: Prober, abilities: Abilities, tools: Any) -> tuple[str, bool]:
    """Return what stands between prompt and answer, and whether calls have something else there."""
    prompt = prober.render(_USER, tools=tools, generation_prompt=True)
    full = prober.render(_USER, _ANSWER, tools=tools)
    if not full.startswith(prompt):
        return "", False
    header = full[len(prompt) :].partition("probe-answer")[0]
    if not abilities.tool_calls:
        return header, False
    prompt = prober.render(_USER, tools=[_TOOL], generation_prompt=True)
    full = prober.render(_USER, _probe_call(abilities), tools=[_TOOL])
    is_chosen = full.startswith(prompt) and not full[len(prompt) :].startswith(header.rstrip())
    return header, is_chosen


def _probe_call(abilities: Abilities) -> dict[str, Any]:
    arguments = {"key": "probe-value"}
    return _call(json.dumps(arguments) if abilities.arguments_as_text else arguments)


def _call(arguments: object) -> dict[str, Any]:
    function = {"name": "probe_tool", "arguments": arguments}
    calls = [{"id": "call00000", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}
