"""From a command line to a checked configuration: read, type, resolve, check."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtuner.extras.errors import ConfigError, ConfigErrors, nearest
from llmtuner.hparams.aliases import load_aliases, translate
from llmtuner.hparams.checks import check
from llmtuner.hparams.command_line import read_command_line
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.deepspeed_file import DeepspeedFile, read_deepspeed_file
from llmtuner.hparams.help import help_text
from llmtuner.hparams.options import GROUPS, OTHER_GROUP, Option, all_options, options_of
from llmtuner.hparams.raw import Setting, read_config_file
from llmtuner.hparams.refused import drop_refused, refusals
from llmtuner.hparams.resolve import resolve
from llmtuner.hparams.values import type_value

__all__ = ["help_text", "parse"]


def parse(command: str, argv: Sequence[str]) -> RunConfig:
    """Return the configuration that a command line asks for.

    Weakest first: defaults, one YAML or JSON file, then flags and `key=value` in order.

    Args:
        command: a key of `COMMAND_GROUPS`, for example "train" or "data audit".
        argv: the words after the command.

    Raises:
        ConfigErrors: every problem there is, at once.
    """
    options = options_of(command)
    notices: list[str] = []
    problems: list[ConfigError] = []
    settings = _read(argv, options, problems)
    settings = drop_refused(settings, notices=notices, problems=problems)
    settings = translate(settings, notices=notices, problems=problems)
    settings = drop_refused(settings, notices=notices, problems=problems)
    values, broken = _type_all(settings, command, problems)
    config = _build(command, values, notices)
    deepspeed = _read_deepspeed(config, problems)
    resolved = resolve(config, deepspeed)
    found = check(resolved, deepspeed)
    # A setting that could not be read has its default for now: what follows from that is noise.
    problems += [error for names, error in found if not broken.intersection(names)]
    if problems:
        raise ConfigErrors(problems)
    return resolved


def _read(
    argv: Sequence[str], options: Mapping[str, Option], problems: list[ConfigError]
) -> list[Setting]:
    line = read_command_line(argv, options)
    problems += line.problems
    if line.config_file is None:
        return line.settings
    try:
        in_file = read_config_file(line.config_file)
        problems += _twins(in_file)
        return [*in_file, *line.settings]
    except ConfigError as error:
        problems.append(error)
        return line.settings


def _twins(settings: Iterable[Setting]) -> Iterator[ConfigError]:
    """Yield the lines of a file that give the same option under two names."""
    seen: dict[str, Setting] = {}
    for setting in settings:
        name = load_aliases().target(setting.name)
        first = seen.setdefault(name, setting)
        is_fallback = {first.name, setting.name} & load_aliases().fallback.keys()
        if first is not setting and not is_fallback:
            problem = f"{setting.name} and {first.name} are the same option."
            yield ConfigError(problem, where=setting.where, fix="keep one of the two")


def _type_all(
    settings: Iterable[Setting], command: str, problems: list[ConfigError]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the typed values, strongest kept, and the names that could not be typed."""
    options = options_of(command)
    values: dict[str, Any] = {}
    broken: set[str] = set()
    for setting in settings:
        option = options.get(setting.name)
        if option is None:
            problems.append(_unknown(setting, command))
            continue
        try:
            values[setting.name] = type_value(setting.raw, option, where=setting.where)
        except ConfigError as error:
            problems.append(error)
            broken.add(setting.name)
    return values, frozenset(broken)


def _unknown(setting: Setting, command: str) -> ConfigError:
    if setting.name in all_options():
        problem = f"{setting.name} is an option of another command, not of {command}."
        return ConfigError(problem, where=setting.where, fix="leave it out")
    known = [*options_of(command), *load_aliases().names(), *refusals()]
    guess = nearest(setting.name, known)
    fix = f"did you mean {guess}?" if guess else f"see llmtuner {command} --help"
    return ConfigError(f"Unknown option {setting.name}.", where=setting.where, fix=fix)


def _build(command: str, values: Mapping[str, Any], notices: Sequence[str]) -> RunConfig:
    options = options_of(command)
    groups: dict[str, dict[str, Any]] = {group: {} for group in (*GROUPS, OTHER_GROUP)}
    for name, value in values.items():
        groups[options[name].group][name] = value
    groups["train"][OTHER_GROUP] = groups.pop(OTHER_GROUP)
    objects = {group: GROUPS[group](**given) for group, given in groups.items()}
    config = RunConfig(command=command, given=frozenset(values), notices=tuple(_unique(notices)))
    return replace(config, **objects)


def _read_deepspeed(config: RunConfig, problems: list[ConfigError]) -> DeepspeedFile | None:
    # The selfcheck runs without DeepSpeed, whatever the training uses.
    if config.train.deepspeed is None or config.command == "selfcheck":
        return None
    try:
        return read_deepspeed_file(config.train.deepspeed)
    except ConfigError as error:
        problems.append(error)
        return None


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
