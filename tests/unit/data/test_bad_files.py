"""Damaged and hostile files: refused with a place, or read whole; memory stays bounded."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_cases import INVALID, OPEN, VALID
from text_sets import data_args, text_encoder, write_texts

from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.json_strict import JsonError, parse_json
from llmtuner.data.records import BadRows
from llmtuner.data.sources import list_data_files, read_rows
from llmtuner.data.stream import SampleStream
from llmtuner.extras.errors import DataError

GOOD = b'{"text": "a"}'
REFUSED = [*INVALID, *(case for case, kind in OPEN.items() if kind)]


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def refusal(case: bytes) -> str | None:
    try:
        parse_json(case.decode())
    except JsonError as error:
        return error.kind
    return None


def test_json_values() -> None:
    for case in VALID:
        parse_json(case.decode())
    for case in INVALID:
        with pytest.raises((JsonError, UnicodeDecodeError)):
            parse_json(case.decode())
    for case, kind in OPEN.items():
        assert refusal(case) == kind


@pytest.mark.parametrize("line", [1, 2, 4])
@pytest.mark.parametrize("name", ["x.jsonl", "x"])
def test_what_is_no_json_costs_its_line_only(tmp_path: Path, name: str, line: int) -> None:
    for case in REFUSED if (name, line) != ("x", 1) else ():  # there it may be plain text
        lines = [GOOD] * 3
        lines.insert(line - 1, case)
        path = write(tmp_path, name, b"\n".join(lines))
        with pytest.raises(DataError) as caught:
            list(read_rows(path))
        assert str(caught.value).startswith(f"{path}:{line}:"), case[:40]
        bad_rows = BadRows("skip")
        assert [row.value for row in read_rows(path, bad_rows=bad_rows)] == [{"text": "a"}] * 3
        assert bad_rows.count == 1, case[:40]


def test_valid_json_is_a_row_or_no_row(tmp_path: Path) -> None:
    for case in VALID:
        path = write(tmp_path, "x.jsonl", GOOD + b"\r\n\n" + case)
        assert [row.value for row in read_rows(path)] == [{"text": "a"}, json.loads(case)]


def test_what_is_no_json_costs_the_array(tmp_path: Path) -> None:
    for case in REFUSED:
        path = write(tmp_path, "x.json", b"[" + GOOD + b",\n" + case + b"\n]")
        with pytest.raises(DataError, match=r"x\.json:[234]"):
            list(read_rows(path, bad_rows=BadRows("skip")))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_damaged_tables_never_crash(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": [f"text {n}" for n in range(50)], "n": list(range(50))})
    path = tmp_path / "x"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(path, table.schema) as out:
            out.write_table(table)
    whole, chance = path.read_bytes(), random.Random(0)
    num_refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(8, len(data))] = chance.randrange(256)
        path.write_bytes(data if chance.random() < 0.7 else data[: chance.randrange(9, len(data))])
        try:
            values = [row.value for row in read_rows(path)]
        except DataError as error:
            num_refused += str(error).startswith(f"{path}: ")
        else:
            assert all(isinstance(value, dict | str) for value in values)
    assert num_refused > 20


def test_columns_of_other_types_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": pa.array([0], pa.timestamp("s")), "b": [b"\xff"]}), path)
    (row,) = read_rows(path)
    assert [type(value).__name__ for value in row.value.values()] == ["datetime", "bytes"]  # type: ignore[union-attr]
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    pq.write_table(twice, path)
    with pytest.raises(DataError, match="names a column twice"):
        list(read_rows(path))


@pytest.mark.parametrize("make", ["fifo", "socket", "device", "loop", "dangling"])
def test_only_regular_files_are_opened(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x.jsonl"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": "absent"}[make])
    for read in (read_rows, list_data_files):
        with pytest.raises(DataError, match=r"x\.jsonl: The .*(not a regular|cannot be opened)"):
            read(path)
    if make not in ("loop", "dangling"):
        with pytest.raises(DataError, match="not a regular"):
            list_data_files(tmp_path)


def test_thousands_of_files_are_listed_in_order(tmp_path: Path) -> None:
    names = [f"{number:x}.txt" for number in range(1000)]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in list_data_files(tmp_path)] == sorted(names)


def test_a_line_separator_of_unicode_ends_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    for name, content in {
        "x.jsonl": json.dumps({"text": text}, ensure_ascii=False),
        "x.csv": f"text,answer\n{text},b\n",
        "x.txt": text,
    }.items():
        (row,) = read_rows(write(tmp_path, name, content.encode()))
        assert (row.value if isinstance(row.value, str) else row.value["text"]) == text  # type: ignore[call-overload]


@pytest.mark.parametrize("change", ["rewritten", "gone"])
def test_a_stream_does_not_read_another_file_in_its_second_epoch(
    tmp_path: Path, change: str
) -> None:
    write_texts(tmp_path, a=["x", "y", "z"])
    args = data_args(tmp_path, "a", streaming=True)
    specs = load_dataset_specs(args, ["a"])
    stream = iter(SampleStream(specs, args, encode=text_encoder(), seed=0, packing=False))
    assert [next(stream) for _ in range(3)]
    path = tmp_path / "a.json"
    path.unlink() if change == "gone" else os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"a\.json: .*(has changed|cannot be opened)"):
        next(stream)


READ = """
import resource, sys
from pathlib import Path
from llmtuner.data.records import BadRows
from llmtuner.data.sources import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for row in read_rows(Path(sys.argv[1]), bad_rows=BadRows("skip")):
    del row
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
MEGABYTES = 24 * 2**20


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + b"plain " * (MEGABYTES // 6) + b'"}',
        b'{"text": "' + "中文".encode() * (MEGABYTES // 6) + b'"}',
        b'{"text": "' + b"plain " * (MEGABYTES // 6),
        b"[" * MEGABYTES,
    ],
    ids=["ascii", "chinese", "cut", "deep"],
)
def test_a_huge_line_costs_at_most_three_times_its_size(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, "x.jsonl", GOOD + b"\n" + line + b"\n")
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 3 * path.stat().st_size + 2**20
