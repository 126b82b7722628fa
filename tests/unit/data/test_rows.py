"""A data set's rows to conversations: mapping, inference, bad rows, samples, hub, own formats."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtuner.data.conversation import Conversation
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.records import BadRows
from llmtuner.data.rows import load_conversations
from llmtuner.extras.errors import ConfigError, DataError, LlmtunerError
from llmtuner.hparams.data import DataArgs

QA = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(6)]


class Loader:
    """Writes rows and an entry for them, and loads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bad_rows = BadRows()

    def __call__(
        self, rows: list[Any] | str, entry: dict[str, Any] | None = None, **options: Any
    ) -> list[Conversation]:
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        (self.folder / "x.jsonl").write_text(text, encoding="utf-8")
        info = {"x": {"file_name": "x.jsonl", **(entry or {})}}
        (self.folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        args = DataArgs(dataset_dir=str(self.folder), **options)
        self.bad_rows = BadRows(args.on_bad_row)
        (spec,) = load_dataset_specs(args, ["x"])
        return list(load_conversations(spec, data_args=args, bad_rows=self.bad_rows))


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def told(conversations: list[Conversation]) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in one.messages] for one in conversations]


def test_every_row_keeps_its_place(load: Loader) -> None:
    sources = [one.source for one in load(QA)]
    assert sources == [f"{load.folder / 'x.jsonl'}:{line}" for line in range(1, 7)]


def test_columns_are_all_or_nothing(load: Loader) -> None:
    rows = [{"q": "q", "a": "a", "system": "not mapped, not read"}]
    columns = {"prompt": "q", "response": "a"}
    assert told(load(rows, {"columns": columns})) == [[("user", "q"), ("assistant", "a")]]
    mapped = load(rows, {"columns": columns | {"system": "system"}, "formatting": "alpaca"})
    assert told(mapped)[0][0] == ("system", "not mapped, not read")


def test_a_prompt_alone_is_a_document(load: Loader) -> None:
    for formatting in ({}, {"formatting": "alpaca"}):
        documents = load([{"body": "t"}], {"columns": {"prompt": "body"}} | formatting)
        assert told(documents) == [[("text", "t")]]
    assert told(load([{"body": "t"}], {"columns": {"text": "body"}})) == [[("text", "t")]]


def test_plain_lines_are_documents(load: Loader) -> None:
    (load.folder / "x.txt").write_text("one\n\ntwo\n")
    entry = {"file_name": "x.txt", "columns": {"prompt": "text"}}
    assert told(load(QA, entry)) == [[("text", "one")], [("text", "two")]]


def test_tags_without_formatting(load: Loader) -> None:
    messages = [{"who": "patient", "said": "q"}, {"who": "doctor", "said": "a"}]
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "patient"}
    tags["assistant_tag"] = "doctor"
    entry = {"columns": {"messages": "chat"}, "tags": tags}
    expected = [[("user", "q"), ("assistant", "a")]]
    for formatting in ({}, {"formatting": "sharegpt"}, {"formatting": "openai"}):
        assert told(load([{"chat": messages}], entry | formatting)) == expected
    assert told(load([{"conversations": messages}], {"tags": tags})) == expected
    assert told(load([messages, messages], entry)) == expected * 2
    bad = [{"who": "nurse", "said": "n"}, *messages]
    with pytest.raises(DataError, match=r"x\.jsonl:1: Message 1 has a role.*'nurse'.*system_tag"):
        load([{"chat": bad}], entry)
    with pytest.raises(DataError, match=r"Message 1 has no 'who'.*did you mean 'whom'"):
        load([{"chat": [{"whom": "patient", "said": "q"}]}], entry)


