"""Read YAML without typing anything: scalars stay text, places are remembered."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.raw import Quoted, Raw, Setting

_QUOTED_WORD = re.compile(r"'[^'<]{2,}'")


def compose_text(text: str) -> Raw:
    """Read one YAML value that was written on the command line (`[a, b]`, `{"a": 1}`).

    Raises:
        ConfigError: it is malformed.
    """
    return _to_raw(_compose(text, where=None), where=None)


def read_yaml(text: str, path: Path) -> list[Setting]:
    """Return the settings of a YAML file, in file order.

    Raises:
        ConfigError: it is malformed, no mapping, or has a key twice.
    """
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
