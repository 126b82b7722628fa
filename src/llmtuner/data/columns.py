"""From a data set's own column names and tags to those of a format, and which format it is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from llmtuner.data.conversation import Conversation
from llmtuner.data.formats import FORMATS
from llmtuner.extras.errors import ConfigError, DataError, nearest
from llmtuner.extras.registry import Registry

_ROLE_TAGS = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


@dataclass(frozen=True)
class Format:
    """One entry of the registry of dataset formats.

    Attributes:
        name: its file name without `.py`.
        to_conversation: turns a row with the format's own column names into a conversation.
        matches: whether a row looks like this format; never, for a format without `matches`.
        columns: key of `columns` in dataset_info.json -> own column name.
        tags: key of `tags` -> own message key or role name.
        is_custom: whether it comes from the user's folder.
    """

    name: str
    to_conversation: Callable[[Mapping[str, Any]], Conversation]
    matches: Callable[[Mapping[str, Any]], bool]
    columns: Mapping[str, str]
    tags: Mapping[str, str]
    is_custom: bool


def open_formats(custom_formats: str | None) -> Registry:
    """Return the registry of formats, with the user's own folder in front of it.

    Raises:
        ConfigError: the folder does not exist.
    """
    if custom_formats is None:
        return FORMATS
    folder = Path(custom_formats)
    if not folder.is_dir():
        raise ConfigError(
            "The folder of your own formats does not exist.",
            where="--custom_formats",
            got=custom_formats,
            fix="give a folder with files like my_format.py that define to_conversation",
        )
    return replace(FORMATS, folder=folder)


def load_format(registry: Registry, name: str) -> Format:
    """Import one format.

    Raises:
        ConfigError: it is unknown, or the user's file cannot be imported.
    """
    is_custom = registry.folder is not None and (registry.folder / f"{name}.py").is_file()
    if not is_custom:
        return _format(name, registry.module(name), registry.get(name), is_custom=False)
    try:
        module = registry.module(name)
    except Exception as error:
        problem = f"Your format {name!r} cannot be imported: {type(error).__name__}: {error}."
        raise ConfigError(problem, where=f"{registry.folder}/{name}.py") from error
    if registry.exports not in vars(module):
        problem = f"Your format does not define {registry.exports!r}."
        raise ConfigError(problem, where=f"{registry.folder}/{name}.py")
    return _format(name, module, vars(module)[registry.exports], is_custom=True)


def load_formats(registry: Registry) -> list[Format]:
    """Import every format, the user's own first."""
    formats = [load_format(registry, name) for name in registry.names()]
    return sorted(formats, key=lambda entry: (not entry.is_custom, entry.name))


def pick_format(
    formats: Sequence[Format],
    row: Mapping[str, Any],
    *,
    columns: Mapping[str, str] | None,
    tags: Mapping[str, str] | None,
) -> Format:
    """Return the format that a row's columns show, for a data set that does not name one.

    The user's own formats win. Where several fit, they must read the row alike.

    Raises:
        DataError: none fits, or several do and read the row differently.
    """
    if columns is None and {"chosen", "rejected"} <= set(row):
        raise DataError(
            "The row is preference data.",
            got=list(row),
            allowed="rows with one answer, for stage pt and sft",
            fix="map the question and the good answer with `columns`, or choose another data set",
            kind="preference_data",
        )
    fitting = []
    for entry in formats:
        takes_columns = set(columns or ()) <= set(entry.columns)
        if not takes_columns or (tags and not entry.tags):
            continue
        try:
            if entry.matches(own_row(row, entry, columns=columns, tags=tags)):
                fitting.append(entry)
        except DataError:
            if tags:  # a role that the tags do not name: the format is right, the row is not
                fitting.append(entry)
    custom = [entry for entry in fitting if entry.is_custom]
    fitting = custom or fitting
    if not fitting:
        raise _no_format(row, columns, formats)
    readings = {entry.name: _reading(row, entry, columns, tags) for entry in fitting}
    usable = [entry for entry in fitting if readings[entry.name] is not None]
    if len({readings[entry.name] for entry in usable}) > 1:
        names = [entry.name for entry in usable]
        fix = 'choose one with "formatting" in dataset_info.json'
        problem = "Several formats fit this row."
        raise DataError(problem, got=list(row), allowed=names, fix=fix, kind="unknown_format")
    return (usable or fitting)[0]


def reads_documents(entry: Format, columns: Mapping[str, str] | None) -> bool:
    """Tell whether `columns` names a prompt only, which means documents for pre-training.

    LLaMA-Factory's data sets for pre-training are written so: `{"columns": {"prompt": "text"}}`.
    """
    return set(columns or ()) == {"prompt"} and {"prompt", "response"} <= set(entry.columns)