def test_wrong_column_names_the_nearest(load: Loader) -> None:
    rows = [{"instruction": "q", "output": "a"}]
    columns = {"prompt": "instrction", "response": "output"}
    for formatting in ({}, {"formatting": "alpaca"}):
        with pytest.raises(DataError, match=r"x\.jsonl:1: .*'instrction'.*mean 'instruction'"):
            load(rows, {"columns": columns} | formatting)
    for name, advice in {
        "INSTRUCTION": "mean 'instruction'",
        "meta.q": "fields inside a column cannot be mapped",
        "zzz": "correct `columns`",
    }.items():
        wrong = {"prompt": name, "response": "output"}
        with pytest.raises(
            DataError, match=rf"'{name}'.*Got: \['instruction', .*{advice}"
        ) as caught:
            load([rows[0] | {"meta": {"q": "q"}}], {"columns": wrong})
        assert caught.value.kind == "missing_column"
    with pytest.raises(DataError, match=r"mean 'instruction' instead of 'instrction'\?"):
        load([{"instrction": "q", "output": "a"}])
    optional = {"prompt": "instruction", "response": "output", "system": "sytem"}
    with pytest.raises(DataError, match=r"'sytem', which columns\.system names, is in no row"):
        load(rows, {"columns": optional})
    mixed = [*rows, rows[0] | {"sytem": "s"}]
    assert len(load(mixed, {"columns": optional})) == 2


def test_bad_rows_raise_with_their_place(load: Loader) -> None:
    rows = [*QA[:3], {"question": "q", "answer": 42}, *QA[3:]]
    with pytest.raises(DataError, match=r"x\.jsonl:4: Column 'answer' is not a text. Got: 42"):
        load(rows)


def test_conversation_rules_hold_for_every_row(load: Loader) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": turns}, {"conversations": [*turns, turns[0]]}]
    with pytest.raises(DataError, match=r"x\.jsonl:2: The conversation ends with a user turn"):
        load(rows)
    assert len(load(rows, on_bad_row="skip")) == 1


def test_bad_rows_are_skipped_and_counted(load: Loader) -> None:
    texts = ["42", "true", "null", '{"a":1}', "007"]
    rows = [{"question": "q", "answer": text} for text in texts]
    rows.insert(2, {"question": "q", "answer": None})  # type: ignore[dict-item]
    lines = "\n".join(map(json.dumps, rows)) + '\n{"question": \n'
    conversations = load(lines, on_bad_row="skip")
    assert [one.messages[1].content for one in conversations] == texts
    assert load.bad_rows.count == 2
    assert "x.jsonl:3: " in load.bad_rows.examples[0]
    assert "x.jsonl:7:13: " in load.bad_rows.examples[1]


def test_every_refused_row_reaches_the_listener(load: Loader) -> None:
    heard: list[DataError] = []
    load(QA)
    (load.folder / "x.jsonl").write_text('{"question": "", "answer": "a"}\n' * 30 + "{\n")
    (spec,) = load_dataset_specs(DataArgs(dataset_dir=str(load.folder)), ["x"])
    for bad_rows in (BadRows("skip", on_bad=heard.append), BadRows(on_bad=heard.append)):
        with pytest.raises(DataError):
            list(load_conversations(spec, data_args=DataArgs(), bad_rows=bad_rows))
    assert [error.where for error in heard] == [
        *(f"{load.folder / 'x.jsonl'}:{line}" for line in range(1, 31)),
        f"{load.folder / 'x.jsonl'}:31:2",
        f"{load.folder / 'x.jsonl'}:1",
    ]


@pytest.mark.parametrize(
    ("num_bad", "num_rows", "share", "is_refused"),
    [
        (3, 300, 0.01, False),
        (4, 300, 0.01, True),
        (2, 4, 0.01, False),  # two are spared in a small set
        (2, 3, 0.01, True),  # unless they are most of it
        (3, 50, 0.01, True),
        (3, 50, 0.06, False),
        (49, 50, 1.0, False),
        (1, 1000, 0.0, True),
    ],
)
def test_too_many_bad_rows_stop_the_run(
    load: Loader, num_bad: int, num_rows: int, share: float, is_refused: bool
) -> None:
    rows = [{"question": "", "answer": "a"}] * num_bad + QA[:1] * (num_rows - num_bad)
    if not is_refused:
        assert len(load(rows, on_bad_row="skip", max_bad_rows=share)) == num_rows - num_bad
        return
    told = rf"x: {num_bad} of {num_rows} rows are bad \(missing_column: {num_bad}\): .*x\.jsonl:1: "
    with pytest.raises(DataError, match=told) as caught:
        load(rows, on_bad_row="skip", max_bad_rows=share)
    assert caught.value.kind == "too_many_bad_rows"


