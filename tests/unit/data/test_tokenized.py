"""`tokenized_path`: written once, opened by `datasets`, refused when it was made another way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from text_sets import data_args, numbered, text_encoder, texts_of, write_texts

from llmtuner.data.build import BuiltData, build_datasets
from llmtuner.extras.errors import DataError

SETTINGS = "llmtuner.json"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path, a=numbered("a", 10), b=numbered("b", 4))
    return tmp_path


def build(folder: Path, *names: str, seed: int = 42, **values: Any) -> BuiltData:
    path = str(folder / "tokenized")
    args = data_args(folder, *(names or ("a",)), tokenized_path=path, **values)
    encode = text_encoder(args.cutoff_len)
    with pytest.MonkeyPatch.context() as patch:
        if not Path(path).exists():
            patch.setenv("WORLD_SIZE", "1")  # the run that writes is another job than later ones
        return build_datasets(args, encode=encode, seed=seed, packing=False, for_training=True)


def test_the_first_run_writes_and_ends_there(folder: Path) -> None:
    built = build(folder)
    assert built.saved_to == folder / "tokenized"
    assert built.train is None
    assert built.report["samples"] == {"train": 10}


def test_a_lone_training_set_is_a_plain_data_set(folder: Path) -> None:
    build(folder)
    stored = load_from_disk(str(folder / "tokenized"))
    assert isinstance(stored, Dataset)
    assert texts_of(stored) == numbered("a", 10)
    assert set(stored.column_names) == {"input_ids", "labels", "source"}


def test_with_validation_it_is_a_dictionary_of_sets(folder: Path) -> None:
    build(folder, val_size=3)
    stored = load_from_disk(str(folder / "tokenized"))
    assert isinstance(stored, DatasetDict)
    assert {name: len(part) for name, part in stored.items()} == {"train": 7, "validation": 3}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"val_size": 3},
        {"val_size": 0.25},
        {"eval_dataset": ("b",)},
        {"eval_dataset": ("a", "b"), "eval_on_each_dataset": True},
        {"mix_strategy": "interleave_over", "interleave_probs": (0.5, 0.5)},
    ],
    ids=str,
)
def test_the_second_run_gets_what_the_first_one_would_have(
    folder: Path, values: dict[str, Any]
) -> None:
    names = ("a", "b") if "interleave_probs" in values else ("a",)
    args = data_args(folder, *names, **values)
    direct = build_datasets(args, encode=text_encoder(), seed=42, packing=False, for_training=True)
    build(folder, *names, **values)
    shutil.rmtree(folder / "cache")
    again = build(folder, *names, **values)
    assert again.saved_to is None
    assert isinstance(again.train, Dataset)
    assert isinstance(direct.train, Dataset)
    assert texts_of(again.train) == texts_of(direct.train)
    assert {name: texts_of(part) for name, part in again.evals.items()} == {
        name: texts_of(part) for name, part in direct.evals.items()
    }
    assert again.report == direct.report
    assert not (folder / "cache").exists()  # nothing was tokenised again


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_samples": 5}, ["max_samples"]),
        ({"val_size": 2.0}, ["val_size"]),
        ({"eval_dataset": ("b",)}, ["eval_dataset", "files"]),
        ({"mix_strategy": "interleave_under"}, ["mix_strategy"]),
        ({"interleave_probs": (1.0,)}, ["interleave_probs"]),
        ({"seed": 7}, ["seed"]),
        ({"seed": 7, "max_samples": 5}, ["max_samples", "seed"]),
        ({"cutoff_len": 32}, "another template, tokenizer, cutoff_len or mask setting"),
    ],
    ids=str,
)
def test_what_was_changed_is_named(
    folder: Path, change: dict[str, Any], named: list[str] | str
) -> None:
    build(folder)
    with pytest.raises(DataError, match="made with other settings") as caught:
        build(folder, **change)
    assert caught.value.got == named
    assert caught.value.where == str(folder / "tokenized")


def test_another_data_set_is_named(folder: Path) -> None:
    build(folder, "a")
    with pytest.raises(DataError) as caught:
        build(folder, "b")
    assert caught.value.got == ["dataset", "files"]


def test_a_changed_file_is_noticed(folder: Path) -> None:
    build(folder)
    write_texts(folder, a=["other"], b=["other"])
    with pytest.raises(DataError) as caught:
        build(folder)
    assert caught.value.got == ["files"]


def test_another_way_to_evaluate_is_named(folder: Path) -> None:
    build(folder, eval_dataset=("a", "b"))
    with pytest.raises(DataError, match="other settings"):
        build(folder, eval_dataset=("a", "b"), eval_on_each_dataset=True)


def empty_folder(target: Path) -> None:
    shutil.rmtree(target)
    target.mkdir()


def cut_rows(target: Path) -> None:
    (path,) = target.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no settings": lambda target: (target / SETTINGS).unlink(),
    "half the settings": lambda target: cut(target / SETTINGS),
    "empty": empty_folder,
    "no state": lambda target: (target / "state.json").unlink(),
    "rows cut": cut_rows,
}
WRONG_JSON = ("{}", "[]", "null", '{"settings": {}}', '{"settings": null}')


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_a_way_out(folder: Path, damage: str) -> None:
    build(folder)
    DAMAGES[damage](folder / "tokenized")
    with pytest.raises(DataError, match="cannot be read") as caught:
        build(folder)
    assert "delete the folder" in str(caught.value)


@pytest.mark.parametrize("content", WRONG_JSON)
def test_settings_of_the_wrong_form_are_refused(folder: Path, content: str) -> None:
    build(folder)
    (folder / "tokenized" / SETTINGS).write_text(content)
    with pytest.raises(DataError):
        build(folder)


def test_a_folder_of_something_else_is_refused_and_untouched(folder: Path) -> None:
    (folder / "tokenized").mkdir()
    (folder / "tokenized" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError):
        build(folder)
    assert [path.name for path in (folder / "tokenized").iterdir()] == ["thesis.txt"]


def test_an_error_while_writing_leaves_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmtuner.data.tokenized.write_json", fail)
    with pytest.raises(OSError, match="No space"):
        build(folder)
    assert not (folder / "tokenized").exists()


def test_the_stored_settings_are_json_for_people(folder: Path) -> None:
    build(folder, val_size=3)
    stored = json.loads((folder / "tokenized" / SETTINGS).read_text("utf-8"))
    assert stored["settings"]["dataset"] == ["a"]
    assert stored["settings"]["val_size"] == 3
    assert stored["settings"]["seed"] == 42
