"""A stream has no end, every rank has its own share, and held-out rows are never trained."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from text_sets import data_args, numbered, text_encoder, texts_of, write_texts
from torch.utils.data import DataLoader

from llmtuner.data.build import build_datasets
from llmtuner.data.dataset_info import load_dataset_specs
from llmtuner.data.stream import SampleStream
from llmtuner.extras.errors import DataError

NUM_A, NUM_B = 17, 6
ALL = numbered("a", NUM_A) + numbered("b", NUM_B)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNER_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path, a=numbered("a", NUM_A), b=numbered("b", NUM_B))
    return tmp_path


def make(
    folder: Path,
    *,
    seed: int = 42,
    packing: bool = False,
    num_held_out: int = 0,
    cutoff_len: int = 64,
    **values: Any,
) -> SampleStream:
    args = data_args(folder, "a", "b", cutoff_len=cutoff_len, streaming=True, **values)
    specs = load_dataset_specs(args, args.dataset or ())
    return SampleStream(
        specs,
        args,
        encode=text_encoder(cutoff_len),
        seed=seed,
        packing=packing,
        num_held_out=num_held_out,
    )


def take(stream: SampleStream, count: int) -> list[str]:
    return texts_of(islice(stream, count))


def test_an_epoch_gives_every_sample_once(folder: Path) -> None:
    assert sorted(take(make(folder), len(ALL))) == sorted(ALL)


def test_the_stream_has_no_end(folder: Path) -> None:
    texts = take(make(folder), 5 * len(ALL))
    assert Counter(texts) == Counter(ALL * 5)


def test_every_epoch_has_an_order_of_its_own(folder: Path) -> None:
    texts = take(make(folder), 2 * len(ALL))
    assert texts[: len(ALL)] != texts[len(ALL) :]


def test_the_seed_decides_the_order(folder: Path) -> None:
    first = take(make(folder), len(ALL))
    assert take(make(folder), len(ALL)) == first
    assert take(make(folder, seed=1), len(ALL)) != first
    assert first != ALL


def test_samples_are_shuffled_inside_the_buffer_only(folder: Path) -> None:
    texts = take(make(folder, buffer_size=5), len(ALL))
    assert sorted(texts[:5]) == sorted(ALL[:5])
    assert sorted(texts[5:10]) == sorted(ALL[5:10])
    assert take(make(folder, buffer_size=1), len(ALL)) == ALL


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_shares_of_the_ranks_are_disjoint_and_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    seen: list[str] = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        share = len(range(rank, len(ALL), world_size))
        texts = take(make(folder), 2 * share)
        assert Counter(texts[:share]) == Counter(texts[share:])
        seen += texts[:share]
    assert sorted(seen) == sorted(ALL)


def test_the_workers_of_a_loader_share_too(folder: Path) -> None:
    loader = DataLoader(make(folder), batch_size=None, num_workers=2)
    # the two take turns; each has read its half after this many
    texts = texts_of(islice(loader, len(ALL) - 1))
    assert len(set(texts)) == len(ALL) - 1


@pytest.mark.parametrize("held_out", [0, 1, 5, NUM_A, NUM_A + 2])
def test_rows_at_the_head_are_never_trained(folder: Path, held_out: int) -> None:
    texts = take(make(folder, num_held_out=held_out), 3 * len(ALL))
    assert set(texts) == set(ALL[held_out:])


def test_validation_gets_just_the_rows_that_are_not_trained(folder: Path) -> None:
    args = data_args(folder, "a", "b", streaming=True, val_size=4)
    built = build_datasets(args, encode=text_encoder(), seed=0, packing=False, for_training=True)
    assert texts_of(built.evals[""]) == ALL[:4]
    assert isinstance(built.train, SampleStream)
    assert set(take(built.train, 2 * len(ALL))) == set(ALL[4:])
    assert built.report["held_out_rows"] == 4
    assert built.report["streaming"] is True


def test_an_evaluation_set_leaves_the_stream_whole(folder: Path) -> None:
    args = data_args(folder, "a", eval_dataset=("b",), streaming=True, val_size=4)
    built = build_datasets(args, encode=text_encoder(), seed=0, packing=False, for_training=True)
    assert texts_of(built.evals[""]) == numbered("b", NUM_B)
    assert isinstance(built.train, SampleStream)
    assert set(take(built.train, NUM_A)) == set(numbered("a", NUM_A))


def test_without_training_nothing_is_streamed(folder: Path) -> None:
    args = data_args(folder, "b", streaming=True)
    built = build_datasets(args, encode=text_encoder(), seed=0, packing=False, for_training=False)
    assert built.train is None
    assert texts_of(built.evals[""]) == numbered("b", NUM_B)


def test_packs_are_full_and_hold_every_sample_once(folder: Path) -> None:
    seen: list[str] = []
    for pack in make(folder, packing=True, cutoff_len=12):
        assert isinstance(pack, list)
        assert sum(len(row["input_ids"]) for row in pack) <= 12
        seen += texts_of(pack)
        if len(seen) == len(ALL):
            break
    assert sorted(seen) == sorted(ALL)


def test_a_long_text_becomes_several_samples_with_one_source(folder: Path) -> None:
    write_texts(folder, a=["x" * 40], b=["y"])
    rows = list(islice(make(folder, cutoff_len=8), 8))
    sources = Counter(row["source"] for row in rows if isinstance(row, dict))
    assert max(sources.values()) > 1
    assert all(len(row["input_ids"]) <= 8 for row in rows if isinstance(row, dict))


def test_every_set_gives_at_most_max_samples_rows(folder: Path) -> None:
    texts = take(make(folder, max_samples=2), 8)
    assert set(texts) == {"a0", "a1", "b0", "b1"}


@pytest.mark.parametrize("held_out", [len(ALL), len(ALL) + 5])
def test_a_stream_without_a_sample_ends_with_an_error_instead_of_spinning(
    folder: Path, held_out: int
) -> None:
    with pytest.raises(DataError, match="holds no sample"):
        next(iter(make(folder, num_held_out=held_out)))


def test_a_rank_without_a_share_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("RANK", "63")
    with pytest.raises(DataError, match="for one of the processes"):
        next(iter(make(folder)))