@pytest.mark.parametrize("change", ["grown", "shrunk", "rewritten", "gone"])
def test_a_file_that_changes_is_refused(load: Loader, change: str) -> None:
    load(QA)
    path = load.folder / "x.jsonl"
    (spec,) = load_dataset_specs(DataArgs(dataset_dir=str(load.folder)), ["x"])

    def read() -> list[Conversation]:
        rows = load_conversations(spec, data_args=DataArgs(), bad_rows=BadRows("skip"))
        one = [next(rows)]
        if len(texts) == 1:
            texts.append("read")
            path.unlink() if change == "gone" else path.write_text(texts[0])
            if change == "rewritten":  # the clock of the file system may be coarse
                os.utime(path, (1, 1))
        return one + list(rows)

    whole = path.read_text()
    line = json.dumps(QA[0])
    texts = [{"grown": whole + "\n" + line, "shrunk": line, "rewritten": whole, "gone": ""}[change]]
    said = "cannot be opened" if change == "gone" else "has changed since the run began"
    for _ in range(2):  # while it is read, and when it is read again
        with pytest.raises(DataError, match=rf"x\.jsonl: .*{said}"):
            read()


@pytest.mark.parametrize("content", [None, 42, 1.5, True, ["a"], {"text": "a"}, [["a"]], ""])
def test_one_bad_row_leaves_its_neighbours_as_they_are(load: Loader, content: object) -> None:
    texts = ["42", "true", "null", '{"a":1}', "[]", "007", "1e5", "2024-01-01", "NaN", "x"] * 20
    rows: list[dict[str, Any]] = [{"question": "q", "answer": text} for text in texts]
    rows.insert(101, {"question": "q", "answer": content})
    for columns in ({}, {"date": "2024-01-01", "created_at": "1e5", "type": "a", "message": "b"}):
        read = load([row | columns for row in rows], on_bad_row="skip")
        assert [one.messages[1].content for one in read] == texts
        assert read[101].source.endswith("x.jsonl:103")
        assert "x.jsonl:102: " in load.bad_rows.examples[0]


def test_only_twenty_bad_rows_are_listed(load: Loader) -> None:
    load([{"question": "", "answer": "a"}] * 30 + QA, on_bad_row="skip", max_bad_rows=1)
    assert (load.bad_rows.count, len(load.bad_rows.examples)) == (30, 20)


def test_no_rows_asked_for(load: Loader) -> None:
    with pytest.raises(DataError, match=r"x: 0 usable rows of 0: max_samples is 0"):
        load(QA, max_samples=0)


@pytest.mark.parametrize("text", ["[]", '{"question": "", "answer": "a"}\n'])
def test_no_usable_row(load: Loader, text: str) -> None:
    with pytest.raises(DataError, match=r"0 usable rows of [01]: "):
        load(text, on_bad_row="skip")


def test_a_first_bad_row_does_not_decide_the_format(load: Loader) -> None:
    assert len(load([{"oops": 1}, *QA], on_bad_row="skip")) == 6


def test_files_of_a_folder_may_differ(load: Loader) -> None:
    folder = load.folder / "many"
    folder.mkdir()
    (folder / "b.csv").write_text("ask,answer\nq,a\n")
    (folder / "a.json").write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    conversations = load(QA, {"file_name": "many"})
    assert [one.source for one in conversations] == [f"{folder}/a.json#0", f"{folder}/b.csv:2"]


def test_max_samples_takes_the_first_and_reads_no_further(load: Loader) -> None:
    broken = "\n".join(map(json.dumps, QA)) + "\noops"
    assert len(load(broken, max_samples=6)) == 6
    with pytest.raises(DataError, match=":7:1"):
        load(broken, max_samples=7)


