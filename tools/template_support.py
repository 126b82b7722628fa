"""Write `docs/template_support.md`: `python tools/template_support.py FOLDER_OF_TRL_TEMPLATES`.

Judges real chat templates: each is used with a proved contract, or refused with the reason. The
templates lie in the folder `shared` beside the repository, and trl's in its package.
"""

import logging
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/unit/data")]

from example_chats import TOOLS  # noqa: E402
from real_templates import fitting_tokenizer, real_templates  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from llmtuner.data.conversation import Conversation, Message, ToolCall  # noqa: E402
from llmtuner.data.render import encode_conversations  # noqa: E402
from llmtuner.data.template import Template, load_template  # noqa: E402
from llmtuner.data.verify import as_served, verify_encoded  # noqa: E402
from llmtuner.extras.errors import DataError, TemplateError  # noqa: E402

PAGE = ROOT / "docs/template_support.md"
FRONT = (Path(__file__).parent / "template_support_front.md").read_text(encoding="utf-8")


def _trained(text: str, thinking: str | None = None, *calls: ToolCall) -> Message:
    return Message("assistant", text, train=True, thinking=thinking, tool_calls=calls)


def _chats() -> dict[str, Conversation]:
    asked, again = Message("user", "What is it?"), Message("user", "And then?")
    calls = [ToolCall("get_weather", f'{{"city": "{city}"}}') for city in ("Paris", "Rome")]
    results = [Message("tool", f'{{"sky": "{sky}"}}') for sky in ("clear", "dark")]
    first, second = _trained("An answer."), _trained("Another one.")
    return {
        "plain": Conversation((asked, first, again, second, asked, _trained("Third."))),
        "system": Conversation((Message("system", "Be brief."), asked, first, again, second)),
        "thoughts": Conversation(
            (asked, _trained("An answer.", "Hm."), again, _trained("Another one.", "Let me see."))
        ),
        "tools": Conversation(
            (asked, _trained("", None, calls[0]), results[0], first, again, second), tools=TOOLS
        ),
        "several": Conversation((asked, _trained("", None, *calls), *results, first), tools=TOOLS),
    }


def judge(name: str, text: str) -> dict[str, str]:
    """Return, for every kind of chat, "yes", "one per turn" or the reason of the refusal."""
    tokenizer = fitting_tokenizer(name, text)
    try:
        template = load_template(None, tokenizer)
    except TemplateError as problem:
        return dict.fromkeys(_chats(), _reason(problem))
    return {kind: _verdict(chat, template, tokenizer) for kind, chat in _chats().items()}


def _verdict(chat: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        encoded = encode_conversations([chat], template=template, tokenizer=tokenizer)[0]
    except DataError as problem:
        return _reason(problem)
    tokenizer.chat_template = template.serving_text()
    served = as_served(tokenizer, template, trust_remote_code=False)
    turns = verify_encoded(encoded, served)
    assert turns == sum(message.train for message in chat.messages)
    return "yes" if len(encoded.samples) == 1 else "one per turn"


def _reason(problem: DataError) -> str:
    text = problem.problem.removeprefix("The tokenizer's own template ")
    text = text.removeprefix("does not train what is served: ")
    text = re.sub(r" \(message \d+\)|\.$", "", text)
    return text.replace("The chat template cannot render these messages: ", "it fails: ")


def row(name: str, cells: dict[str, str]) -> str:
    """Return the line of one template in the table."""
    shown = [cell if cell in ("yes", "one per turn") else "no" for cell in cells.values()]
    return f"| {name} | " + " | ".join(shown) + " |"


def page(trl: Path) -> str:
    """Return the whole page."""
    logging.disable(logging.WARNING)
    rows = ["| template | answers | system | thoughts | tools | several |", "|-|-|-|-|-|-|"]
    reasons: dict[str, list[str]] = {}
    used = 0
    verdicts = {name: judge(name, text) for name, text in real_templates(trl)}
    for name, cells in verdicts.items():
        rows.append(row(name, cells))
        used += "| yes |" in rows[-1] or "| one per turn |" in rows[-1]
        for kind, cell in cells.items():
            if cell not in ("yes", "one per turn"):
                reasons.setdefault(cell, []).append(f"{name} ({kind})")
    told = [f"- {reason}: {_short(names)}" for reason, names in sorted(reasons.items())]
    total = f"{used} of {len(verdicts)} templates are used, at least for some kinds of chats.\n"
    return FRONT + total + "\n" + "\n".join(rows) + "\n\n## Reasons\n\n" + "\n".join(told) + "\n"


def _short(names: list[str]) -> str:
    """Join the kinds of chats of each template."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        template, _, kind = name.partition(" (")
        kinds.setdefault(template, []).append(kind.removesuffix(")"))
    return ", ".join(f"{name} ({', '.join(some)})" for name, some in kinds.items())


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1])), encoding="utf-8")
