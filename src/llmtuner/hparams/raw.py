"""Read settings files without typing anything: scalars stay text, places are remembered."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from llmtuner.extras.errors import ConfigError

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
    if path.suffix == ".json":
        return _read_json(text, path)
    from llmtuner.hparams.yaml_text import read_yaml  # only now: --help must not wait for it

    return read_yaml(text, path)


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
