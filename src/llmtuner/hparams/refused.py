"""Known names and values that are not supported, and what to use instead."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.raw import Raw, Setting

Inert = str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why one name is refused.

    Attributes:
        what: the feature it belongs to.
        fix: what to use instead.
        inert: the value (or values) that changes nothing; None for "unset".
    """

    what: str
    fix: str
    inert: Inert


@cache
def refusals() -> Mapping[str, Refusal]:
    """Return the refused names."""
    return {
        name: Refusal(what=group["what"], fix=group["fix"], inert=inert)
        for group in _table()["names"]
        for name, inert in group["inert"].items()
    }


@cache
def refused_values() -> Mapping[str, Mapping[str, str]]:
    """Return name -> refused value -> what to use instead."""
    values: Mapping[str, Mapping[str, str]] = _table()["values"]
    return values


def drop_refused(
    settings: Iterable[Setting], *, notices: list[str], problems: list[ConfigError]
) -> list[Setting]:
    """Return the settings that are not refused; `problems` gets one line for each of the others.

    A refused name at the value that changes nothing is dropped with a notice. Values are never
    shown: some of these names are tokens.
    """
    kept = []
    for setting in settings:
        refusal = refusals().get(setting.name)
        problem = _refused_value(setting)
        if refusal is not None and _is_inert(setting.raw, refusal.inert):
            notices.append(f"{setting.name} has no effect: {refusal.what} is not supported.")
        elif refusal is not None:
            line = f"{refusal.what} ({setting.name}) is not supported."
            problems.append(ConfigError(line, fix=refusal.fix, where=setting.where))
        elif problem is not None:
            problems.append(problem)
        else:
            kept.append(setting)
    return kept


def _refused_value(setting: Setting) -> ConfigError | None:
    fixes = refused_values().get(setting.name, {})
    if not isinstance(setting.raw, str) or setting.raw.strip().lower() not in fixes:
        return None
    value = setting.raw.strip().lower()
    problem = f"{setting.name} {value} is not supported."
    return ConfigError(problem, fix=fixes[value], where=setting.where)


def _is_inert(raw: Raw, inert: Inert) -> bool:
    if raw is None or (isinstance(raw, str) and raw.strip().lower() in ("", "null", "none", "~")):
        return True
    if inert is None or not isinstance(raw, str):
        return False
    values = [inert] if isinstance(inert, str) else inert
    return any(_canonical(raw) == _canonical(value) for value in values)


def _canonical(text: str) -> str:
    word = text.strip().lower()
    try:
        return f"{float(word):g}"
    except ValueError:
        return {"no": "false", "off": "false", "yes": "true", "on": "true"}.get(word, word)


@cache
def _table() -> Mapping[str, Any]:
    path = Path(__file__).with_name("refused.json")
    table: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return table
