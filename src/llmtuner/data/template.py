"""Chat templates: loading, what a template can do, where it ends a turn.

Everything that a template says about itself is found out by rendering small probe conversations, so
that our own templates, a user's file and the tokenizer's own template are all treated alike.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtuner.data.chat_jinja import has_marks, render_chat, variables_of, without_marks
from llmtuner.data.templates import read_template, template_names
from llmtuner.extras.errors import TemplateError

_HEADER = re.compile(r"\{#-?\s*(control|stop):(.*?)-?#\}", re.DOTALL)
_THINKING_SWITCHES = frozenset({"enable_thinking", "open_thinking", "thinking"})
_THINKING_TAGS = frozenset({"<think>", "</think>"})  # a few tokenizers call them special


@dataclass(frozen=True)
class Abilities:
    """What a template shows to the model; the rest would be lost without a word."""

    system: bool
    tools: bool
    tool_calls: bool
    tool_results: bool
    thinking: bool
    arguments_as_text: bool


@dataclass(frozen=True)
class Template:
    """A chat template that is ready to render for one tokenizer.

    Attributes:
        name: what `--template` said; "" for the tokenizer's own.
        text: the Jinja text, with its generation marks and with the user's default system prompt.
        has_marks: the text says itself what the model writes.
        stop_ids: the ids that serving stops on; every trained span ends in one of them.
        stop_tokens: their texts.
        abilities: what the template can show.
        special_tokens: `bos_token` and the like, for the template's use.
        guarded_tokens: control tokens that text of users, tools and data can never become.
        thinking_switches: the variables by which the template turns thinking on and off.
        enable_thinking: their value; None leaves them undefined.
        is_space_added: the tokenizer writes a space in front of every text, as SentencePiece does.
        cutting_stops: stop tokens at which the tokenizer cuts every text before anything else.
        guards: finds the guarded tokens in the text of users, tools and system prompts.
        answer_guards: finds those in answers, which may hold thinking tags.
    """

    name: str
    text: str
    has_marks: bool
    stop_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]
    abilities: Abilities
    special_tokens: Mapping[str, str] = field(repr=False)
    guarded_tokens: tuple[str, ...] = field(repr=False)
    thinking_switches: frozenset[str] = frozenset()
    enable_thinking: bool | None = True
    is_space_added: bool = False
    cutting_stops: Mapping[int, str] = field(default_factory=dict, repr=False)
    guards: re.Pattern[str] = field(default=re.compile("(?!)"), repr=False)
    answer_guards: re.Pattern[str] = field(default=re.compile("(?!)"), repr=False)

    def variables(self, enable_thinking: bool | None) -> dict[str, Any]:
        """Return the template variables of one rendering."""
        if enable_thinking is None:
            return dict(self.special_tokens)
        return {**self.special_tokens, **dict.fromkeys(self.thinking_switches, enable_thinking)}

    @property
    def label(self) -> str:
        """What messages call it, as the beginning of a sentence."""
        return _label(self.name)

    def serving_text(self) -> str:
        """Return the template to save with the model, for any Jinja engine."""
        return serving_text(self.text)


def serving_text(template_text: str) -> str:
    """Return `template_text` without generation marks; it renders the same text."""
    return without_marks(template_text)


def load_template(
    name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    default_system: str | None = None,
    enable_thinking: bool | None = True,
) -> Template:
    """Load a named template, a `.jinja` file, or (without a name) the tokenizer's own.

    Args:
        name: the value of `--template`.
        tokenizer: must have the template's control tokens.
        default_system: system prompt of conversations that have none.
        enable_thinking: passed to templates that can think; None leaves the choice to them.

    Raises:
        TemplateError: there is no such template, the tokenizer lacks its control tokens, or nothing
            ends a turn.
    """
    text = read_template(name) if name else _own_text(tokenizer)
    label = _label(name)
    switches = _THINKING_SWITCHES & variables_of(text)
    header = _header(text)
    _check_control_tokens(header.get("control", []), tokenizer, label=label)
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    guarded = _guarded_tokens(tokenizer)
    if default_system:
        text = _with_default_system(text, default_system, guarded)
    thinking = {} if enable_thinking is None else dict.fromkeys(switches, enable_thinking)
    variables: dict[str, Any] = {**special, **thinking}
    abilities = _probe_abilities(text, variables)
    stops = [special.get(word, word) for word in header.get("stop", [])]
    stops = stops or _probe_stops(text, variables, abilities, guarded, label=label)
    stop_ids = _ids_of(stops, tokenizer, label=label)
    first_piece = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return Template(
        name=name or "",
        text=text,
        has_marks=has_marks(text),
        stop_ids=tuple(stop_ids.values()),
        stop_tokens=tuple(stop_ids),
        abilities=abilities,
        special_tokens=special,
        guarded_tokens=guarded,
        thinking_switches=switches,
        enable_thinking=enable_thinking,
        is_space_added=first_piece[:1] != [] and first_piece[0].startswith("▁"),
        cutting_stops=_cutting(stop_ids.values(), tokenizer),
        guards=any_of(guarded),
        answer_guards=any_of([token for token in guarded if token not in _THINKING_TAGS]),
    )


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, the longest first; of none, nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _label(name: str | None) -> str:
    return f"Template {name!r}" if name else "The tokenizer's own template"


def _own_text(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or own.get("tool_use")
    if not own:
        raise TemplateError(
            "This tokenizer has no chat template of its own.",
            got=tokenizer.name_or_path,
            allowed=template_names(),
            fix="name the model's template with --template",
        )
    return str(own)


def _header(text: str) -> dict[str, list[str]]:
    """Read `{#- control: … -#}` and `{#- stop: … -#}`: words apart by white space."""
    return {kind: words.split() for kind, words in _HEADER.findall(text)}


def _with_default_system(text: str, system: str, guarded: Sequence[str]) -> str:
    """Put the user's system prompt into the template itself, so that serving has it too."""
    for token in guarded:
        if token in system:
            raise TemplateError("default_system contains a control token.", got=token)
    literal = json.dumps(system, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0].role != 'system' -%}"
        f"{{%- set messages = [{{'role': 'system', 'content': {literal}}}] + messages -%}}"
        "{%- endif -%}" + text
    )


