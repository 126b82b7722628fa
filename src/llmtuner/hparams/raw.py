"""Read YAML and JSON without typing anything: scalars stay text, places are remembered."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llmtuner.extras.errors import ConfigError

_QUOTED_WORD = re.compile(r"'[^'<]{2,}'")

Raw: TypeAlias = "str | list[Any] | Mapping[str, Any] | None"
"""Text, or lists and mappings of text; None where a file says null."""


class Quoted(str):
    """Text in quotes: `"null"` is four letters, not nothing."""

    __slots__ = ()


class _Number(str):
    """A JSON number as it is written, to tell it from a string in quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class Setting:
    """One name with its untyped value, and where it was given (`--lora_rank`, `sft.yaml:12`)."""

    name: str
    raw: Raw
    where: str


def read_config_file(path: Path) -> list[Setting]:
    """Return the settings of a YAML or JSON file, in file order.

    Raises:
        ConfigError: the file is missing, malformed, no mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise ConfigError(f"Cannot read the configuration file: {reason}.", got=str(path)) from None
    except UnicodeDecodeError as error:
        problem = "The configuration file is not UTF-8."
        raise ConfigError(problem, where=str(path), got=f"byte {error.start}") from None
    return _read_json(text, path) if path.suffix == ".json" else _read_yaml(text, path)


def compose_text(text: str) -> Raw:
    """Read one YAML value that was written on the command line (`[a, b]`, `{"a": 1}`).

    Raises:
        ConfigError: it is malformed.
    """
    return _to_raw(_compose(text, where=None), where=None)


def _read_yaml(text: str, path: Path) -> list[Setting]:
    node = _compose(text, where=str(path))
    if node is None:
        return []
    if not isinstance(node, MappingNode):
        raise ConfigError("The file must hold `name: value` lines.", where=str(path))
    settings = []
    for name, value in _pairs(node, where=str(path)):
        where = f"{path}:{value[0]}"
        settings.append(Setting(name, _to_raw(value[1], where=where), where))
    return settings


def _compose(text: str, *, where: str | None) -> Node | None:
    try:
        with warnings.catch_warnings():
            # The warning would quote the line, which may hold a token.
            warnings.simplefilter("error", ReusedAnchorWarning)
            node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except ReusedAnchorWarning:
        raise ConfigError("An &anchor is defined twice.", where=where) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if where and mark else where
        # The library quotes what it stumbled over, which may be a token: leave it out.
        reason = _QUOTED_WORD.sub("…", error.problem or error.context or "")
        problem = f"Malformed YAML: {reason}."
        raise ConfigError(problem, where=place) from None
    except (YAMLError, RecursionError, ValueError) as error:
        problem = f"Malformed YAML: {type(error).__name__}."
        raise ConfigError(problem, where=where) from None
    return node


def _pairs(node: MappingNode, *, where: str | None) -> Sequence[tuple[str, tuple[int, Node]]]:
    found: dict[str, tuple[int, Node]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        place = f"{where}:{line}" if where else None
        if not isinstance(key, ScalarNode):
            raise ConfigError("A name must be plain text.", where=place)
        if key.value in found:
            raise ConfigError(
                f"{key.value} is given twice (first in line {found[key.value][0]}).",
                where=place,
                fix="keep one of the two lines",
            )
        found[key.value] = (line, value)
    return list(found.items())


def _to_raw(node: Node | None, *, where: str | None, depth: int = 0) -> Raw:
    if depth > 20:
        raise ConfigError("The value is nested too deeply, or contains itself.", where=where)
    if node is None:
        return None
    if isinstance(node, SequenceNode):
        return [_to_raw(item, where=where, depth=depth + 1) for item in node.value]
    if isinstance(node, MappingNode):
        pairs = _pairs(node, where=None)
        return {key: _to_raw(value[1], where=where, depth=depth + 1) for key, value in pairs}
    assert isinstance(node, ScalarNode)
    if node.style is not None:
        return Quoted(node.value)
    return None if node.value in ("", "~", "null", "Null", "NULL") else str(node.value)


def _read_json(text: str, path: Path) -> list[Setting]:
    try:
        values = json.loads(
            text,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_Number,
            object_pairs_hook=_no_twins,
        )
    except json.JSONDecodeError as error:
        problem = f"Malformed JSON: {error.msg} (column {error.colno})."
        raise ConfigError(problem, where=f"{path}:{error.lineno}") from None
    except ConfigError as error:
        raise error.at(str(path)) from None
    except RecursionError:
        raise ConfigError("The file is nested too deeply.", where=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError('The file must hold one object: {"name": value, …}.', where=str(path))
    return [Setting(name, _json_raw(value), f"{path}") for name, value in values.items()]


def _no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{name} is given twice.", fix="keep one of the two")
        found[name] = value
    return found


def _json_raw(value: Any) -> Raw:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return {name: _json_raw(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_json_raw(item) for item in value]
    if value is None:
        return None
    return str(value) if isinstance(value, _Number) else Quoted(value)
