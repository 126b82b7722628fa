"""What stops a run, and the audit that training brings along."""

import json
import logging
from pathlib import Path
from typing import Any

import audit_corpus as corpora
import pytest
from tiny_tokenizers import byte_level

from llmtuner.data.audit import training
from llmtuner.data.audit.collect import audit_datasets
from llmtuner.data.audit.defects import DEFECTS
from llmtuner.data.audit.findings import SetAudit
from llmtuner.data.audit.limits import DEFAULT_LIMITS, parse_limits
from llmtuner.data.audit.report import Audit
from llmtuner.data.audit.row import Hit
from llmtuner.data.build import BuiltData, build_datasets
from llmtuner.data.encoders.pt import TextEncoder
from llmtuner.data.encoders.sft import build_encoder
from llmtuner.extras.errors import ConfigError, DataError
from llmtuner.hparams.audit import AuditArgs
from llmtuner.hparams.data import DataArgs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("duplicate_rows=0.1",), "Unknown defect.*'duplicate_rows'.*did you mean duplicate_row"),
        (("zzz=0.1",), "Unknown defect.*'zzz'.*docs/audit.md"),
        (("answer_cut",), "not a share.*'answer_cut'.*from 0 to 1"),
        (("answer_cut=lots",), "not a share.*answer_cut=lots"),
        (("answer_cut=1.5",), "not a share"),
        (("answer_cut=nan",), "not a share"),
    ],
)
def test_wrong_limits_say_what_is_wrong(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_limits(words)


def test_limits_join_the_defaults() -> None:
    assert parse_limits(None) == DEFAULT_LIMITS
    limits = parse_limits(("answer_cut=0", " double_bos = 1 "))
    assert limits == {**DEFAULT_LIMITS, "answer_cut": 0.0, "double_bos": 1.0}
    assert set(limits) <= set(DEFECTS)


@pytest.mark.parametrize(("limit", "is_above"), [(0.0, True), (0.24, True), (0.25, False)])
def test_more_than_the_limit_stops_and_names_class_share_and_places(
    limit: float, is_above: bool
) -> None:
    one = SetAudit(rows=4)
    one.add("answer_cut", "a.jsonl:3", [Hit(2), Hit(4)])
    audit = Audit({"a.jsonl": one}, limits={"answer_cut": limit})
    assert audit.to_dict()["exceeded"] == [str(excess) for excess in audit.excess()]
    if not is_above:
        audit.check()
        return
    said = rf"a.jsonl: answer_cut in 1 rows \(25.00%\), allowed are {limit:.2%}.*a.jsonl:3"
    with pytest.raises(DataError, match=f"(?s){said}") as raised:
        audit.check()
    assert (raised.value.exit_code, raised.value.kind) == (3, "audit_limit")


def build(dataset: Path, audit: AuditArgs | None = None, **values: Any) -> BuiltData:
    args = DataArgs(dataset=(str(dataset),), template="qwen", cutoff_len=1200, **values)
    return build_datasets(
        args,
        encode=build_encoder(args, byte_level()),
        seed=0,
        packing=False,
        for_training=True,
        audit=audit,
    )


def found(built: BuiltData) -> corpora.Found:
    return {
        (name, place["where"], place["turn"])
        for one in built.audit["datasets"].values()
        for name, finding in one["findings"].items()
        for place in finding["places"]
    }


NAMES = ("duplicate_row", "near_empty_answer", "answer_cut", "nothing_supervised")


def test_training_audits_and_keeps_the_audit_with_the_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    names = (*NAMES, "empty_turn")
    expected = corpora.write_corpus(corpora.make_corpus(0, names=names), path)
    skip = {"on_bad_row": "skip", "max_bad_rows": 0.5}
    with caplog.at_level(logging.INFO):
        first = build(path, AuditArgs(), **skip)
    (place,) = (place for name, place, _ in expected if name == "answer_cut")
    assert f"warning answer_cut: 1 rows (2.86 %), first {place} turn 2" in caplog.text
    assert found(first) == expected
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = build(path, AuditArgs(), **skip)
    assert "Tokenised rows found" in caplog.text
    assert f"first {place} turn 2" in caplog.text
    assert again.audit == first.audit
    assert not any("audit" in part for part in (again.report, *again.report["datasets"].values()))
    json.dumps(again.audit, allow_nan=False)


def test_no_audit_where_none_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    corpora.write_corpus(corpora.make_corpus(0), path)
    assert build(path, AuditArgs(audit=False)).audit == build(path).audit == {}


def test_training_stops_above_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    corpora.write_corpus(corpora.make_corpus(0, names=NAMES), path)
    limits = AuditArgs(audit_limits=("near_empty_answer=0.01",))
    with pytest.raises(DataError, match="near_empty_answer in 1 rows"):
        build(path, limits)
    with pytest.raises(ConfigError, match="Unknown defect"):
        build(path, AuditArgs(audit_limits=("empty_answers=0",)))


def test_tokenised_data_brings_its_audit_along(tmp_path: Path) -> None:
    path, target = tmp_path / "rows.jsonl", str(tmp_path / "tokenised")
    expected = corpora.write_corpus(corpora.make_corpus(0, names=NAMES), path)
    saved = build(path, AuditArgs(), tokenized_path=target)
    loaded = build(path, AuditArgs(), tokenized_path=target)
    assert found(saved) == found(loaded) == expected
    with pytest.raises(DataError, match="answer_cut in 1 rows"):
        build(path, AuditArgs(audit_limits=("answer_cut=0",)), tokenized_path=target)


def test_a_split_that_holds_copies_of_training_rows(tmp_path: Path) -> None:
    write = corpora.Writer(0)
    rows = [corpora.chat(*corpora.exchange(write)) for _ in range(20)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows * 2), encoding="utf-8")
    built = build(path, AuditArgs(), val_size=0.25)
    split = built.audit["datasets"][training.SPLIT]
    held_out = set(built.evals[""]["source"])
    leaked = {s for s in held_out if _twin(s) not in held_out}
    assert leaked
    assert {p["where"] for p in split["findings"]["eval_row_in_train"]["places"]} == leaked
    assert split["rows"] == len(held_out) == 10


