"""From text to value: every scalar stays text until the field it belongs to types it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmtuner.extras.errors import ConfigError, nearest
from llmtuner.hparams.options import Kind, Option
from llmtuner.hparams.raw import Quoted, Raw

_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "off", "0"})
_UNSET = frozenset({"", "null", "none", "~"})
_UNSET_TEXT = frozenset({"", "null", "Null", "NULL", "None", "~"})
_INT = re.compile(r"[-+]?\d[\d_]*")
_LONGEST_INT = 100
_SHOWN = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


def type_value(raw: Raw, option: Option, *, where: str) -> Any:
    """Return the value of `option` that `raw` stands for.

    Raises:
        ConfigError: the text is no such value; a secret is not shown.
    """
    kind = option.kind
    if kind.optional and _is_unset(raw, kind):
        return None
    try:
        if kind.is_list:
            return tuple(_scalar(item, kind, option.name) for item in _split(raw))
        return _scalar(raw, kind, option.name)
    except ConfigError as error:
        got = "(hidden)" if option.secret else error.got
        raise ConfigError(
            error.problem, got=got, allowed=error.allowed, fix=error.fix, where=where
        ) from None


def to_bool(text: str) -> bool | None:
    """Return the truth value that a text means, or None."""
    word = text.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def free_value(raw: Raw) -> Any:
    """Type a value that no field describes by the core rules of YAML 1.2."""
    if isinstance(raw, Mapping):
        return {str(key): free_value(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [free_value(value) for value in raw]
    if raw is None or isinstance(raw, Quoted):
        return raw if raw is None else str(raw)
    word = raw.strip()
    if word in {"", "null", "Null", "NULL", "~"}:
        return None
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    whole = _to_int(word) if _INT.fullmatch(word) else None
    if whole is not None:
        return whole
    number = _to_float(word)
    return raw if number is None else number


def _is_unset(raw: Raw, kind: Kind) -> bool:
    if raw is None:
        return True
    if not isinstance(raw, str):
        return False
    word = raw.strip()
    if kind.bases[-1] == "str" and not kind.choices:
        # In free text only what is surely meant as nothing is nothing.
        return word in _UNSET_TEXT and (word == "" or not isinstance(raw, Quoted))
    return word.lower() in _UNSET


def _split(raw: Raw) -> Sequence[Raw]:
    if isinstance(raw, list):
        return raw
    if isinstance(raw, str) and raw.strip().startswith("["):
        parsed = _composed(raw)
        if isinstance(parsed, list):
            return parsed
    if isinstance(raw, str):
        return [part.strip() for part in raw.split(",") if part.strip()]
    return [raw]


def _scalar(raw: Raw, kind: Kind, name: str) -> Any:
    if "dict" in kind.bases:
        return _mapping(raw, kind, name)
    if kind.bases == ("object",):
        raise ConfigError(f"{name} can only be set from Python code.", fix=f"leave {name} out")
    if not isinstance(raw, str):
        got = None if raw is None else free_value(raw)
        raise ConfigError(f"{name} must be {_wanted(kind)}.", got=got if raw else "null")
    for base in kind.bases:
        value = _to_base(raw, base)
        if value is not None:
            return _checked(value, kind, name)
    raise ConfigError(f"{name} must be {_wanted(kind)}.", got=str(raw))


def _to_base(text: str, base: str) -> Any:
    word = text.strip()
    if base == "bool":
        return to_bool(word)
    if base == "int":
        return _to_int(word)
    if base == "float":
        return _to_float(word)
    return str(text)


def _to_int(word: str) -> int | None:
    if _INT.fullmatch(word) and len(word) < _LONGEST_INT:
        return int(word.replace("_", ""))
    number = _to_float(word)
    return int(number) if number is not None and number.is_integer() else None


def _to_float(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _checked(value: Any, kind: Kind, name: str) -> Any:
    if kind.choices and value not in kind.choices:
        guess = nearest(str(value), [str(choice) for choice in kind.choices])
        fix = f"did you mean {guess}?" if guess else None
        raise ConfigError(f"Unknown {name}.", got=value, allowed=kind.choices, fix=fix)
    if kind.low is not None and value < kind.low:
        raise ConfigError(f"{name} is too small.", got=value, allowed=_range(kind))
    if kind.high is not None and value > kind.high:
        raise ConfigError(f"{name} is too large.", got=value, allowed=_range(kind))
    return value


def _range(kind: Kind) -> str:
    bounds = (("at least", kind.low), ("at most", kind.high))
    return ", ".join(f"{word} {limit:g}" for word, limit in bounds if limit is not None)


def _wanted(kind: Kind) -> str:
    words = " or ".join(_SHOWN[base] for base in kind.bases)
    return f"a list of {words}" if kind.is_list else words


def _composed(text: str) -> Raw:
    from llmtuner.hparams.yaml_text import compose_text  # few values need it, and it loads slowly

    return compose_text(text)


def _mapping(raw: Raw, kind: Kind, name: str) -> Any:
    """Return a mapping, or where the field takes one, the path of a JSON file as text."""
    if isinstance(raw, str) and raw.strip().startswith("{"):
        raw = _composed(raw)
    if isinstance(raw, Mapping):
        return free_value(raw)
    if isinstance(raw, str) and raw.strip() and "str" in kind.bases:
        return str(raw)
    wanted = "a mapping or the path of a JSON file" if "str" in kind.bases else "a mapping"
    problem = f"{name} must be {wanted}."
    raise ConfigError(problem, got=free_value(raw), fix=f'write {name}={{"name": value}}')
