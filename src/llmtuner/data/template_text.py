"""The Jinja text of a chat template: where it comes from, and what is settled in it for good.

What serving could choose differently is written into the text, so that a saved model is served as
it was trained: the default system prompt, the current date, whether the model thinks by default.
"""

import json
from collections.abc import Sequence
from datetime import date
from typing import Any

from llmtuner.data.chat_jinja import calls_of, variables_of, without_marks
from llmtuner.data.templates import template_names
from llmtuner.extras.errors import TemplateError
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

THE_DATE = date(2024, 7, 26)
"""What templates write as the current date; Llama 3.1's own template has this day by default."""

_CLOCK = "strftime_now"


def own_text(chat_template: str | dict[str, str] | None, *, name_or_path: str) -> str:
    """Return the tokenizer's own template; of several, serving takes `tool_use` for tools.

    Raises:
        TemplateError: the tokenizer has none.
    """
    if isinstance(chat_template, dict):
        plain, with_tools = chat_template.get("default"), chat_template.get("tool_use")
        if plain and with_tools:
            # Each was a file, of which Jinja drops the last line feed; `+` keeps the rest as it is.
            plain, with_tools = plain.removesuffix("\n"), with_tools.removesuffix("\n")
            return f"{{% if tools +%}}{with_tools}{{%+ else +%}}{plain}{{%+ endif %}}"
        chat_template = plain or with_tools
    if not chat_template:
        raise TemplateError(
            "This tokenizer has no chat template of its own.",
            got=name_or_path,
            allowed=template_names(),
            fix="name the model's template with --template",
        )
    return chat_template


def serving_text(template_text: str) -> str:
    """Return `template_text` without generation marks; it renders the same text."""
    return without_marks(template_text)


def with_thinking(template_text: str, switches: Sequence[str], value: bool | None) -> str:
    """Let the template think, or not, where serving does not say."""
    if value is None:
        return template_text
    return (
        "".join(
            f"{{%- if {name} is not defined +%}}{{%- set {name} = {str(value).lower()} +%}}"
            "{%- endif +%}"
            for name in switches
        )
        + template_text
    )


def with_fixed_date(template_text: str, *, label: str) -> str:
    """Let the template write the same day always: tomorrow's prompt is the one that was trained.

    Raises:
        TemplateError: the template computes how it writes the date.
    """
    if _CLOCK not in variables_of(template_text):
        return template_text
    formats = calls_of(template_text, _CLOCK)
    known = [one for one in formats if one is not None]
    if len(known) < len(formats):
        raise TemplateError(
            f"{label} writes the current date in a form that cannot be found out, so tomorrow's "
            "prompts would not be those that were trained.",
            fix="take the date out of the template, and pass its file as --template",
        )
    logger.warning(
        "%s writes the current date. It is fixed to %s, in training and in the saved template: "
        "otherwise tomorrow's prompts would not be those that were trained.",
        label,
        THE_DATE.isoformat(),
    )
    written: dict[str, Any] = {one: THE_DATE.strftime(one) for one in known}
    days = json.dumps(written, ensure_ascii=False)
    clock = f"{{%- macro {_CLOCK}(form) -%}}{{{{- {days}[form] -}}}}{{%- endmacro +%}}"
    return clock + template_text


def with_default_system(template_text: str, system: str, guarded: Sequence[str]) -> str:
    """Put the user's system prompt into the template itself, so that serving has it too.

    Raises:
        TemplateError: there is a control token in it.
    """
    for token in guarded:
        if token in system:
            raise TemplateError("default_system contains a control token.", got=token)
    literal = json.dumps(system, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0].role != 'system' -%}"
        f"{{%- set messages = [{{'role': 'system', 'content': {literal}}}] + messages -%}}"
        "{%- endif -%}" + template_text
    )