def _twin(source: str) -> str:
    path, number = source.split("#")
    return f"{path}#{(int(number) + 20) % 40}"


def test_evaluation_rows_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = corpora.Writer(0)
    rows = [corpora.chat(*corpora.exchange(write)) for _ in range(9)]
    shared = write.words(20)
    for name, mine in (("train", rows[:6]), ("eval", [rows[2], rows[7]])):
        more = corpora.chat(corpora.user(shared), corpora.answer(write.text()))
        (tmp_path / f"{name}.json").write_text(json.dumps([*mine, more]), encoding="utf-8")
    evaluation = tmp_path / "eval.json"
    expected = {
        ("eval_row_in_train", f"{evaluation}#0", None),
        ("eval_ngram_in_train", f"{evaluation}#2", None),
    }
    settings = {"eval_dataset": (str(evaluation),)}
    assert found(build(tmp_path / "train.json", AuditArgs(), **settings)) == expected
    monkeypatch.setattr(training, "ngram_overlap", lambda *_: pytest.fail("compared again"))
    assert found(build(tmp_path / "train.json", AuditArgs(), **settings)) == expected
    monkeypatch.undo()
    monkeypatch.setenv("LLMTUNER_CACHE", str(tmp_path / "cache"))
    for stored in (tmp_path / "cache" / "overlaps").glob("*.json"):
        stored.write_text("[", encoding="utf-8")
    assert found(build(tmp_path / "train.json", AuditArgs(), **settings)) == expected


def test_texts_are_audited_and_streams_say_that_they_are_not(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["A root used in tonics.", "…", "A root used in tonics."]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    settings = {"seed": 0, "packing": False, "for_training": True, "audit": AuditArgs()}
    encode = TextEncoder(byte_level(), 64)
    built = build_datasets(DataArgs(dataset=(str(path),)), encode=encode, **settings)
    assert found(built) == {
        ("near_empty_answer", f"{path}:2", 1),
        ("duplicate_row", f"{path}:3", None),
    }
    args = DataArgs(dataset=(str(path),), streaming=True)
    assert "not looked at" in build_datasets(args, encode=encode, **settings).audit["streaming"]


def test_rows_of_an_earlier_training_set(tmp_path: Path) -> None:
    write = corpora.Writer(0)
    rows = [corpora.chat(*corpora.exchange(write)) for _ in range(8)]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(rows[:5]), encoding="utf-8")
    second.write_text(json.dumps([*rows[5:], rows[1], rows[6], rows[1]]), encoding="utf-8")
    expected = {("duplicate_row", f"{second}#{number}", None) for number in (3, 4, 5)}
    args = DataArgs(dataset=(str(first), str(second), str(first)), template="qwen")
    encode = build_encoder(args, byte_level())
    together = audit_datasets(args, encode, limits={})
    settings = {"seed": 0, "packing": False, "for_training": True, "audit": AuditArgs()}
    built = build_datasets(args, encode=encode, **settings)
    assert found(built) == expected
    assert built.audit["datasets"] == together.to_dict()["datasets"]
    notes = built.audit["datasets"][str(second)]["findings"]["duplicate_row"]
    assert (notes["rows"], len(notes["places"])) == (3, 3)
