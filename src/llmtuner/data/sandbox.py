"""The sandbox in which chat templates run: transformers' own, without work that repeats.

Jinja asks for every attribute that a template reads whether it is safe, and transformers copies all
data before each rendering. Here a verdict is kept for each type and name, on which alone it
depends, and data that is plain already is not copied. What templates may do stays the same.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

_OPENED, _CLOSED = "\0{generation\0", "\0generation}\0"  # no text of a row holds NUL
_MARK = re.compile(f"({re.escape(_OPENED)}|{re.escape(_CLOSED)})")
_PLAIN = frozenset({str, int, float, bool, type(None), list, dict, tuple, LoopContext})
_OF_DICTS = frozenset(dir(dict))
_REASONING_ORDER = ("reasoning_content", "thinking", "reasoning")
_REASONING = frozenset(_REASONING_ORDER)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the same verdicts, each of them found once."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._verdicts: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Say whether a template may read an attribute.

        Of plain values and loops the verdict follows from their type and the name.
        """
        kind = type(obj)
        if kind not in _PLAIN:
            return super().is_safe_attribute(obj, attr, value)
        verdict = self._verdicts.get((kind, attr))
        if verdict is None:
            verdict = super().is_safe_attribute(obj, attr, value)
            self._verdicts[kind, attr] = verdict
        return verdict

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return `obj.attribute`; of a dictionary that has no such attribute, its entry."""
        kind = type(obj)
        if kind is dict and attribute in obj and attribute not in _OF_DICTS:
            return obj[attribute]
        if kind is LoopContext and self._verdicts.get((kind, attribute)):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


class _Generation(Extension):
    """`{% generation %}`: writes where it begins and ends into the text."""

    tags = {"generation"}  # noqa: RUF012 - declared by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        """Make a call of the block, as transformers does: its variables stay inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{_OPENED}{caller()}{_CLOSED}"


@lru_cache(maxsize=64)
def compile_chat(text: str) -> jinja2.Template:
    """Compile a chat template, with the names and filters that transformers gives to it."""
    known = _compile_jinja_template(text).environment
    sandbox = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters.update(known.filters)
    sandbox.globals.update(known.globals)
    template = ImmutableSandboxedEnvironment.from_string(sandbox, text)
    template.globals = dict(template.globals)  # a chain of maps, which each rendering would copy
    return template


def render_plain(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    generation_prompt: bool,
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Render a chat that is made of JSON values only.

    Returns:
        The text, and [start, end) of each generation mark in it, in characters.
    """
    rendered = compile_chat(text).render(
        variables,
        messages=[_with_reasoning(message) for message in messages],
        tools=list(tools) if tools else None,
        documents=None,
        add_generation_prompt=generation_prompt,
    )
    return _split_marks(rendered) if _OPENED in rendered else (rendered, ())


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with its thought under the names by which templates ask for it."""
    if _REASONING.isdisjoint(message):
        return dict(message)
    found = (message[name] for name in _REASONING_ORDER if message.get(name) is not None)
    thought = next(found, None)
    if thought is None:
        return dict(message)
    return {"thinking": thought, **message, "reasoning_content": thought}


def _split_marks(rendered: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    texts: list[str] = []
    marks: list[tuple[int, int]] = []
    opened: list[int] = []
    place = 0
    for part in _MARK.split(rendered):
        if part == _OPENED:
            opened.append(place)
        elif part == _CLOSED:
            marks.append((opened.pop(), place))
        else:
            texts.append(part)
            place += len(part)
    return "".join(texts), tuple(marks)
