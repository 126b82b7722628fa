"""dataset_info.json: every key, every mistake one clear message."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmtuner.data.dataset_info import DatasetSpec, HubSource, load_dataset_specs
from llmtuner.extras.errors import ConfigError, DataError
from llmtuner.hparams.data import DataArgs


def specs_of(folder: Path, info: object, *names: str, **options: Any) -> list[DatasetSpec]:
    if info is not None:
        text = info if isinstance(info, str) else json.dumps(info, ensure_ascii=False)
        (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    (folder / "a.json").write_text('[{"text": "x"}]')
    return load_dataset_specs(DataArgs(dataset_dir=str(folder), **options), names)


def spec_of(folder: Path, **entry: Any) -> DatasetSpec:
    return specs_of(folder, {"a": {"file_name": "a.json", **entry}}, "a")[0]


def test_file_entry(tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path,
        formatting="sharegpt",
        columns={"messages": "chat", "system": None},
        tags={"role_tag": "role", "content_tag": "content"},
        num_samples=3,
        ranking=False,
        subset="zh",
    )
    assert spec == DatasetSpec(
        name="a",
        files=(tmp_path / "a.json",),
        formatting="sharegpt",
        columns={"messages": "chat"},
        tags={"role_tag": "role", "content_tag": "content"},
        num_samples=3,
    )
    assert json.loads(json.dumps(spec.reading_settings()))["columns"] == {"messages": "chat"}


def test_folder_entry_and_chinese_names(tmp_path: Path) -> None:
    folder = tmp_path / "数据"
    folder.mkdir()
    (folder / "2.txt").write_text("x")
    (folder / "1.txt").write_text("x")
    (spec,) = specs_of(tmp_path, {"中医": {"file_name": "数据"}}, "中医")
    assert spec.files == (folder / "1.txt", folder / "2.txt")


def test_plain_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "near.jsonl").write_text('{"text": "x"}')
    (tmp_path / "data" / "far.jsonl").write_text('{"text": "x"}')
    names = ("near.jsonl", "far.jsonl", str(tmp_path / "near.jsonl"))
    specs = load_dataset_specs(DataArgs(dataset_dir="data"), names)
    files = [spec.files for spec in specs]
    near = tmp_path / "near.jsonl"
    assert files == [(Path("near.jsonl"),), (Path("data/far.jsonl"),), (near,)]


def test_an_entry_comes_before_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("something else")
    assert spec_of(tmp_path).files == (tmp_path / "a.json",)


def test_undefined_name_lists_the_known_ones(tmp_path: Path) -> None:
    info = {"identity": {"file_name": "a.json"}, "medical": {"file_name": "absent.json"}}
    with pytest.raises(ConfigError, match=r"Got: 'identty'.*identity, medical.*mean identity"):
        specs_of(tmp_path, info, "identty")
    assert specs_of(tmp_path, info, "identity")[0].name == "identity"


def test_no_dataset_info(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_info\.json cannot be read.*--dataset_dir"):
        specs_of(tmp_path, None, "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {},}', r"dataset_info\.json:1:10: .*not JSON"),
        ('{"a": {},\n "a": {}}', "'a' occurs twice"),
        ("[]", "not an object"),
        ('{"a": []}', "a: The entry is not an object"),
    ],
)
def test_broken_dataset_info(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        specs_of(tmp_path, text, "a")


def test_dataset_info_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert specs_of(tmp_path, '\ufeff{"a": {"file_name": "a.json"}}', "a")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_nmae": "a.json"}, "Unknown key.*did you mean file_name"),
        ({"script_url": "x"}, "'script_url' is not supported.*file_name"),
        ({"cloud_file_name": "s3://x"}, "'cloud_file_name' is not supported.*download"),
        ({"om_hub_url": "x"}, "'om_hub_url' is not supported"),
        ({"ranking": True}, "preference training"),
        ({"formatting": "share_gpt"}, "Unknown dataset format.*did you mean sharegpt"),
        ({"file_name": 3}, "'file_name' is not a text"),
        ({"file_name": None}, "says nowhere where its rows are"),
        ({"file_name": "absent.json"}, "cannot be opened"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"columns": ["text"]}, "'columns' is not an object"),
        ({"columns": {"promt": "text"}}, "Unknown key of 'columns'.*did you mean prompt"),
        ({"columns": {"prompt": 3}}, "columns.prompt is not a name"),
        ({"columns": {"images": "images"}}, "columns.images is not supported"),
        ({"columns": {"chosen": "c", "rejected": "r"}}, "columns.chosen is not supported"),
        ({"columns": {"role": "from"}}, "role_tag"),
        ({"formatting": "alpaca", "columns": {"messages": "m"}}, "Unknown key of 'columns'"),
        ({"formatting": "alpaca", "tags": {"role_tag": "r", "content_tag": "c"}}, "takes no tags"),
        ({"tags": {"user_tag": "user"}}, "tags does not name role_tag and content_tag"),
        ({"tags": {"role": "user"}}, "Unknown key of 'tags'.*did you mean role_tag"),
    ],
)
def test_wrong_entry(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        spec_of(tmp_path, **entry)
    assert "dataset_info.json: a" in str(caught.value) or "absent.json" in str(caught.value)


def test_null_stands_for_absent(tmp_path: Path) -> None:
    assert spec_of(tmp_path, script_url=None, hf_hub_url=None, columns=None, formatting=None)


@pytest.mark.parametrize("sha1", ["abc123...", "0" * 40])
def test_wrong_sha1_only_warns(tmp_path: Path, sha1: str, caplog: pytest.LogCaptureFixture) -> None:
    assert spec_of(tmp_path, file_sha1=sha1).files
    assert sha1 in caplog.text


def test_right_sha1_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = hashlib.sha1(b'[{"text": "x"}]').hexdigest()
    assert spec_of(tmp_path, file_sha1=digest.upper()).files
    assert not caplog.text


def test_hub_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    both = {"hf_hub_url": "h/f", "ms_hub_url": "m/s", "file_name": "ignored.json"}
    info = {"both": both | {"subset": "zh", "split": "train[:9]", "folder": "d"}}
    info["ms"] = {"ms_hub_url": "m/s"}
    first, second = specs_of(tmp_path, info, "both", "ms", split="dev")
    assert first.hub == HubSource("hf", "h/f", subset="zh", split="train[:9]", folder="d")
    assert first.files == ()
    assert second.hub == HubSource("ms", "m/s", split="dev")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    hubs = [spec.hub for spec in specs_of(tmp_path, info, "both", "ms")]
    assert [hub.hub for hub in hubs if hub] == ["ms", "ms"]


def test_online_and_remote(tmp_path: Path) -> None:
    (spec,) = load_dataset_specs(DataArgs(dataset_dir="ONLINE"), ["some/name"])
    assert spec.hub == HubSource("hf", "some/name")
    with pytest.raises(ConfigError, match="remote dataset_dir"):
        load_dataset_specs(DataArgs(dataset_dir="REMOTE:some/repo"), ["x"])


def test_custom_formats_are_part_of_the_settings(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    source = own / "mine.py"
    source.write_text("def to_conversation(row): ...\n")
    info = {"a": {"file_name": "a.json", "formatting": "mine"}}
    before = specs_of(tmp_path, info, "a", custom_formats=str(own))[0].reading_settings()
    source.write_text("def to_conversation(row): return None\n")
    after = specs_of(tmp_path, info, "a", custom_formats=str(own))[0].reading_settings()
    assert before != after
    with pytest.raises(ConfigError, match="--custom_formats"):
        specs_of(tmp_path, info, "a", custom_formats=str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[2J", "\udce9.json", "a\u2028", "\x85"])
def test_names_that_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="control character"):
        specs_of(tmp_path, {}, name)
    with pytest.raises(DataError, match=r"control character|NUL character|surrogate"):
        specs_of(tmp_path, json.dumps({"a": {"file_name": name}}), "a")
    with pytest.raises(DataError, match="control character"):
        load_dataset_specs(DataArgs(dataset_dir=name), ["a"])


def test_files_with_such_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a\nb.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"many: .*control character"):
        specs_of(tmp_path, {}, "many")


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "x/" * 3000, "~nobody-at-all/x", "; rm -rf /", "$(id)", "`id`", "%s%n", "{0}",
     "CON", "<script>", "' OR 1=1 --", "\u202egnp", "🙈", " ", ".hidden", "../../x", "null", "*"],
)  # fmt: skip
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="Undefined data set"):
        specs_of(tmp_path, {}, name)
    assert specs_of(tmp_path, {name: {"file_name": "a.json"}}, name)[0].name == name
    with pytest.raises(DataError, match=r"cannot be opened|says nowhere"):
        specs_of(tmp_path, {"b": {"file_name": name}}, "b")
