"""From settings to data sets: mixed, split and packed as asked, and never silently empty."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from text_sets import data_args, numbered, text_encoder, texts_of, write_texts

from llmtuner.data.build import BuiltData, build_datasets, split_rows
from llmtuner.data.conversation import Conversation
from llmtuner.data.render import Encoded
from llmtuner.data.stored_column import stored_column
from llmtuner.extras.errors import DataError

SIZES = {"a": 10, "b": 4, "c": 6}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path, **{name: numbered(name, size) for name, size in SIZES.items()})
    return tmp_path


def build(
    folder: Path,
    *names: str,
    seed: int = 42,
    packing: bool = False,
    for_training: bool = True,
    **values: Any,
) -> BuiltData:
    args = data_args(folder, *names, **values)
    encode = text_encoder(args.cutoff_len)
    return build_datasets(
        args, encode=encode, seed=seed, packing=packing, for_training=for_training
    )


def train_texts(built: BuiltData) -> list[str]:
    assert isinstance(built.train, Dataset)
    return texts_of(built.train)


# ---- mixing ----


def test_sets_stand_one_after_another(folder: Path) -> None:
    assert train_texts(build(folder, "b", "c")) == numbered("b", 4) + numbered("c", 6)


def test_a_set_that_is_named_twice_counts_twice(folder: Path) -> None:
    assert train_texts(build(folder, "b", "b")) == numbered("b", 4) * 2


def test_interleaving_stops_with_the_shortest_set(folder: Path) -> None:
    texts = train_texts(build(folder, "a", "b", mix_strategy="interleave_under"))
    assert texts == [text for n in range(4) for text in (f"a{n}", f"b{n}")]


def test_interleaving_stops_with_the_longest_set_and_repeats_the_others(folder: Path) -> None:
    texts = train_texts(build(folder, "a", "b", mix_strategy="interleave_over"))
    counts = Counter(texts)
    assert all(counts[text] == 1 for text in numbered("a", 10))
    assert sum(counts[text] for text in numbered("b", 4)) == 10


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
def test_chances_decide_the_shares_and_the_seed_the_order(folder: Path, strategy: str) -> None:
    write_texts(folder, a=numbered("a", 150), b=numbered("b", 150))
    how = {"mix_strategy": strategy, "interleave_probs": (0.9, 0.1)}
    texts = train_texts(build(folder, "a", "b", **how))
    share = sum(text.startswith("a") for text in texts) / len(texts)
    assert share == pytest.approx(0.9, abs=0.07)
    assert train_texts(build(folder, "a", "b", **how)) == texts
    assert train_texts(build(folder, "a", "b", seed=1, **how)) != texts


def test_one_set_is_not_interleaved(folder: Path) -> None:
    assert train_texts(build(folder, "b", mix_strategy="interleave_over")) == numbered("b", 4)


# ---- the split ----


@pytest.mark.parametrize(
    ("val_size", "held_out"), [(0.3, 3), (0.35, 3), (0.01, 1), (1, 1), (4, 4), (9, 9), (0.99, 9)]
)
def test_a_share_or_a_number_of_rows_is_held_out(
    folder: Path, val_size: float, held_out: int
) -> None:
    built = build(folder, "a", val_size=val_size)
    train, evals = train_texts(built), texts_of(built.evals[""])
    assert len(evals) == held_out
    assert sorted(train + evals) == numbered("a", 10)
    assert train == sorted(train)
    assert evals == sorted(evals)


def test_without_val_size_nothing_is_held_out(folder: Path) -> None:
    built = build(folder, "a")
    assert built.evals == {}
    assert built.packs is None
    assert built.saved_to is None


def test_the_seed_decides_which_rows_are_held_out(folder: Path) -> None:
    def held_out(seed: int) -> list[str]:
        return texts_of(build(folder, "a", val_size=5, seed=seed).evals[""])

    assert held_out(1) == held_out(1)
    assert len({tuple(held_out(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("chosen", [None, [3, 0, 1, 1, 2, 5, 0]])
def test_the_split_is_that_of_the_plain_way(chosen: list[int] | None) -> None:
    samples = Dataset.from_dict(
        {"source": ["a:1", "a:1", "b:1", "a:2", "b:2", "a:1"], "number": [*range(6)]}
    )
    samples = samples if chosen is None else samples.select(chosen)
    assert stored_column(samples, "source").to_pylist() == list(samples["source"])
    rows = list(dict.fromkeys(samples["source"]))
    for seed in range(5):
        held_out = {rows[n] for n in np.random.default_rng(seed).permutation(len(rows))[:2]}
        parts = split_rows(samples, 2, seed=seed)
        for part, is_wanted in zip(parts, (False, True), strict=True):
            expected = [one for one in samples if (one["source"] in held_out) == is_wanted]
            assert list(part) == expected


def test_a_split_of_one_set_is_the_same_without_its_names(folder: Path) -> None:
    write_texts(folder, a=["x" * (n % 5 + 1) * 3 + str(n) for n in range(40)])
    built = build(folder, "a", cutoff_len=8)
    assert isinstance(built.train, Dataset)
    for seed in range(5):
        plain = split_rows(built.train, 0.3, seed=seed)
        quick = split_rows(built.train, 0.3, seed=seed, is_one_set=True)
        assert [list(part) for part in quick] == [list(part) for part in plain]


def test_a_set_that_is_named_twice_is_split_by_rows(folder: Path) -> None:
    built = build(folder, "a", "a", val_size=0.5)
    assert isinstance(built.train, Dataset)
    assert not {*built.train["source"]} & {*built.evals[""]["source"]}
    assert len(built.train) == len(built.evals[""]) == 10


@pytest.mark.parametrize("val_size", [10, 11, 1e6])
def test_a_split_that_takes_every_row_is_refused(folder: Path, val_size: float) -> None:
    with pytest.raises(DataError, match="would take every row") as caught:
        build(folder, "a", val_size=val_size)
    assert "of 10 rows" in str(caught.value)


def test_a_share_of_one_row_leaves_nothing_to_train_on(folder: Path) -> None:
    with pytest.raises(DataError, match="would take every row"):
        build(folder, "a", max_samples=1, val_size=0.5)


def test_the_samples_of_one_row_stay_together(folder: Path) -> None:
    write_texts(folder, a=["x" * (n + 1) * 3 + str(n) for n in range(12)])
    built = build(folder, "a", val_size=0.5, cutoff_len=8)
    assert isinstance(built.train, Dataset)
    train, evals = set(built.train["source"]), set(built.evals[""]["source"])
    assert not train & evals
    assert len(train) == len(evals) == 6
    assert len(built.train) + len(built.evals[""]) > 12


def test_rows_are_held_out_not_samples() -> None:
    sources = ["r0"] * 50 + [f"r{n}" for n in range(1, 10)]
    dataset = Dataset.from_dict({"source": sources})
    for seed in range(5):
        train, evals = split_rows(dataset, 0.2, seed=seed)
        assert len(set(evals["source"])) == 2
        assert len(set(train["source"])) == 8


# ---- evaluation sets ----


def test_evaluation_sets_are_joined_and_leave_the_training_whole(folder: Path) -> None:
    built = build(folder, "a", eval_dataset=("b", "c"), val_size=0.5)
    assert train_texts(built) == numbered("a", 10)
    assert set(built.evals) == {""}
    assert texts_of(built.evals[""]) == numbered("b", 4) + numbered("c", 6)


def test_evaluation_sets_can_stand_on_their_own(folder: Path) -> None:
    built = build(folder, "a", eval_dataset=("b", "c"), eval_on_each_dataset=True)
    assert {name: texts_of(part) for name, part in built.evals.items()} == {
        "b": numbered("b", 4),
        "c": numbered("c", 6),
    }


def test_evaluation_sets_keep_their_names(folder: Path) -> None:
    write_texts(folder, a=["1"], _b=["2"], b=["3"])
    built = build(folder, "a", eval_dataset=("_b", "b"), eval_on_each_dataset=True)
    assert set(built.evals) == {"_b", "b"}


def test_without_training_everything_is_evaluated(folder: Path) -> None:
    built = build(folder, "a", for_training=False, val_size=0.5)
    assert built.train is None
    assert texts_of(built.evals[""]) == numbered("a", 10)


def test_without_training_a_named_evaluation_set_stands_alone(folder: Path) -> None:
    built = build(folder, "a", eval_dataset=("b",), for_training=False)
    assert built.train is None
    assert texts_of(built.evals[""]) == numbered("b", 4)


# ---- empty sets, reports, packs ----


class LeavesOut:
    """An encoder that finds nothing to learn in rows that begin with a letter."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    template = None

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        return [
            Encoded((), row.source) if row.messages[0].content.startswith(self.letter) else encoded
            for row, encoded in zip(conversations, text_encoder()(conversations), strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "test", "letter": self.letter}


@pytest.mark.parametrize(
    ("letter", "more", "what"),
    [
        ("a", {}, "The training set"),
        ("b", {"eval_dataset": ("b",)}, "The evaluation set"),
        ("b", {"eval_dataset": ("b", "c"), "eval_on_each_dataset": True}, "The evaluation set b"),
    ],
)
def test_a_set_in_which_nothing_can_be_learned_is_refused_by_name(
    folder: Path, letter: str, more: dict[str, Any], what: str
) -> None:
    args = data_args(folder, "a", **more)
    with pytest.raises(DataError, match=f"{what} has no usable row"):
        build_datasets(args, encode=LeavesOut(letter), seed=0, packing=True, for_training=True)


def test_an_evaluation_set_of_a_stream_is_refused_when_it_is_empty(folder: Path) -> None:
    args = data_args(folder, "a", eval_dataset=("b",), streaming=True)
    with pytest.raises(DataError, match="evaluation"):
        build_datasets(args, encode=LeavesOut("b"), seed=0, packing=False, for_training=True)


def test_a_data_set_without_any_row_is_refused_by_name(folder: Path) -> None:
    write_texts(folder, a=["x"], blank=[])
    with pytest.raises(DataError, match="blank"):
        build(folder, "a", eval_dataset=("blank",))


def test_the_report_counts_rows_samples_and_tokens(folder: Path) -> None:
    built = build(folder, "a", eval_dataset=("b",))
    assert isinstance(built.train, Dataset)
    assert built.report["samples"] == {"train": 10, "validation": 4}
    counts = built.report["datasets"]["a"]
    tokens = sum(len(ids) for ids in built.train["input_ids"])
    assert counts["rows"] == counts["samples"] == 10
    assert counts["tokens"] == tokens
    assert counts["supervised_tokens"] == tokens - 10  # the first of a sample is not predicted
    (file,) = counts["files"]
    assert file["path"].endswith("a.json")
    assert len(file["sha256"]) == 64


def test_packs_hold_every_sample_once_and_are_reported(folder: Path) -> None:
    built = build(folder, "a", "c", packing=True, cutoff_len=12)
    assert isinstance(built.train, Dataset)
    assert built.packs is not None
    lengths = [len(ids) for ids in built.train["input_ids"]]
    assert sorted(n for group in built.packs for n in group) == list(range(16))
    assert all(sum(lengths[n] for n in group) <= 12 for group in built.packs)
    assert 1 < built.report["packs"] == len(built.packs) < 16
    expected = sum(lengths) / (12 * len(built.packs))
    assert built.report["pack_fill_ratio"] == pytest.approx(expected, abs=1e-4)


def test_only_the_training_set_is_packed(folder: Path) -> None:
    built = build(folder, "a", packing=True, for_training=False)
    assert built.packs is None
    assert "packs" not in built.report


def test_a_changed_file_is_read_again(folder: Path) -> None:
    assert train_texts(build(folder, "b")) == numbered("b", 4)
    write_texts(folder, b=["other"])
    assert train_texts(build(folder, "b")) == ["other"]


def test_workers_change_nothing(folder: Path) -> None:
    write_texts(folder, a=numbered("a", 300))
    alone = build(folder, "a")
    together = build(folder, "a", preprocessing_num_workers=2, overwrite_cache=True)
    assert train_texts(alone) == train_texts(together)
    assert alone.report == together.report