def _guarded_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special and token.content.strip())


def _check_control_tokens(
    tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, label: str
) -> None:
    missing = [token for token in tokens if single_id(token, tokenizer) is None]
    if missing:
        words = ",".join(missing)
        raise TemplateError(
            f"{label} has control tokens that this tokenizer lacks.",
            got=missing,
            fix="choose the template that the model was trained with, or add them with "
            f"--add_special_tokens '{words}' --resize_vocab",
        )


def single_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of a text that the tokenizer reads as one token, else None."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(token_id, int):
        return None
    ids = tokenizer.encode(token, add_special_tokens=False)
    # SentencePiece may write a space of its own in front.
    is_single = ids[-1:] == [token_id] and len(ids) <= 2
    return token_id if is_single and not str(tokenizer.decode(ids[:-1])).strip() else None


def _ids_of(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, label: str
) -> dict[str, int]:
    """Return the ids of the stop words; serving always stops on the end-of-text id too."""
    ids = {word: single_id(word, tokenizer) for word in words}
    found = {word: token_id for word, token_id in ids.items() if token_id is not None}
    if not words or len(found) < len(ids):
        raise TemplateError(
            f"{label} ends its turns in nothing that is one token of this tokenizer.",
            got=list(words),
            fix="give the tokenizer an eos_token, or choose another --template",
        )
    if tokenizer.eos_token_id is not None:
        found.setdefault(str(tokenizer.eos_token), tokenizer.eos_token_id)
    return found


def _cutting(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    if not tokenizer.is_fast:
        return {}
    added = {token_id: tokenizer.added_tokens_decoder.get(token_id) for token_id in ids}
    return {
        token_id: token.content
        for token_id, token in added.items()
        if token is not None and token.special and not token.normalized
    }


# --- probes ---------------------------------------------------------------------------------------

_USER = {"role": "user", "content": "probe-question"}
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


def _call(arguments: object) -> dict[str, Any]:
    function = {"name": "probe_tool", "arguments": arguments}
    calls = [{"id": "call00000", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _probe_abilities(text: str, variables: Mapping[str, Any]) -> Abilities:
    def shows(needle: str, *messages: Mapping[str, Any], tools: Any = None) -> bool:
        try:
            rendered = render_chat(
                text, messages, tools=tools, variables=variables, generation_prompt=False
            )
        except TemplateError:
            return False
        return needle in rendered.text

    system = {"role": "system", "content": "probe-system"}
    thought = {**_ANSWER, "reasoning_content": "probe-thought"}
    call = _call({"key": "probe-value"})
    text_call = _call('{"key": "probe-value"}')
    has_call = shows("probe-value", _USER, call, tools=[_TOOL])
    has_text_call = not has_call and shows("probe-value", _USER, text_call, tools=[_TOOL])
    used_call = text_call if has_text_call else call
    return Abilities(
        system=shows("probe-system", system, _USER, _ANSWER),
        tools=shows("probe-description", _USER, _ANSWER, tools=[_TOOL]),
        tool_calls=has_call or has_text_call,
        tool_results=shows("probe-result", _USER, used_call, _RESULT, _ANSWER, tools=[_TOOL]),
        thinking=shows("probe-thought", _USER, thought),
        arguments_as_text=has_text_call,
    )


def _probe_stops(
    text: str,
    variables: Mapping[str, Any],
    abilities: Abilities,
    special_tokens: Sequence[str],
    *,
    label: str,
) -> list[str]:
    """Return the special tokens that end an answer and a turn of tool calls, by rendering both."""
    one = any_of(special_tokens).pattern
    eos = variables.get("eos_token")

    def tokens_after(needle: str, answer: Mapping[str, Any], tools: Any) -> tuple[str, list[str]]:
        rendered = render_chat(
            text, [_USER, answer], tools=tools, variables=variables, generation_prompt=False
        )
        _, found, tail = rendered.text.rpartition(needle)
        if not found:
            raise TemplateError(f"{label} changes or drops the answer.", got=rendered.text)
        return tail, re.findall(one, tail)

    tail, found = tokens_after("probe-answer", _ANSWER, None)
    if not found:
        raise TemplateError(
            f"{label} ends its turns in nothing: no special token follows the answer.",
            got=tail,
            fix="choose another --template, or end the answer with {{ eos_token }} in it",
        )
    # Where several stand side by side, the end of text is what serving stops on.
    first_run = re.search(f"(?:{one})+", tail)
    assert first_run is not None
    stop = eos if eos and eos in re.findall(one, first_run[0]) else found[0]
    if not abilities.tool_calls:
        return [stop]
    arguments = {"key": "probe-value"}
    call = _call(json.dumps(arguments) if abilities.arguments_as_text else arguments)
    found = tokens_after("probe-value", call, [_TOOL])[1]
    # Calls have brackets of special tokens; what ends the turn is the last one of all.
    return [stop, *([] if stop in found or eos in found else found[-1:])]