def test_num_samples_draws_by_seed(load: Loader) -> None:
    drawn = told(load(QA, {"num_samples": 3}))
    assert drawn == told(load(QA, {"num_samples": 3}))
    assert len(drawn) == 3
    assert drawn != told(load(QA))[:3]
    many = told(load(QA, {"num_samples": 20}))
    assert len(many) == 20
    assert sorted({str(row) for row in many}) == sorted(str(row) for row in told(load(QA)))
    assert len(load(QA, {"num_samples": 5}, max_samples=2)) == 2


def test_own_format(load: Loader, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "letters.py").write_text(
        "from llmtuner.data.conversation import Conversation, Message\n"
        "COLUMNS = {'prompt': 'subject', 'response': 'body'}\n"
        "def matches(row):\n    return {'subject', 'body'} <= set(row)\n"
        "def to_conversation(row):\n"
        "    reply = Message('assistant', row['body'], train=True)\n"
        "    return Conversation((Message('user', row['subject']), reply))\n"
    )
    rows = [{"subject": "s", "body": "b"}]
    expected = [[("user", "s"), ("assistant", "b")]]
    assert told(load(rows, custom_formats=str(own))) == expected
    assert told(load(rows, {"formatting": "letters"}, custom_formats=str(own))) == expected
    mapped = {"formatting": "letters", "columns": {"prompt": "q", "response": "a"}}
    assert told(load([{"q": "s", "a": "b"}], mapped, custom_formats=str(own))) == expected
    with pytest.raises(
        DataError, match=r"x\.jsonl:1: The format 'letters' failed: KeyError: 'body'"
    ):
        load([{"subject": "s"}], {"formatting": "letters"}, custom_formats=str(own))
    (own / "letters.py").write_text("def to_conversation(row):\n    return dict(row)\n")
    with pytest.raises(DataError, match="did not return a Conversation"):
        load(rows, {"formatting": "letters"}, custom_formats=str(own))
    (own / "letters.py").write_text("import absent_library\n")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        load(rows, {"formatting": "letters"}, custom_formats=str(own))


def test_own_format_wins_over_a_built_in_one(load: Loader, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "quiz.py").write_text(
        "from llmtuner.data.conversation import Conversation, Message\n"
        "def matches(row):\n    return 'question' in row\n"
        "def to_conversation(row):\n"
        "    return Conversation((Message('text', row['question'], train=True),))\n"
    )
    assert told(load(QA[:1])) == [[("user", "q0"), ("assistant", "a0")]]
    assert told(load(QA[:1], custom_formats=str(own))) == [[("text", "q0")]]


def test_own_formats_must_agree_or_be_named(load: Loader, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from llmtuner.data.conversation import Conversation, Message\n"
            "def matches(row):\n    return True\n"
            "def to_conversation(row):\n"
            f"    return Conversation((Message('text', '{name}', train=True),))\n"
        )
    with pytest.raises(DataError, match=r"Several formats fit this row.*one, two"):
        load(QA, custom_formats=str(tmp_path))


def test_hub_rows(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(repo_id: str, **options: Any) -> list[dict[str, str]]:
        calls.append((repo_id, options))
        return QA

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    entry = {"hf_hub_url": "some/name", "subset": "zh", "folder": "d", "columns": None}
    conversations = load([], entry, streaming=True, max_samples=2)
    assert [one.source for one in conversations] == ["some/name#0", "some/name#1"]
    options = {"name": "zh", "data_dir": "d", "split": "train", "streaming": True}
    assert calls == [("some/name", options)]


def test_hub_without_network_is_one_message(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repo_id: str, **options: Any) -> None:
        raise ConnectionError("no route to the hub\nand a long tail")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"some/name: .*Hugging Face hub: no route to the hub Fix"):
        load([], {"hf_hub_url": "some/name"})
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(LlmtunerError, match=r"modelscope.*llmtuner\[modelscope\]"):
        load([], {"ms_hub_url": "some/name"})
