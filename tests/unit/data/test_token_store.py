"""A store of tokens is built once, by one process, and again when it does not verify."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pytest
from filelock import FileLock, Timeout

from llmtuner.data import token_store
from llmtuner.data.render import Encoded, Sample
from llmtuner.data.token_store import behind, content_key, load_or_build, token_batch

Row = dict[str, Any]


def token_row(number: int) -> Row:
    """A stored row; its second token is trained, and where the number is even, its third."""
    ids = list(range(number, number + 2 + number % 2))
    place = f"f.json#{number}"
    labels = [-100, *ids[1:]]
    return {"input_ids": ids, "labels": labels, "source": place, "row": number, "digest": -number}


def batch_of(row: Row) -> pa.RecordBatch:
    sample = Sample(row["input_ids"], ((1, len(row["input_ids"])),), row["source"])
    return behind(token_batch([Encoded((sample,))], [row["digest"]]), row["row"])


ROWS = [token_row(number) for number in range(5)]


class Builder:
    """Yields rows, and counts how often it was asked to."""

    def __init__(self, rows: list[Row] = ROWS, fails_at: int | None = None) -> None:
        self.rows = rows
        self.fails_at = fails_at
        self.calls = 0

    def __call__(self, counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        self.calls += 1
        for number, row in enumerate(self.rows):
            if number == self.fails_at:
                raise ValueError("a bad row")
            yield batch_of(row)
        counts["rows"] = len(self.rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tokens" / "key"


def rows_of(folder: Path, builder: Builder, *, rebuild: bool = False) -> list[Row]:
    tokens = load_or_build(folder, build=builder, rebuild=rebuild)
    assert tokens.counts == {"rows": len(builder.rows)}
    return list(tokens.dataset)


def test_rows_come_back_as_they_were_made(folder: Path) -> None:
    assert rows_of(folder, Builder()) == ROWS


def test_a_row_of_several_samples_or_none_keeps_its_number() -> None:
    whole = Sample([1, 2, 3], ((0, 3),), "a:1")
    answers = Sample([4, 5, 6, 7], ((1, 2), (3, 4)), "a:3")
    rows = [Encoded((whole, whole)), Encoded(()), Encoded((answers,))]
    batch = behind(token_batch(rows, [7, 8, 9]), 10)
    assert batch.to_pydict() == {
        "input_ids": [[1, 2, 3], [1, 2, 3], [4, 5, 6, 7]],
        "labels": [[1, 2, 3], [1, 2, 3], [-100, 5, -100, 7]],
        "source": ["a:1", "a:1", "a:3"],
        "row": [10, 10, 12],
        "digest": [7, 7, 9],
    }
    assert [sample.labels for row in rows for sample in row.samples] == batch["labels"].to_pylist()
    assert token_batch([Encoded(())]).num_rows == 0


def test_a_store_is_built_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder = Builder()
    with caplog.at_level(logging.INFO):
        assert rows_of(folder, builder) == rows_of(folder, builder) == ROWS
    assert builder.calls == 1
    assert f"found in {folder}" in caplog.text


def test_a_store_is_built_again_when_asked(folder: Path) -> None:
    builder = Builder()
    rows_of(folder, builder)
    builder.rows = ROWS[:2]
    assert rows_of(folder, builder, rebuild=True) == ROWS[:2]
    assert builder.calls == 2
    assert sorted(os.listdir(folder)) == ["counts.json", "digest.json", "rows.arrow"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["rows.arrow", "counts.json", "digest.json"])
@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_a_damaged_store_is_built_again(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    builder = Builder()
    rows_of(folder, builder)
    if (name, damage) in (("counts.json", cut), ("digest.json", cut)):
        cut(folder / name)  # the first byte is only the line feed at the end
    damage(folder / name)
    if (name, damage) == ("counts.json", flip):
        (folder / name).write_bytes(b'{"rows"')
    assert rows_of(folder, builder) == ROWS
    assert builder.calls == 2
    if damage is not Path.unlink:
        (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "damaged" in record.getMessage()


def test_counts_that_are_json_but_not_ours_are_noticed(folder: Path) -> None:
    builder = Builder()
    rows_of(folder, builder)
    (folder / "counts.json").write_text("{}")
    load_or_build(folder, build=builder, rebuild=False)
    assert builder.calls == 2


def test_an_error_while_building_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match="a bad row"):
        load_or_build(folder, build=Builder(fails_at=3), rebuild=False)
    assert [path for path in folder.parent.iterdir() if path.suffix != ".lock"] == []
    assert rows_of(folder, Builder()) == ROWS


def test_an_error_while_building_again_keeps_the_old_store(folder: Path) -> None:
    rows_of(folder, Builder())
    with pytest.raises(ValueError, match="a bad row"):
        load_or_build(folder, build=Builder(fails_at=3), rebuild=True)
    unused = Builder()
    assert rows_of(folder, unused) == ROWS
    assert unused.calls == 0


def in_child(action: Callable[[], object]) -> int:
    """Start a forked process; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_dies_while_building_leaves_no_store(folder: Path) -> None:
    def die(counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        yield batch_of(ROWS[0])
        os._exit(9)

    child = in_child(lambda: load_or_build(folder, build=die, rebuild=False))
    assert exit_code(child) == 9
    assert not folder.exists()
    assert rows_of(folder, Builder()) == ROWS  # the lock of the dead is free


def test_a_second_process_waits_for_the_first_and_builds_nothing(folder: Path) -> None:
    started_read, started_write = os.pipe()
    go_read, go_write = os.pipe()

    def slowly(counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        os.write(started_write, b"1")
        os.read(go_read, 1)  # held up until the second process has been started
        yield from Builder()(counts)

    def never(counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        os._exit(3)
        yield

    first = in_child(lambda: load_or_build(folder, build=slowly, rebuild=False))
    os.read(started_read, 1)  # the first one is building, so it has the lock
    state_read, state_write = os.pipe()

    class TellingLock(FileLock):
        """Tells whether the lock is free before it waits."""

        def __enter__(self) -> Self:
            try:
                self.acquire(timeout=0)
            except Timeout:
                os.write(state_write, b"waits")
                self.acquire()
            return self

    def build_second() -> None:
        token_store.FileLock = TellingLock  # type: ignore[misc]
        load_or_build(folder, build=never, rebuild=False)

    second = in_child(build_second)
    os.close(state_write)
    state = os.read(state_read, 5)  # nothing, if the second one ends without waiting
    os.write(go_write, b"1")
    assert (state, exit_code(first), exit_code(second)) == (b"waits", 0, 0)
    unused = Builder()
    assert rows_of(folder, unused) == ROWS
    assert unused.calls == 0


def test_a_store_that_is_a_copy_works(folder: Path, tmp_path: Path) -> None:
    rows_of(folder, Builder())
    shutil.copytree(folder, tmp_path / "copy")
    unused = Builder()
    assert rows_of(tmp_path / "copy", unused) == ROWS
    assert unused.calls == 0


PARTS: dict[str, Any] = {"code": 1, "files": ["ab"], "encoder": {"cutoff_len": 8, "名": None}}


def test_the_key_does_not_depend_on_the_order_of_the_settings() -> None:
    assert content_key(PARTS) == content_key(dict(reversed(PARTS.items())))
    assert content_key(PARTS) == content_key(json.loads(json.dumps(PARTS)))


@pytest.mark.parametrize(
    "change",
    [
        {"code": 2},
        {"files": ["ac"]},
        {"files": ["ab", "ab"]},
        {"files": []},
        {"encoder": {"cutoff_len": 9, "名": None}},
        {"encoder": {"cutoff_len": 8}},
        {"more": None},
    ],
    ids=str,
)
def test_the_key_changes_with_every_setting(change: dict[str, Any]) -> None:
    assert content_key(PARTS | change) != content_key(PARTS)
    assert content_key(PARTS).isalnum()
