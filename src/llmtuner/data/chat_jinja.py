"""Rendering chat templates: transformers' sandboxed Jinja, with our errors and the marked spans."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from llmtuner.data.sandbox import render_plain
from llmtuner.extras.errors import TemplateError

_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@dataclass(frozen=True)
class Rendered:
    """One rendered chat.

    Attributes:
        text: what the template wrote.
        marks: [start, end) of each generation mark in `text`, in characters.
    """

    text: str
    marks: tuple[tuple[int, int], ...]


def render_chat(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    generation_prompt: bool,
) -> Rendered:
    """Render `messages` with the template `text`, as `apply_chat_template` does.

    Raises:
        TemplateError: the template refuses these messages, or is not valid Jinja.
    """
    try:
        rendered, marks = render_plain(
            text,
            messages,
            tools=tools,
            variables=variables,
            generation_prompt=generation_prompt,
        )
    # Templates are programs: besides Jinja's own errors they fail like Python code does.
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as problem:
        roles = [message.get("role") for message in messages]
        raise TemplateError(
            f"The chat template cannot render these messages: {problem}", got=roles
        ) from problem
    return Rendered(rendered, () if generation_prompt else marks)


def has_marks(text: str) -> bool:
    """Say whether the template says by `{% generation %}` what the model writes."""
    return _MARK.search(text) is not None


def without_marks(text: str) -> str:
    """Return the template for Jinja without the `generation` tag; it renders the same text.

    `if true` keeps a block where the mark was, so that the white space around it is cut as before.
    """
    return _MARK.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", text)


def variables_of(text: str) -> frozenset[str]:
    """Return the names that the template reads and does not define.

    Raises:
        TemplateError: the template is not valid Jinja.
    """
    return frozenset(jinja2.meta.find_undeclared_variables(_parse(text)))


def literals_of(text: str) -> str:
    """Return all that the template can write by itself; between two literals stands NUL."""
    tree = _parse(text)
    literals = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    constants = {node.value for node in tree.find_all(jinja2.nodes.Const)}
    return "\0".join(literals | {value for value in constants if isinstance(value, str)})


def calls_of(text: str, function: str) -> list[str | None]:
    """Return the first arguments with which the template calls a function; None if computed."""
    calls = [
        call
        for call in _parse(text).find_all(jinja2.nodes.Call)
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == function
    ]
    arguments = [call.args[0] if call.args else None for call in calls]
    return [
        str(argument.value) if isinstance(argument, jinja2.nodes.Const) else None
        for argument in arguments
    ]


def _parse(text: str) -> jinja2.nodes.Template:
    environment = jinja2.Environment(
        extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True
    )
    try:
        return environment.parse(without_marks(text))
    except jinja2.TemplateSyntaxError as problem:
        raise TemplateError(
            f"The chat template is not valid Jinja: line {problem.lineno}: {problem.message}"
        ) from problem