def own_row(
    row: Mapping[str, Any],
    entry: Format,
    *,
    columns: Mapping[str, str] | None,
    tags: Mapping[str, str] | None,
) -> Mapping[str, Any]:
    """Return the row under the names of the format.

    With `columns`, only the columns they name remain (LLaMA-Factory's all-or-nothing rule);
    without, the row stays as it is.

    Raises:
        DataError: a message has no such key, or a role that `tags` do not name.
    """
    if columns is not None:
        row = {entry.columns[key]: row[name] for key, name in columns.items() if name in row}
    if not tags:
        return row
    names = (entry.columns.get("messages", "messages"), "messages", "conversations")
    column = next((name for name in names if isinstance(row.get(name), list)), None)
    if column is None:
        return row
    return {**row, column: _own_messages(row[column], entry.tags, tags)}


def missing_columns(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return those entries of `columns` whose column the row does not have."""
    return {key: name for key, name in (columns or {}).items() if name not in row}


def nearest_column(name: str, present: Iterable[str]) -> str:
    """Return advice about a column that is not there."""
    present = list(present)
    if "." in name and name.split(".")[0] in present:
        return "fields inside a column cannot be mapped; write it as a column of its own"
    if guess := nearest(name, present):
        return f"did you mean {guess!r}?"
    return "correct `columns` in dataset_info.json"


def _format(name: str, module: ModuleType, convert: Any, *, is_custom: bool) -> Format:
    exports = vars(module)
    return Format(
        name=name,
        to_conversation=convert,
        matches=exports.get("matches", lambda row: False),
        columns=exports.get("COLUMNS", {}),
        tags=exports.get("TAGS", {}),
        is_custom=is_custom,
    )


def _own_messages(
    messages: Sequence[Any], own: Mapping[str, str], tags: Mapping[str, str]
) -> list[Any]:
    role_key, content_key = tags["role_tag"], tags["content_tag"]
    roles = {tags[tag]: own[tag] for tag in _ROLE_TAGS if tag in tags}
    result = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            problem = f"Message {number} is not an object."
            raise DataError(problem, got=message, kind="bad_message_list")
        if role_key not in message:
            problem = f"Message {number} has no {role_key!r}, which tags.role_tag names."
            fix = nearest_column(role_key, message)
            raise DataError(problem, got=list(message), fix=fix, kind="unknown_role")
        role = message[role_key]
        if role not in roles:
            unset = [tag for tag in _ROLE_TAGS if tag not in tags]
            raise DataError(
                f"Message {number} has a role that `tags` do not name.",
                got=role,
                allowed=sorted(roles),
                fix=f"name it with one of {', '.join(unset)}" if unset else "correct `tags`",
                kind="unknown_role",
            )
        mapped = {
            key: value for key, value in message.items() if key not in (role_key, content_key)
        }
        mapped[own["role_tag"]] = roles[role]
        mapped[own["content_tag"]] = message.get(content_key)
        result.append(mapped)
    return result


def _reading(
    row: Mapping[str, Any],
    entry: Format,
    columns: Mapping[str, str] | None,
    tags: Mapping[str, str] | None,
) -> Conversation | None:
    try:
        return entry.to_conversation(own_row(row, entry, columns=columns, tags=tags))
    except Exception:  # the caller converts the row again and reports the error then
        return None


def _no_format(
    row: Mapping[str, Any], columns: Mapping[str, str] | None, formats: Sequence[Format]
) -> DataError:
    if missing := missing_columns(row, columns):
        key, name = next(iter(missing.items()))
        problem = f"Column {name!r}, which columns.{key} names, is not in the row."
        fix = nearest_column(name, row)
        return DataError(problem, got=list(row), fix=fix, kind="missing_column")
    known = {name for entry in formats for name in entry.columns.values()}
    guesses = {name: nearest(name, known - set(row)) for name in row if name not in known}
    meant = [f"{guess!r} instead of {name!r}" for name, guess in guesses.items() if guess]
    hint = f"did you mean {' and '.join(meant)}? Else " if meant else ""
    return DataError(
        "No dataset format fits these columns.",
        got=list(row),
        allowed="instruction + output, question + answer, question + think + answer, messages, "
        "conversations, text",
        fix=f'{hint}say which columns to read with "columns" and "formatting" in '
        "dataset_info.json; data for preference or reward training has no answer to learn and "
        "cannot be used",
        kind="unknown_format",
    )
