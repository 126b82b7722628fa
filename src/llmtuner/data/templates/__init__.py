"""Named chat templates: the folder is the registry, `<name>.jinja` is the entry.

`aliases.json` holds further names of the same texts.
"""

import json
from pathlib import Path

from llmtuner.extras.errors import TemplateError, nearest

_FOLDER = Path(__file__).parent


def template_names() -> list[str]:
    """Return the names that `--template` accepts, sorted."""
    return sorted([path.stem for path in _FOLDER.glob("*.jinja")] + list(template_aliases()))


def template_aliases() -> dict[str, str]:
    """Return the names that stand for another template, with that template's name."""
    aliases: dict[str, str] = json.loads((_FOLDER / "aliases.json").read_text(encoding="utf-8"))
    return aliases


def read_template(name: str) -> str:
    """Return the Jinja text of a named template, or of a user's own `.jinja` file.

    Raises:
        TemplateError: there is no such name or file.
    """
    own_file = Path(name)
    if own_file.suffix == ".jinja" and own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    if name not in template_names():
        guess = nearest(name, template_names())
        raise TemplateError(
            "Unknown template.",
            got=name,
            allowed=[*template_names(), "the path of a .jinja file"],
            fix=f"did you mean {guess}?" if guess else "leave it out to use the tokenizer's own",
        )
    entry = template_aliases().get(name, name)
    return (_FOLDER / f"{entry}.jinja").read_text(encoding="utf-8")
