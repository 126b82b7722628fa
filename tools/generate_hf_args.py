"""Write `hparams/hf_training_args.json` from the installed transformers.

Run it after an upgrade of transformers: `python tools/generate_hf_args.py`. A test compares the
file with the installed version.
"""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

TABLE = Path(__file__).parents[1] / "src/llmtuner/hparams/hf_training_args.json"


def build_table() -> dict[str, dict[str, Any]]:
    """Return name -> kind, optional, default and choices of every field."""
    hints = typing.get_type_hints(Seq2SeqTrainingArguments)
    fields = [field for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init]
    return {field.name: _describe(field, hints[field.name]) for field in fields}


def render_table() -> str:
    """Return the text of the JSON file."""
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in build_table().items()]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _describe(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    parts = _members(hint)
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    choices = field.metadata.get("choices") or [member.value for kind in enums for member in kind]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, enum.Enum):
        default = default.value
    row: dict[str, Any] = {"kind": _kind(parts), "optional": types.NoneType in parts}
    if choices and _kind(parts) == "str":
        row["choices"] = list(choices)
    return row | {"default": default}


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _kind(parts: tuple[Any, ...]) -> str:
    """Name the most structured way in which a value can be given."""
    origins = {typing.get_origin(part) or part for part in parts}
    for kind in (dict, list, str, float, int, bool):
        if kind in origins:
            return kind.__name__
    return "object"


if __name__ == "__main__":
    TABLE.write_text(render_table(), encoding="utf-8")
    print(f"{TABLE}: {len(build_table())} fields")
