"""Files that are either whole or absent: atomic writes, hashes, durable directories."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from llmtuner.extras.env import num_usable_cores
from llmtuner.extras.logs import get_logger

logger = get_logger(__name__)

_CHUNK_BYTES = 1 << 20
_PART_BYTES = 64 << 20


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_parts(path: Path) -> list[str]:
    """Return the sha256 of each 64 MiB of a file; several cores share the work.

    Together they tell as surely as `sha256_of` whether a file is the same, in less time.
    """
    starts = range(0, path.stat().st_size, _PART_BYTES)
    with ThreadPoolExecutor(num_usable_cores()) as pool:  # hashing leaves Python to the others
        return list(pool.map(partial(_sha256_of_part, path), starts))


def _sha256_of_part(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = _PART_BYTES
        while chunk := file.read(min(left, _CHUNK_BYTES)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    staged = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are meant to be read by the user's group as usual.
        staged.chmod(0o666 & ~_umask())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` for JSON, which has no NaN: null instead, and `not_finite` names them."""
    lost = [name for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    found = {**values, **dict.fromkeys(lost)}
    return {**found, "not_finite": lost} if lost else found


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file, with or without a byte order mark."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` the rights of new files; safetensors makes private ones."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_umask())


def staging_folder(target: Path) -> Path:
    """Return where this process writes what becomes `target` by a rename when it is whole."""
    return target.with_name(f"{_staging_prefix(target)}{os.getpid()}")


def remove_abandoned(target: Path) -> None:
    """Delete the staging folders of `target` whose processes were killed."""
    prefix = _staging_prefix(target)
    if not target.parent.is_dir():
        return
    for folder in [one for one in target.parent.iterdir() if one.name.startswith(prefix)]:
        process = folder.name.removeprefix(prefix)
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            logger.info("Deleting %s: the command that wrote it was killed.", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _staging_prefix(target: Path) -> str:
    return f".{target.name}.staging-"


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def sync_folder(folder: Path) -> None:
    """Flush one folder's entries (after a rename inside it) to the disk."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
