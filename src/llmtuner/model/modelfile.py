"""A `Modelfile` for Ollama, written only where its template language says the same as the model's.

Ollama's templates are Go text templates. The chat template is rendered with marked messages, taken
apart into what stands before and after each kind of turn, and put together again; if that does not
give what the chat template gives, there is no Modelfile.

Source: https://docs.ollama.com/modelfile (the format).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtuner.extras.files import read_json, write_text
from llmtuner.extras.logs import get_logger
from llmtuner.model.streaming.texts import chat_template_of, stop_ids_of

logger = get_logger(__name__)

MODELFILE = "Modelfile"
_CONTEXT_TOKENS = 4096
_SYSTEM, _USER, _ANSWER, _NEXT = "zqSystem", "zqQuestion", "zqAnswer", "zqNext"

_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)

Chat = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Turns:
    """A chat template as texts around each turn.

    Attributes:
        around: role -> text before and after its content.
        prompt: what the model writes after.
        start: what every chat begins with (the token that begins a text).
        lead: what chats begin with that have no system message (often one by default).
    """

    around: Mapping[str, tuple[str, str]]
    prompt: str
    start: str = ""
    lead: str = ""

    def render(self, chat: Chat) -> str:
        """Return the text of a chat that waits for an answer."""
        lead = "" if chat[0][0] == "system" else self.lead
        turns = [self.around[role][0] + text + self.around[role][1] for role, text in chat]
        return self.start + lead + "".join(turns) + self.prompt


def write_modelfile(folder: Path) -> bool:
    """Write `Modelfile` into a model folder; return False, with a notice, if it cannot be right."""
    text = chat_template_of(folder)
    turns = None if text is None else turns_of(text, _special_tokens(folder))
    if turns is None:
        logger.info("No Modelfile: Ollama's templates cannot say what this chat template says.")
        return False
    lines = ["FROM .", "", f'TEMPLATE """{_go_template(turns)}"""', ""]
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in _stop_texts(folder)]
    longest = read_json(folder / "config.json").get("max_position_embeddings", _CONTEXT_TOKENS)
    lines.append(f"PARAMETER num_ctx {min(longest, _CONTEXT_TOKENS)}")
    write_text(folder / MODELFILE, "\n".join(lines) + "\n")
    return True


def turns_of(template: str, special: Mapping[str, str]) -> Turns | None:
    """Take a chat template apart; None if it is more than texts around each turn.

    Args:
        template: Jinja text.
        special: `bos_token` and the like.
    """
    try:
        renderer = _Renderer(template, special)
        turns = _take_apart(renderer, special.get("bos_token", ""))
        chats: list[Chat] = [
            [("user", _USER)],
            [("system", _SYSTEM), ("user", _USER)],
            [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)],
            [("system", _SYSTEM), *[("user", _USER), ("assistant", _ANSWER)] * 2, ("user", _NEXT)],
        ]
        is_right = all(turns.render(chat) == renderer.render(chat) for chat in chats)
    # Templates are programs: besides Jinja's own errors they fail like Python code does.
    except (jinja2.TemplateError, *_FAILURES):
        return None
    return turns if is_right else None


def _take_apart(renderer: "_Renderer", bos: str) -> Turns:
    """Take the texts between contents; raise ValueError where a content is not found.

    Where one turn ends and the next begins is free to choose, as long as it is always the same: the
    end of a user turn is counted to what follows it.
    """
    before, prompt = _split(renderer.render([("user", _USER)]), _USER)
    chat = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
    answer_start, rest = _split(_split(renderer.render(chat), _USER)[1], _ANSWER)
    after_answer = _split(rest, _NEXT)[0]
    told = renderer.render([("system", _SYSTEM), ("user", _USER)])
    system_start, rest = _split(told, _SYSTEM)
    after_system = _split(rest, _USER)[0]
    # Some models call the mark of every turn their bos_token; that one belongs to the turns.
    is_start = bos and system_start.startswith(bos) and renderer.render(chat).count(bos) == 1
    start = bos if is_start else ""
    # Without the start, whose last letters may be those of an end of turn: `…text|>`, `…eot_id|>`.
    before = _after(before, start)
    user_start = _common_end(before, after_answer, after_system)
    around = {
        "system": (system_start.removeprefix(start), _before(after_system, user_start)),
        "user": (user_start, ""),
        "assistant": (answer_start, _before(after_answer, user_start)),
    }
    return Turns(around, prompt, start, _before(before, user_start))


class _Renderer:
    """A chat template that is ready to render, set up as transformers does."""

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        self._template = ImmutableSandboxedEnvironment.from_string(environment, template)
        self._special = special

    def render(self, chat: Chat) -> str:
        messages = [{"role": role, "content": text} for role, text in chat]
        return self._template.render(messages=messages, add_generation_prompt=True, **self._special)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(mark)
    before, _, after = text.partition(mark)
    return before, after


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(start)
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(end)
    return text[: len(text) - len(end)]


def _common_end(*texts: str) -> str:
    length = 0
    for letters in zip(*(reversed(text) for text in texts), strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return texts[0][len(texts[0]) - length :]


def _go_template(turns: Turns) -> str:
    """Write the texts as Go strings: bare ones would lose their line ends beside actions.

    The token that begins a text is left out: Ollama adds it.
    """
    lines = []
    if turns.lead:
        lead = _go_string(turns.lead)
        lines.append(f'{{{{- if ne (index .Messages 0).Role "system" -}}}}{lead}{{{{- end -}}}}')
    lines.append("{{- range .Messages -}}")
    word = "if"
    for role, (start, end) in turns.around.items():
        content = f"{_go_string(start)}{{{{ .Content }}}}{_go_string(end)}"
        lines.append(f'{{{{- {word} eq .Role "{role}" -}}}}{content}')
        word = "else if"
    lines += ["{{- end -}}", "{{- end -}}", _go_string(turns.prompt)]
    return "\n".join(lines)


def _go_string(text: str) -> str:
    # JSON's escapes are also Go's. Three quotes in a row would end the Modelfile's own text.
    quoted = json.dumps(text, ensure_ascii=False).replace('\\"', "\\u0022")
    return f"{{{{ {quoted} }}}}" if text else ""


def _special_tokens(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        for key, value in (read_json(path) if path.is_file() else {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _stop_texts(folder: Path) -> list[str]:
    path = folder / "tokenizer.json"
    entries: list[dict[str, Any]] = read_json(path)["added_tokens"] if path.is_file() else []
    stops = stop_ids_of(folder)
    return [entry["content"] for entry in entries if entry["id"] in stops]
