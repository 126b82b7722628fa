"""Files to rows: kinds by content, strings byte-identical, faults with their place."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtuner.data.records import BadRows
from llmtuner.data.sources import list_data_files, read_rows
from llmtuner.extras.errors import ConfigError, DataError

TRICKY = [
    "007",
    "2024-01-01",
    "1e5",
    "true",
    "NaN",
    "null",
    "a\u2028b",
    " x ",
    "答案: 是",
    "\u200b",
]
CHINESE = "高血压患者可以口服党参的。党参有降血脂,降血压的作用。"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path, **options: Any) -> list[Any]:
    return [row.value for row in read_rows(path, **options)]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt", "x", "x.csv", "x.data"])
def test_kind_is_found_by_content(tmp_path: Path, name: str) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert values(write(tmp_path, name, lines)) == rows
    assert values(write(tmp_path, name, lines.replace("\n", "\r\n\n  \n") + "\n")) == rows
    assert values(write(tmp_path, name, json.dumps(rows))) == rows
    assert values(write(tmp_path, name, json.dumps(rows, indent=2))) == rows
    assert values(write(tmp_path, name, "\ufeff" + lines)) == rows
    assert values(write(tmp_path, name, json.dumps(rows[0]))) == rows[:1]


def test_pretty_object_and_bare_texts(tmp_path: Path) -> None:
    assert values(write(tmp_path, "x.json", json.dumps({"text": "a"}, indent=1))) == [{"text": "a"}]
    assert values(write(tmp_path, "x.json", '["a", "b"]')) == ["a", "b"]
    assert values(write(tmp_path, "x.jsonl", '"a"\n"b"')) == ["a", "b"]


def test_message_lists(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    line = json.dumps(turns)
    assert values(write(tmp_path, "x.jsonl", f"{line}\n{line}\n")) == [turns, turns]
    assert values(write(tmp_path, "x.jsonl", line)) == [turns]
    assert values(write(tmp_path, "x.json", json.dumps(turns, indent=2))) == [turns]
    assert values(write(tmp_path, "x.json", f"[{line},\n{line},\n{line}]")) == [turns] * 3
    assert values(write(tmp_path, "x.json", f"[\n{line}\n,\n{line}\n]")) == [turns] * 2


def test_text_has_one_sample_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "x.txt", "[1] Smith, 2020\r\n\n \u3000\na\u2028b\n {x}\n")
    assert [(row.value, row.where) for row in read_rows(path)] == [
        ("[1] Smith, 2020", f"{path}:1"),
        ("a\u2028b", f"{path}:4"),
        (" {x}", f"{path}:5"),
    ]
    assert values(write(tmp_path, "x.txt", "[1]\n{{name}} says\n")) == ["[1]", "{{name}} says"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "arrow", "stream", "txt"])
def test_strings_stay_byte_identical(tmp_path: Path, kind: str) -> None:
    rows = [{"question": text, "answer": text} for text in TRICKY]
    path = tmp_path / f"x.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    elif kind in ("csv", "txt"):
        lines = (f'"{row["question"]}","{row["answer"]}"\r\n' for row in rows)
        path.write_bytes(("question,answer\r\n" + "".join(lines)).encode())
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        open_file = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with open_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert values(path) == rows


def test_places(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", '[{"a": "1"},\n {"a": "2"}]')
    assert [row.where for row in read_rows(path)] == [f"{path}#0", f"{path}#1"]
    path = write(tmp_path, "x.csv", 'ask,answer\n"two\nlines",x\n\nq,a\n')
    assert [(row.value["ask"], row.where) for row in read_rows(path)] == [
        ("two\nlines", f"{path}:2"),
        ("q", f"{path}:5"),
    ]


def test_csv_rules(tmp_path: Path) -> None:
    assert values(write(tmp_path, "x.tsv", "a\tb\n1\t2,3\n")) == [{"a": "1", "b": "2,3"}]
    assert values(write(tmp_path, "x.csv", ",a\n0,x\n")) == [{"a": "x"}]
    long = "很" * 200_000
    assert values(write(tmp_path, "x.csv", f"a,b\n{long},y\n")) == [{"a": long, "b": "y"}]
    with pytest.raises(DataError, match=r"x\.csv:3: The record has 3 cells"):
        values(write(tmp_path, "x.csv", "a,b\n1,2\n1,2,3\n"))
    with pytest.raises(DataError, match=r"x\.csv:1: .*twice"):
        values(write(tmp_path, "x.csv", "a,a\n1,2\n"))
    with pytest.raises(DataError, match=r"x\.csv:2: The file is not CSV"):
        values(write(tmp_path, "x.csv", 'a,b\n"1,2\n3,4\n'))
    bad_rows = BadRows("skip")
    path = write(tmp_path, "x.csv", "a,b\n1,2\n1,2,3\n3,4\n")
    assert values(path, bad_rows=bad_rows) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert bad_rows.count == 1


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"a": 1}\n{"a": \n', ":2:6: "),
        ('{"a": 1}\n{"a": 1,}\n', ":2:"),
        ('{"a": 1}\n{"a": 1} {"a": 2}\n', ":2:10: .*more text"),
        ('{"a": 1,}\n{"a": 1}\n', ":1:9: "),
        ('{"a": 1}\n42\n', ":2: The row is no row"),
        ('{"a": 1}\n' + "[" * 100_000 + "\n", ":2:.*nesting"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2:8: The bytes are not valid utf-8"),
        (b'{"a": 1}\n{"a": "\xc0\x80"}\n', ":2:8: "),
        (b'{"a": 1}\n{"a": "x\0"}\n', ":2:9: .*NUL"),
    ],
)
def test_bad_line_raises_or_is_counted(tmp_path: Path, content: str | bytes, place: str) -> None:
    path = write(tmp_path, "x.jsonl", content)
    with pytest.raises(DataError, match=rf"x\.jsonl{place}"):
        values(path)
    bad_rows = BadRows("skip")
    assert values(path, bad_rows=bad_rows) == [{"a": 1}]
    assert bad_rows.count == 1
    assert "x.jsonl:" in bad_rows.examples[0]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"a": 1},\n {"a": 1,}]', ":2:10: "),
        ('[{"a": 1}\n {"a": 1}]', ":2:2: expected"),
        ('[{"a": 1},\n', ":2:1: "),
        ('[{"a": 1}\n] []', ":2:3: .*more text"),
        ('{\n"a": 1\n}\n{\n"a": 1\n}', ":4:1: .*more text"),
    ],
)
def test_broken_json_file_is_always_an_error(tmp_path: Path, content: str, place: str) -> None:
    path = write(tmp_path, "x.json", content)
    place = place.replace(": expected", ": .*expected")
    with pytest.raises(DataError, match=rf"x\.json{place}"):
        values(path, bad_rows=BadRows("skip"))


@pytest.mark.parametrize("content", ["", "\n \r\n\n"])
def test_no_content(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"empty|blank"):
        values(write(tmp_path, "x.jsonl", content))


def test_cut_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match="Parquet file cannot be read"):
        values(path)


def test_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gzip"):
        values(write(tmp_path, "x.jsonl", b"\x1f\x8b\x08\x00rest"))


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="not a regular file"):
            values(path)
    with pytest.raises(DataError, match="cannot be opened"):
        values(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_gb18030_is_recognised(tmp_path: Path, name: str) -> None:
    rows = {"x.jsonl": f'{{"a": "{CHINESE}"}}', "x.json": f'[{{"a":\n "{CHINESE}"}}]'}
    rows |= {"x.csv": f'a,b\r\n"{CHINESE}",x\r\n', "x.txt": CHINESE}
    path = write(tmp_path, name, rows[name].encode("gb18030"))
    (value,) = values(path)
    assert (value if name == "x.txt" else value["a"]) == CHINESE
    assert values(path, encoding="gb18030") == [value]


def test_gb18030_beyond_the_first_megabyte_names_the_flag(tmp_path: Path) -> None:
    path = write(tmp_path, "x.txt", (b"plain" * 20 + b"\n") * 11_000 + CHINESE.encode("gb18030"))
    with pytest.raises(DataError, match=r"x\.txt:11001:1: .*--encoding gb18030"):
        values(path)
    assert values(path, encoding="gb18030")[-1] == CHINESE


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_refused_with_the_flag(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path, "x.txt", "a plain line\nanother\n".encode(codec))
    with pytest.raises(DataError, match="--encoding utf-"):
        values(path)
    assert values(path, encoding=codec) == ["a plain line", "another"]


@pytest.mark.parametrize(
    ("text", "codec"),
    [("Ménière était là, à côté du café.\n" * 3, "latin-1"), (CHINESE * 9, "big5")],
)
def test_other_encodings_are_refused_not_misread(tmp_path: Path, text: str, codec: str) -> None:
    path = write(tmp_path, "x.txt", text.encode(codec, errors="ignore"))
    with pytest.raises(DataError, match=f"--encoding {codec}"):
        values(path)


def test_one_broken_line_does_not_change_the_encoding(tmp_path: Path) -> None:
    good = f"{CHINESE}\n".encode()
    path = write(tmp_path, "x.txt", good * 3 + CHINESE.encode("gb18030") + b"\n" + good)
    bad_rows = BadRows("skip")
    assert values(path, bad_rows=bad_rows) == [CHINESE] * 4
    assert "x.txt:4:1" in bad_rows.examples[0]


def test_unknown_encoding() -> None:
    with pytest.raises(ConfigError, match="Unknown text encoding"):
        values(Path(__file__), encoding="utf-9")


def test_folder_is_read_in_sorted_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.txt", "a.jsonl", "c.parquet", "README.md", ".hidden.txt"):
        write(tmp_path, name, "x")
    assert [path.name for path in list_data_files(tmp_path)] == ["a.jsonl", "b.txt", "c.parquet"]
    assert "README.md" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file"):
        list_data_files(tmp_path / "empty")


def test_saved_dataset_folder(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    write(tmp_path, "state.json", "{}")
    write(tmp_path, "dataset_info.json", "{}")
    (path,) = list_data_files(tmp_path)
    assert values(path) == [{"text": "a"}, {"text": "b"}]
