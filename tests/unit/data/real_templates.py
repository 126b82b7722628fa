"""Real chat templates, each with a tokenizer that has its control tokens; needs `shared`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtuner.data.chat_jinja import literals_of
from llmtuner.extras.errors import TemplateError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
FAMILIES = json.loads((Path(__file__).parent / "template_families.json").read_text("utf-8"))
# Spellings of control tokens; the tokens of a family that look otherwise are in the file above.
CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<[a-z_]+\|>|<｜[^｜{}]{1,40}｜>|<(?:start|end)_of_[a-z_]+>|<sop>"
    r"|<SPECIAL_\d+>|\[/?[A-Z_]{2,}\]|\[gMASK\]|\[[a-z]~\[|\]~!?[a-z]\[?\]?"
)


def real_templates(trl: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield `folder/name` and text of every template, in order."""
    folders = [SHARED / "templates" / name for name in ("llama_cpp", "chat_templates", "seed_004")]
    for folder in [*folders, *([trl] if trl else [])]:
        for path in sorted(folder.glob("*.jinja"), key=lambda path: path.name.lower()):
            text = path.read_text(encoding="utf-8")
            if folder.name == "chat_templates":  # indented for people; its readme says how to read
                text = _joined(text)
            yield f"{'trl' if folder == trl else folder.name}/{path.stem}", text


def _joined(text: str) -> str:
    joined = text.replace("    ", "").replace("\n", "")
    try:
        literals_of(joined)
    except TemplateError:  # a statement over two lines
        return text
    return joined


def real_template(name: str) -> str:
    """Return the text of one template of llama.cpp."""
    return (SHARED / f"templates/llama_cpp/{name}.jinja").read_text(encoding="utf-8")


def fitting_tokenizer(name: str, text: str) -> PreTrainedTokenizerBase:
    """Return a real tokenizer that has the control tokens of a template, and the template."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/minimind")
    family = next((one for form, one in FAMILIES.items() if re.search(form, name)), {})
    names = {f"{key}_token": family[key] for key in ("bos", "eos") if key in family}
    tokenizer.add_special_tokens(names)
    tokens = {*CONTROL.findall(literals_of(text)), *family.get("more", [])}
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(sorted(tokens.difference(known)), special_tokens=True)
    tokenizer.chat_template = text
    return tokenizer
