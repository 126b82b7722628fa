"""Names given by `--dataset` to data sets: entries of dataset_info.json, or plain paths."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llmtuner.data.columns import Format, load_formats, open_formats
from llmtuner.data.json_strict import JsonError, line_and_column, parse_json
from llmtuner.data.sources import FileStamp, list_data_files
from llmtuner.extras.env import process_env
from llmtuner.extras.errors import ConfigError, DataError, nearest
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.data import DataArgs

_logger = get_logger(__name__)

_FILE_NAME = "dataset_info.json"
_REFUSED_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_TEXT_KEYS = (
    "file_name", "file_sha1", "hf_hub_url", "ms_hub_url", "subset", "split", "folder", "formatting",
)  # fmt: skip
_OTHER_KEYS = ("columns", "tags", "num_samples", "ranking")
_REFUSED_KEYS = {
    "script_url": "loading scripts run code from the data set and no longer exist in `datasets`; "
    "write the rows to a JSON Lines file and give its file_name",
    "cloud_file_name": "download the file and give its file_name",
    "om_hub_url": "download the data set and give its file_name, or use hf_hub_url or ms_hub_url",
}
_MEDIA = "only text is supported; leave the column out to train on the text alone"
_PREFERENCE = "stage pt and sft learn from one answer; map the good answer as response"
_REFUSED_COLUMNS = {
    "images": _MEDIA,
    "videos": _MEDIA,
    "audios": _MEDIA,
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "kto_tag": _PREFERENCE,
    "role": 'move it to "tags" as role_tag',
    "content": 'move it to "tags" as content_tag',
}
_TAGS = (
    "role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag",
    "system_tag",
)  # fmt: skip


class _EntryError(DataError):
    """dataset_info.json, or one of its entries, is wrong."""

    default_kind = "bad_dataset_info"


@dataclass(frozen=True)
class HubSource:
    """A data set on a hub.

    Attributes:
        hub: "hf" is Hugging Face, "ms" is ModelScope.
        repo_id: its name there.
        subset: configuration name; None is the default one.
        split: such as "train" or "train[:100]".
        folder: folder inside the repository; None reads all of it.
    """

    hub: Literal["hf", "ms"]
    repo_id: str
    subset: str | None = None
    split: str = "train"
    folder: str | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """Where the rows of one data set are and how to read them.

    Attributes:
        name: as given by `--dataset`.
        files: local files in reading order; empty for hub data.
        hub: the hub data set; None for local files.
        formatting: name of the format; None infers it from the columns of each file.
        columns: key -> column name in the rows; None uses the format's own names. Keys that the
            entry leaves out are not read (LLaMA-Factory's all-or-nothing rule).
        tags: the same for the keys and roles inside messages.
        num_samples: how many rows to draw; None takes all.
        custom_digest: sha256 over the user's own formats; None without them.
        max_bad_rows: share of the rows that may be skipped; None leaves it to the reader.
        stamps: of `files`, taken when the name was resolved; a file that no longer has its stamp
            is refused when it is read. Empty takes any file.
    """

    name: str
    files: tuple[Path, ...] = ()
    hub: HubSource | None = None
    formatting: str | None = None
    columns: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    num_samples: int | None = None
    custom_digest: str | None = None
    max_bad_rows: float | None = None
    stamps: tuple[FileStamp, ...] = field(default=(), compare=False)

    def reading_settings(self) -> dict[str, Any]:
        """Return, as JSON values, everything beside the files' bytes that decides the rows."""
        settings = asdict(self)
        for name in ("name", "files", "stamps"):
            del settings[name]
        return settings


def load_dataset_specs(data_args: DataArgs, names: Sequence[str]) -> list[DatasetSpec]:
    """Resolve data set names, without reading any row.

    A name is an entry of `<dataset_dir>/dataset_info.json`, else a file or folder relative to the
    working directory, else one relative to `dataset_dir`. With `dataset_dir` ONLINE every name is
    the id of a data set on a hub.

    Raises:
        ConfigError: a name is unknown; the message lists the known ones.
        DataError: an entry is wrong, or its file is missing.
    """
    registry = open_formats(data_args.custom_formats)
    if data_args.dataset_dir == "ONLINE":
        split = data_args.split or "train"
        return [DatasetSpec(n, hub=HubSource(_default_hub(), n, split=split)) for n in names]
    if data_args.dataset_dir.startswith("REMOTE:"):
        raise ConfigError(
            "A remote dataset_dir is not supported.",
            where="--dataset_dir",
            got=data_args.dataset_dir,
            fix="download its dataset_info.json into a folder and give that folder",
        )
    for name in (*names, data_args.dataset_dir):
        _check_name(name, "--dataset_dir" if name == data_args.dataset_dir else "--dataset")
    folder = Path(data_args.dataset_dir)
    paths = {name: _local_path(name, folder) for name in names}
    needs_info = os.path.exists(folder / _FILE_NAME) or any(path is None for path in paths.values())
    info = _read_info(folder) if needs_info else {}
    specs = []
    for name in names:
        path = paths[name]
        if name in info:
            entry = info[name]
            where = f"{folder / _FILE_NAME}: {name}"
            formats = _formats_for(entry, load_formats(registry), where)
            specs.append(_read_entry(name, entry, folder, formats, where, data_args.split))
        elif path is not None:
            specs.append(DatasetSpec(name, files=tuple(list_data_files(path))))
        else:
            raise _undefined(name, info, folder)
    for spec in specs:
        for path in spec.files:
            _check_name(str(path), spec.name)
    return [
        replace(
            spec,
            custom_digest=_digest(registry.folder),
            max_bad_rows=data_args.max_bad_rows if data_args.on_bad_row == "skip" else None,
            stamps=tuple(FileStamp.of(path) for path in spec.files),
        )
        for spec in specs
    ]


def _digest(folder: Path | None) -> str | None:
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _local_path(name: str, folder: Path) -> Path | None:
    if not name.strip():
        return None
    candidates = (_from_home(name), folder / name)
    return next((path for path in candidates if os.path.exists(path)), None)  # never raises


def _from_home(name: str) -> Path:
    return Path(os.path.expanduser(name))  # leaves the ~ of an unknown user as it is


def _check_name(name: str, where: str) -> None:
    """Refuse names that no report can show: control characters, bytes that are no UTF-8."""
    if found := _REFUSED_CHARACTER.search(name):
        raise _EntryError(
            "A name holds a control character, or bytes that are not UTF-8.",
            where=where,
            got=name,
            allowed=f"printable names, without {found[0]!r}",
            fix="rename it",
        )


def _undefined(name: str, info: Mapping[str, Any], folder: Path) -> ConfigError:
    guess = nearest(name, info)
    return ConfigError(
        f"Undefined data set: it is no entry of {folder / _FILE_NAME}, and no file of that path.",
        where="--dataset",
        got=name,
        allowed=sorted(info) or "none, the file has no entry",
        fix=f"did you mean {guess}?" if guess else "add an entry, or give the path of a data file",
    )


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / _FILE_NAME
    try:
        text = path.read_text(encoding="utf-8-sig")
        info = parse_json(text)
    except OSError as error:
        raise _EntryError(
            f"{_FILE_NAME} cannot be read: {error.strerror}.",
            where=str(path),
            fix=f"give the folder that holds {_FILE_NAME} with --dataset_dir, or give the path of "
            "a data file with --dataset",
        ) from None
    except UnicodeDecodeError:
        raise _EntryError(f"{_FILE_NAME} is not UTF-8.", where=str(path)) from None
    except JsonError as error:
        line, column = line_and_column(text, error.offset)
        problem = f"{_FILE_NAME} is not JSON: {error.reason}."
        raise _EntryError(problem, where=f"{path}:{line}:{column}") from None
    if not isinstance(info, dict):
        problem = f"{_FILE_NAME} is not an object of data sets."
        raise _EntryError(problem, where=str(path), allowed='{"name": {"file_name": …}, …}')
    return info


def _formats_for(entry: Any, formats: list[Format], where: str) -> list[Format]:
    """The formats that an entry may have: the one it names, or all."""
    formatting = entry.get("formatting") if isinstance(entry, dict) else None
    if formatting is None:
        return formats
    named = [entry for entry in formats if entry.name == formatting]
    if not named:
        names = [entry.name for entry in formats]
        guess = nearest(str(formatting), names)
        fix = f"did you mean {guess}?" if guess else None
        raise _EntryError(
            "Unknown dataset format.", where=where, got=formatting, allowed=names, fix=fix
        )
    return named


def _read_entry(
    name: str,
    entry: Any,
    folder: Path,
    formats: Sequence[Format],
    where: str,
    split: str | None,
) -> DatasetSpec:
    if not isinstance(entry, dict):
        raise _EntryError("The entry is not an object.", where=where, got=entry)
    _check_keys(entry, where)
    columns = _read_columns(entry.get("columns"), formats, where)
    tags = _read_tags(entry.get("tags"), formats, where)
    hub = _hub(entry, split)
    files: tuple[Path, ...] = ()
    if hub is None:
        file_name = entry.get("file_name")
        if not file_name:
            problem = "The entry says nowhere where its rows are."
            raise _EntryError(problem, where=where, got=list(entry), fix="add file_name")
        _check_name(file_name, where)
        path = folder / _from_home(file_name)
        files = tuple(list_data_files(path))
        _check_sha1(entry.get("file_sha1"), path, where)
    return DatasetSpec(
        name=name,
        files=files,
        hub=hub,
        formatting=entry.get("formatting"),
        columns=columns,
        tags=tags,
        num_samples=entry.get("num_samples"),
    )


def _check_keys(entry: Mapping[str, Any], where: str) -> None:
    known = (*_TEXT_KEYS, *_OTHER_KEYS)
    for key, value in entry.items():
        if key in _REFUSED_KEYS and value is not None:
            raise _EntryError(f"{key!r} is not supported.", where=where, fix=_REFUSED_KEYS[key])
        if key not in known and key not in _REFUSED_KEYS:
            guess = nearest(key, known)
            fix = f"did you mean {guess}?" if guess else "remove it"
            raise _EntryError("Unknown key.", where=where, got=key, allowed=known, fix=fix)
        if key in _TEXT_KEYS and not isinstance(value, str | None):
            raise _EntryError(f"{key!r} is not a text.", where=where, got=value)
    if entry.get("ranking"):
        raise _EntryError(
            "The data set is for preference training (ranking is true).",
            where=where,
            allowed="data sets with one answer a row, for stage pt and sft",
            fix="choose another data set, or map its good answer with columns and drop ranking",
        )
    count = entry.get("num_samples")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        problem = "'num_samples' is not a count of rows."
        raise _EntryError(problem, where=where, got=count, allowed="whole numbers from 1")


def _default_hub() -> Literal["hf", "ms"]:
    return "ms" if process_env().use_modelscope else "hf"


def _hub(entry: Mapping[str, Any], split: str | None) -> HubSource | None:
    hf_id, ms_id = entry.get("hf_hub_url") or "", entry.get("ms_hub_url") or ""
    if not hf_id and not ms_id:
        return None
    use_ms = bool(ms_id) and (process_env().use_modelscope or not hf_id)
    return HubSource(
        hub="ms" if use_ms else "hf",
        repo_id=ms_id if use_ms else hf_id,
        subset=entry.get("subset"),
        split=entry.get("split") or split or "train",
        folder=entry.get("folder"),
    )


def _check_sha1(expected: str | None, path: Path, where: str) -> None:
    if not expected:
        return
    if path.is_dir():
        _logger.warning("%s: file_sha1 is not checked, %s is a folder", where, path)
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha1").hexdigest()
    if digest != expected.lower():
        _logger.warning("%s: file_sha1 is %s, but %s has %s", where, expected, path, digest)


def _read_columns(given: Any, formats: Sequence[Format], where: str) -> Mapping[str, str] | None:
    if given is None:
        return None
    known = list(dict.fromkeys(key for entry in formats for key in entry.columns))
    columns = _names(given, "columns", (*known, *_REFUSED_COLUMNS), where)
    for key in columns:
        if key in _REFUSED_COLUMNS and key not in known:
            problem = f"columns.{key} is not supported."
            raise _EntryError(problem, where=where, fix=_REFUSED_COLUMNS[key])
    return columns


def _read_tags(given: Any, formats: Sequence[Format], where: str) -> Mapping[str, str] | None:
    if given is None:
        return None
    if not any(entry.tags for entry in formats):
        names = ", ".join(entry.name for entry in formats)
        problem = f"The format {names} has no messages, so it takes no tags."
        raise _EntryError(problem, where=where, fix="remove tags, or correct formatting")
    tags = _names(given, "tags", _TAGS, where)
    missing = [key for key in ("role_tag", "content_tag") if key not in tags]
    if tags and missing:
        raise _EntryError(
            f"tags does not name {' and '.join(missing)}; once there are tags, none has a default.",
            where=where,
            got=dict(tags),
            fix='add them, such as "role_tag": "role", "content_tag": "content"',
        )
    return tags or None


def _names(given: Any, what: str, known: Sequence[str], where: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise _EntryError(f"{what!r} is not an object.", where=where, got=given)
    names = {key: name for key, name in given.items() if name is not None}
    for key, name in names.items():
        if key not in known:
            allowed = [name for name in known if name not in _REFUSED_COLUMNS]
            guess = nearest(key, allowed)
            fix = f"did you mean {guess}?" if guess else "remove it"
            problem = f"Unknown key of {what!r}."
            raise _EntryError(problem, where=where, got=key, allowed=allowed, fix=fix)
        if not isinstance(name, str) or not name:
            raise _EntryError(f"{what}.{key} is not a name.", where=where, got=name)
    return names
