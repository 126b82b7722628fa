"""Split a command line into settings: one file, flags and `key=value`, in order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.aliases import load_aliases
from llmtuner.hparams.options import Option
from llmtuner.hparams.raw import Setting
from llmtuner.hparams.refused import refusals

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_KEY_VALUE = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)


@dataclass
class CommandLine:
    """What a command line says, untyped.

    Attributes:
        config_file: the YAML or JSON file, the weakest source.
        settings: flags and `key=value`, in order.
        problems: words that are neither.
    """

    config_file: Path | None = None
    settings: list[Setting] = field(default_factory=list)
    problems: list[ConfigError] = field(default_factory=list)


def read_command_line(argv: Sequence[str], options: Mapping[str, Option]) -> CommandLine:
    """Split `argv`; `options` tells which flags are switches or take several values."""
    line = CommandLine()
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word.startswith("--") and len(word) > 2:
            position += _read_flag(word, argv[position:], options, line)
        elif pair := _KEY_VALUE.fullmatch(word):
            name = pair.group(1).replace("-", "_")
            line.settings.append(Setting(name, pair.group(2), f"{pair.group(1)}="))
        elif _is_config_file(word) and line.config_file is None:
            line.config_file = Path(word).expanduser()
        else:
            line.problems.append(_stray(word, line, options))
    return line


def _read_flag(
    word: str, rest: Sequence[str], options: Mapping[str, Option], line: CommandLine
) -> int:
    """Add the setting of one flag; return how many of the following words it took."""
    spelled, has_value, value = word[2:].partition("=")
    flag, name = f"--{spelled}", spelled.replace("-", "_")
    if has_value:
        line.settings.append(Setting(name, value, flag))
        return 0
    if _is_negation(name, options):
        line.settings.append(Setting(name.removeprefix("no_"), "false", flag))
        return 0
    following = rest[0] if rest else None
    if _is_switch(name, options):
        is_bare = following is None or _starts_anew(following)
        line.settings.append(Setting(name, "true" if is_bare else following, flag))
        return int(not is_bare)
    option = options.get(load_aliases().target(name))
    is_loose = option is None and name not in refusals()
    if following is None or following.startswith("--") or (is_loose and _starts_anew(following)):
        if option is None:
            line.settings.append(Setting(name, "true", flag))
        else:
            line.problems.append(ConfigError(f"{name} needs a value.", where=flag))
        return 0
    if option is None or not option.kind.is_list:
        line.settings.append(Setting(name, following, flag))
        return 1
    values = _values(rest)
    line.settings.append(Setting(name, values if len(values) > 1 else following, flag))
    return len(values)


def _values(rest: Sequence[str]) -> list[str]:
    """Return the words that a list flag takes: the first, and all up to the next flag or file."""
    values = [rest[0]]
    for word in rest[1:]:
        if _starts_anew(word):
            break
        values.append(word)
    return values


def _starts_anew(word: str) -> bool:
    """Return whether a word stands for itself rather than being the value of a flag."""
    is_pair = _KEY_VALUE.fullmatch(word) is not None
    return is_pair or word.startswith("--") or _is_config_file(word)


def _is_switch(name: str, options: Mapping[str, Option]) -> bool:
    refusal = refusals().get(name)
    if refusal is not None:
        return refusal.inert in ("true", "false")
    if load_aliases().is_switch(name):
        return True
    option = options.get(load_aliases().target(name))
    # flash_attn was a switch before it became a choice.
    return option is not None and (option.kind.is_switch or option.name == "flash_attn")


def _is_negation(name: str, options: Mapping[str, Option]) -> bool:
    if not name.startswith("no_") or name in _all_names(options):
        return False
    positive = name.removeprefix("no_")
    return _is_switch(positive, options) or positive in load_aliases().ignored


def _all_names(options: Mapping[str, Option]) -> frozenset[str]:
    return frozenset(options) | load_aliases().names() | frozenset(refusals())


def _is_config_file(word: str) -> bool:
    return word.lower().endswith(_CONFIG_SUFFIXES)


def _stray(word: str, line: CommandLine, options: Mapping[str, Option]) -> ConfigError:
    if _is_config_file(word):
        problem = f"Only one configuration file can be given, and {line.config_file} is one."
        return ConfigError(problem, got=word)
    before = line.settings[-1] if line.settings else None
    fix = "write --name value, or name=value"
    if before is None:
        return ConfigError("A word belongs to no flag.", got=word, fix=fix)
    option = options.get(load_aliases().target(before.name))
    got = "(hidden)" if option is None or option.secret else word
    problem = f"A word after {before.where} belongs to no flag."
    return ConfigError(problem, got=got, fix=f"{fix}; put a value with spaces in quotes")
