"""Old spellings: what they are called now, and which of them mean nothing any more."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.raw import Raw, Setting
from llmtuner.hparams.values import to_bool


@dataclass(frozen=True, kw_only=True)
class Aliases:
    """The tables of `aliases.json`.

    Attributes:
        rename: old name -> new name.
        fallback: old name -> new name that wins wherever it is given itself.
        invert: old switch -> new switch of the opposite meaning.
        when_true: old switch -> the name and value that it stands for.
        values: name -> old value -> new value.
        ignored: old name -> why it has no effect.
    """

    rename: Mapping[str, str]
    fallback: Mapping[str, str]
    invert: Mapping[str, str]
    when_true: Mapping[str, Sequence[str]]
    values: Mapping[str, Mapping[str, str]]
    ignored: Mapping[str, str]

    def names(self) -> frozenset[str]:
        """Return every old name."""
        tables = (self.rename, self.fallback, self.invert, self.when_true, self.ignored)
        return frozenset(name for table in tables for name in table)

    def target(self, name: str) -> str:
        """Return the name that takes the value of `name` today."""
        new = {**self.rename, **self.fallback, **self.invert}
        return new.get(name, name)

    def is_switch(self, name: str) -> bool:
        """Return whether `name` is an old switch, so that the bare flag means true."""
        return name in self.invert or name in self.when_true


@cache
def load_aliases() -> Aliases:
    """Read the table."""
    path = Path(__file__).with_name("aliases.json")
    return Aliases(**json.loads(path.read_text(encoding="utf-8")))


def translate(
    settings: Iterable[Setting], *, notices: list[str], problems: list[ConfigError]
) -> list[Setting]:
    """Return the settings under today's names, weakest first.

    Args:
        settings: what the user gave, weakest first.
        notices: gets one line per old name.
        problems: gets old switches with a value that is no truth value.
    """
    table = load_aliases()
    weak: list[Setting] = []
    strong: list[Setting] = []
    for setting in settings:
        if setting.name in table.ignored:
            notices.append(f"{setting.name} has no effect: {table.ignored[setting.name]}.")
            continue
        try:
            new = _translate_one(setting, table, notices)
        except ConfigError as error:
            problems.append(error)
            continue
        if setting.name in table.fallback:
            problems.extend(_check_ratio(setting))
            weak.extend(new)
        else:
            strong.extend(new)
    weak, strong = _fall_back(weak, strong, notices)
    return [*weak, *(_translate_value(setting, table, notices) for setting in strong)]


def _fall_back(
    weak: Sequence[Setting], strong: Sequence[Setting], notices: list[str]
) -> tuple[list[Setting], list[Setting]]:
    """Drop a fallback beside the real option, or the real option where it says zero."""
    kept = list(weak)
    rest = list(strong)
    for name in {setting.name for setting in weak}:
        winners = [setting for setting in rest if setting.name == name]
        if winners and _is_zero(winners[-1].raw):
            rest = [setting for setting in rest if setting.name != name]
        elif winners:
            kept = [setting for setting in kept if setting.name != name]
            notices.append(f"{name} {winners[-1].raw} wins over {', '.join(_old_names(name))}.")
    return kept, rest


def _old_names(name: str) -> list[str]:
    return [old for old, new in load_aliases().fallback.items() if new == name]


def _is_zero(raw: Raw) -> bool:
    try:
        return isinstance(raw, str) and float(raw) == 0
    except ValueError:
        return False


def _translate_one(setting: Setting, table: Aliases, notices: list[str]) -> list[Setting]:
    name = setting.name
    if name in table.when_true:
        target, value = table.when_true[name]
        is_on = _truth(setting)
        notices.append(
            f"{name} is read as {target} {value}." if is_on else f"{name} false has no effect."
        )
        return [replace(setting, name=target, raw=value)] if is_on else []
    if name in table.invert:
        target = table.invert[name]
        notices.append(f"{name} is read as the opposite of {target}.")
        return [replace(setting, name=target, raw="false" if _truth(setting) else "true")]
    target = table.target(name)
    if target != name:
        notices.append(f"{name} is read as {target}.")
    return [replace(setting, name=target)]


def _check_ratio(setting: Setting) -> list[ConfigError]:
    """A ratio from 1 on would be read as a number of steps."""
    try:
        is_ratio = not isinstance(setting.raw, str) or float(setting.raw) < 1
    except ValueError:
        return []
    problem = f"{setting.name} is too large."
    error = ConfigError(problem, got=setting.raw, allowed="below 1", where=setting.where)
    return [] if is_ratio else [error]


def _truth(setting: Setting) -> bool:
    value = to_bool(setting.raw) if isinstance(setting.raw, str) else None
    if value is None:
        problem = f"{setting.name} must be true or false."
        raise ConfigError(problem, got=setting.raw, where=setting.where)
    return value


def _translate_value(setting: Setting, table: Aliases, notices: list[str]) -> Setting:
    known = table.values.get(setting.name, {})
    if not isinstance(setting.raw, str) or setting.raw.lower() not in known:
        return setting
    new = known[setting.raw.lower()]
    notices.append(f"{setting.name} {setting.raw} is read as {new}.")
    return replace(setting, raw=new)
