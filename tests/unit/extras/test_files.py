"""Files are whole or absent: a crash at any call leaves the old one; NaN never gets into JSON."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtuner.extras import files
from llmtuner.extras.files import (
    follow_umask,
    read_json,
    sha256_of,
    sha256_of_parts,
    sync_folder,
    sync_tree,
    write_json,
    write_text,
)


@pytest.fixture
def umask() -> Iterator[Any]:
    """Return a function that sets the umask until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def fail(*args: object, **kwargs: object) -> None:
    raise OSError(errno.EIO, "injected")


@pytest.mark.parametrize("text", ["", "one line", "高血压\n", "a\r\nb\n", "\u2028 odd"])
def test_text_is_written_as_it_is(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == text.encode("utf-8")


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "x")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


def test_a_written_file_is_alone_in_its_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (os, "fdopen"), (Path, "chmod"), (Path, "replace")],
    ids=["fsync", "open", "chmod", "rename"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="injected"):
        write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_process_that_dies_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    child = os.fork()
    if child == 0:
        Path.replace = lambda self, target: os._exit(9)  # type: ignore[method-assign, assignment]
        write_text(tmp_path / "a.txt", "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "a.txt").read_text() == "old"


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        assert os.fstat(handle).st_size == 3
        calls.append("fsync")
        fsync(handle)

    def note_replace(path: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_text(tmp_path / "a.txt", "new")
    assert calls == ["fsync", "rename"]


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_rights_of_the_umask(
    tmp_path: Path, umask: Any, mask: int, rights: int
) -> None:
    umask(mask)
    write_text(tmp_path / "a.txt", "x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == rights
    assert os.umask(mask) == mask  # and the umask is as it was


def test_private_files_of_a_folder_get_the_rights_of_new_ones(tmp_path: Path, umask: Any) -> None:
    umask(0o022)
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "w").write_text("x")
    (inside / "w").chmod(0o600)
    outside = tmp_path / "secret"
    outside.write_text("x")
    outside.chmod(0o600)
    (inside / "link").symlink_to(outside)
    follow_umask(tmp_path / "a")
    assert stat.S_IMODE((inside / "w").stat().st_mode) == 0o644
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_without_numbers_is_refused_and_the_old_file_stays(
    tmp_path: Path, value: float
) -> None:
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": [value]})
    assert read_json(tmp_path / "a.json") == {"loss": 1.0}


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True]}, [], "高", 0, {"名": "值"}])
def test_json_comes_back_as_it_was(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_is_made_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"名": 1})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "名": 1\n}\n'


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nonsense"])
def test_what_is_no_json_raises_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011 - the callers catch just this
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("size", [0, 1, files._CHUNK_BYTES, files._CHUNK_BYTES + 1])
def test_the_hash_is_that_of_all_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(n % 251 for n in range(size))
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 25])
def test_the_parts_of_a_file_are_hashed_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(files, "_PART_BYTES", 10)
    monkeypatch.setattr(files, "_CHUNK_BYTES", 4)
    content = bytes(range(size))
    (tmp_path / "a").write_bytes(content)
    parts = [content[start : start + 10] for start in range(0, size, 10)]
    assert sha256_of_parts(tmp_path / "a") == [hashlib.sha256(part).hexdigest() for part in parts]


def test_a_tree_is_flushed_file_by_file_and_the_folders_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text(name)
    flushed: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    sync_tree(tmp_path)
    expected = {"", "x", "a", "a/y", "a/b", "a/b/z"}
    assert {str(Path(path).relative_to(tmp_path)) for path in flushed} == {
        name or "." for name in expected
    }
    assert flushed[-1] == str(tmp_path)


def test_a_failed_flush_is_not_hidden_and_leaks_no_handle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="injected"):
        sync_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
