"""The audit finds what is planted, where it is planted, and nothing else."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import audit_corpus as corpora
import numpy as np
import pytest
from tiny_tokenizers import byte_level, plain_byte_level
from tokenizers import processors

from llmtuner.data.audit import fingerprint, set_defects
from llmtuner.data.audit.collect import audit_datasets
from llmtuner.data.audit.defects import DEFECTS, OWN_DEFECTS
from llmtuner.data.audit.findings import MOST_PLACES, SetAudit, from_dict, joined
from llmtuner.data.audit.fingerprint import Numbers, Places
from llmtuner.data.audit.inspect import inspect_rows
from llmtuner.data.audit.row import Hit, vocabulary_of
from llmtuner.data.audit.set_defects import SetPrint, conflicting_answers, duplicate_row
from llmtuner.data.conversation import Conversation, Message
from llmtuner.data.encoders.pt import TextEncoder
from llmtuner.data.encoders.sft import ConversationEncoder, build_encoder
from llmtuner.data.tokenise import Encoder
from llmtuner.extras.error_kinds import ERROR_KINDS
from llmtuner.hparams.data import DataArgs

CUTOFF = 1200
ROOT = Path(__file__).parents[3]
SEPARATE = {
    "contract_unproved", "double_bos", "missing_bos", "end_token_not_learned",
    "prompt_not_served", "thought_unasked", "eval_row_in_train", "eval_ngram_in_train",
}  # fmt: skip


def encoder(name: str | None = "qwen", **values: object) -> ConversationEncoder:
    settings = {"template": name, "cutoff_len": CUTOFF, **values}
    return build_encoder(DataArgs(**settings), byte_level())


def found(
    dataset: Path | str, eval_dataset: Path | None = None, encode: Encoder | None = None
) -> corpora.Found:
    """Return (class, place, turn) of all that the audit finds; only the class for whole sets."""
    evals = (str(eval_dataset),) if eval_dataset else None
    args = DataArgs(dataset=(str(dataset),), eval_dataset=evals, dataset_dir=str(ROOT / "data"))
    audit = audit_datasets(args, encode or encoder(), limits={})
    return {
        (name, place["where"], place["turn"])
        for one in audit.sets.values()
        for name, finding in one.findings.items()
        for place in finding.places
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [0, 1, 7, 60])
def test_equal_rows_and_questions_are_told_in_file_order(
    monkeypatch: pytest.MonkeyPatch, seed: int, count: int
) -> None:
    monkeypatch.setattr(set_defects, "_PART", 7)
    rows = np.random.default_rng(seed).integers(1, 40, count)
    questions = rows // 3 * (rows % 7 > 0)  # equal rows have equal questions, 0 is none
    places = Places()
    for number in range(count):
        places.append(f"rows:{number}")
    first_row: dict[int, int] = {}
    first_question: dict[int, int] = {}
    repeated, answered = [], []
    for number, (row, question) in enumerate(zip(rows.tolist(), questions.tolist(), strict=True)):
        if first_row.setdefault(row, number) != number:
            repeated.append((number, Hit(None, f"same as rows:{first_row[row]}")))
        elif question and first_question.setdefault(question, number) != number:
            note = f"same question as rows:{first_question[question]}"
            answered.append((number, Hit(None, note)))
    prints = SetPrint(rows, questions, places)
    assert list(duplicate_row(prints)) == repeated
    assert list(conflicting_answers(prints)) == answered


def test_places_and_numbers_come_back_from_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_MOST_HELD", 3)
    numbers, places = Numbers(), Places()
    values = [0, -1, 2**63 - 1, -(2**63), 5, 6, 7]
    for value in values:
        numbers.append(value)
    assert (len(numbers), numbers.values().tolist()) == (7, values)
    numbers.append(8)  # reading ends nothing
    assert numbers.values().tolist() == [*values, 8]
    told = ["a:1", "b:2:77", "a:1099511627774", "no number", "a#0", "hub:x"]
    for number, place in enumerate(told):
        places.append(place)
        assert places[number] == place
    assert [places[number] for number in range(len(places))] == told


def test_every_own_class_is_planted_somewhere() -> None:
    assert set(OWN_DEFECTS) == SEPARATE | (set(corpora.PLANTS) & set(OWN_DEFECTS))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("rows.jsonl", (*corpora.PLANTS, *corpora.LINES)),
        ("rows.json", tuple(name for name in corpora.PLANTS if name not in corpora.ONLY_LINES)),
        ("rows.csv", corpora.PAIRS),
    ],
)
def test_planted_defects_are_found_and_nothing_else(
    tmp_path: Path, file: str, names: tuple[str, ...], seed: int
) -> None:
    corpus = corpora.make_corpus(seed, names=names)
    if file.endswith("csv"):
        kept = [n for n, row in enumerate(corpus.rows) if corpora.is_pair(row)]
        moved = {number: place for place, number in enumerate(kept)}
        planted = [(moved[n], name, turn) for n, name, turn in corpus.planted]
        corpus = corpora.Corpus([corpus.rows[n] for n in kept], planted)
    expected = corpora.write_corpus(corpus, tmp_path / file)
    assert {name for name, _, _ in expected} >= set(names)
    assert found(tmp_path / file) == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_corpus_gives_no_alarm(tmp_path: Path, seed: int) -> None:
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.json"
    corpora.write_corpus(corpora.make_corpus(seed), train)
    corpora.write_corpus(corpora.make_corpus(seed + 100), evaluation)
    assert found(train, evaluation) == set()


@pytest.mark.parametrize("name", ["identity", "medical_sharegpt", "tcm_alpaca", "medical_qa"])
def test_the_shipped_chats_give_no_alarm(name: str) -> None:
    assert found(name) == set()


@pytest.mark.parametrize("name", ["medical_corpus", "tcm_corpus", "clinical_notes"])
def test_the_shipped_texts_give_no_alarm(name: str) -> None:
    assert found(name, encode=TextEncoder(byte_level(), CUTOFF)) == set()


@pytest.mark.parametrize("seed", range(3))
def test_overlap_of_training_and_evaluation(tmp_path: Path, seed: int) -> None:
    train = corpora.make_corpus(seed, num_clean=40)
    evaluation = corpora.make_corpus(seed + 100, num_clean=20)
    write = corpora.Writer(seed + 200)
    stolen = next(row for row in train.rows if corpora.is_pair(row) and len(str(row)) > 200)
    shared, hans = write.words(13), "".join(corpora.HANS[n * 7 % 48] for n in range(13))
    system = {"role": "system", "content": write.words(30)}
    train.rows += [
        corpora.chat(corpora.user(f"{write.words()} {shared} {write.words()}"), *_said(write)),
        corpora.chat(corpora.user(f"{write.words()} {hans[:6]}，{hans[6:]}"), *_said(write)),
        corpora.chat(system, *corpora.exchange(write)),
    ]
    evaluation.rows += [
        stolen,
        corpora.chat(corpora.user(shared.upper().replace(" ", ", ")), *_said(write)),
        corpora.chat(corpora.user(write.words() + hans), *_said(write)),
        corpora.chat(corpora.user(" ".join(shared.split()[:12])), *_said(write)),
        corpora.chat(system, *corpora.exchange(write)),
    ]
    names = ("eval_row_in_train", "eval_ngram_in_train", "eval_ngram_in_train")
    evaluation.planted = [(20 + n, name, None) for n, name in enumerate(names)]
    corpora.write_corpus(train, tmp_path / "train.jsonl")
    expected = corpora.write_corpus(evaluation, tmp_path / "eval.jsonl")
    assert found(tmp_path / "train.jsonl", tmp_path / "eval.jsonl") == expected


def _said(write: corpora.Writer) -> list[corpora.Turn]:
    return [corpora.answer(write.text())]


def hits(encode: Encoder, *messages: Message, spoil: bool = False) -> dict[str, list[Hit]]:
    """Return what the audit says of one row, by class."""
    row = Conversation(messages, source="f#0")
    encoded = encode([row])
    if spoil:  # as if the end of every answer were masked
        samples = [
            replace(one, trained=tuple((start, end - 1) for start, end in one.trained))
            for one in encoded[0].samples
        ]
        encoded = [replace(encoded[0], samples=tuple(samples))]
    (notes,) = inspect_rows([row], encoded, vocabulary_of(encode.tokenizer, encode.template))
    told: dict[str, list[Hit]] = {}
    for name, hit in notes.hits:
        told.setdefault(name, []).append(hit)
    return told


QUESTION, ANSWER = Message("user", "What is it?"), Message("assistant", "A root.", train=True)
TEXT = Message("text", "A root used in tonics.", train=True)


def test_an_end_that_is_not_learned() -> None:
    again = (Message("user", "And now?"), Message("assistant", "Still a root.", train=True))
    told = hits(encoder(), QUESTION, ANSWER, *again, spoil=True)
    assert told == {"end_token_not_learned": [Hit(2), Hit(4)]}
    told = hits(TextEncoder(byte_level(), CUTOFF), TEXT, spoil=True)
    assert told == {"end_token_not_learned": [Hit()]}


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("in_template", "by_tokenizer", "in_chat", "in_text"),
    [
        ("<s>", "<s>", [], []),
        ("<s>", "", [], []),
        ("", "", [], []),
        ("", "<s>", ["missing_bos"], []),
        ("<s>", "<s> <s>", [], ["double_bos"]),
    ],
)
def test_the_beginning_of_samples(
    tmp_path: Path, in_template: str, by_tokenizer: str, in_chat: list[str], in_text: list[str]
) -> None:
    tokenizer = plain_byte_level()
    if by_tokenizer:
        single = f"{by_tokenizer} $A"
        processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = processor
    path = tmp_path / "own.jinja"
    path.write_text(CHATML.replace("{{ bos_token }}", in_template), encoding="utf-8")
    encode = build_encoder(DataArgs(template=str(path), cutoff_len=CUTOFF), tokenizer)
    assert [*hits(encode, QUESTION, ANSWER)] == in_chat
    assert [*hits(TextEncoder(tokenizer, CUTOFF), TEXT)] == in_text


def test_a_row_that_the_template_cannot_show_does_not_hide_the_others(tmp_path: Path) -> None:
    write = corpora.Writer(0)
    rows = [corpora.chat(*corpora.exchange(write)) for _ in range(9)]
    rows[4]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    rows[6]["messages"][1]["content"] = "?"
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    path = tmp_path / "own.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    path.write_text(refusal + CHATML, encoding="utf-8")
    assert found(tmp_path / "rows.json", encode=encoder(str(path))) == {
        ("contract_unproved", f"{tmp_path}/rows.json#4", None),
        ("near_empty_answer", f"{tmp_path}/rows.json#6", 2),
    }


def test_a_prompt_that_serving_never_sends() -> None:
    long = Message("user", "What is it? " * CUTOFF)
    told = hits(encoder(truncation="llamafactory"), long, ANSWER)
    assert told["prompt_not_served"] == [Hit(2)]


@pytest.mark.parametrize(
    ("text", "is_empty"),
    [("<think>\nlong words\n</think>\n\n…", True), ("a.", True), ("?!", True), ("👍", True),
     ("A.", False), ("7", False), ("是。", False), ("ok", False), ("é5", False)],
)  # fmt: skip
def test_an_answer_is_empty_without_two_letters_or_a_word(text: str, is_empty: bool) -> None:
    told = hits(encoder(), QUESTION, Message("assistant", text, train=True))
    assert ("near_empty_answer" in told) == is_empty


@pytest.mark.parametrize(("enable_thinking", "turns"), [(True, [4]), (False, [2]), (None, [])])
def test_answers_that_think_otherwise_than_serving(
    enable_thinking: bool | None, turns: list[int]
) -> None:
    thinks = Message("assistant", "<think>\nwell\n</think>\n\nA root.", train=True)
    told = hits(
        encoder("qwen3", enable_thinking=enable_thinking), QUESTION, thinks, QUESTION, ANSWER
    )
    assert [hit.turn for hit in told.get("thought_unasked", [])] == turns


def test_the_turn_of_a_cut_answer_is_that_of_the_row() -> None:
    history = (QUESTION, ANSWER) * 60
    told = hits(
        encoder(), *history, QUESTION, Message("assistant", "A root. " * CUTOFF, train=True)
    )
    assert [hit.turn for hit in told["answer_cut"]] == [122]


def test_workers_change_nothing(tmp_path: Path) -> None:
    corpora.write_corpus(corpora.make_corpus(1, names=tuple(corpora.PLANTS)), tmp_path / "r.jsonl")
    args = DataArgs(dataset=(str(tmp_path / "r.jsonl"),))
    alone, together = (
        audit_datasets(replace(args, preprocessing_num_workers=n), encoder(), limits={}).to_dict()
        for n in (1, 2)
    )
    assert alone == together


def test_a_file_that_cannot_be_read_to_its_end_is_a_finding_and_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"instruction": "a b", "output": "c d"}, {"instruc', encoding="utf-8")
    args = DataArgs(dataset=(str(path),))
    audit = audit_datasets(args, encoder(), limits={})
    (one,) = audit.sets.values()
    assert (one.rows, [*one.findings]) == (1, ["malformed_json"])
    with pytest.raises(Exception, match=r"cannot be read.*not JSON"):
        audit.check()


def test_counts_and_what_is_stored_come_back() -> None:
    audit = SetAudit()
    row = Conversation((QUESTION, ANSWER), source="f#0")
    encode = encoder()
    vocabulary = vocabulary_of(encode.tokenizer, encode.template)
    (notes,) = inspect_rows([row], encode([row]), vocabulary)
    audit.count(notes)
    for number in range(MOST_PLACES + 5):
        audit.add("duplicate_row", f"f#{number}", [Hit(None, "same as f#0")])
    length = len(encode([row])[0].samples[0].input_ids)
    trained = len(byte_level().encode("A root.<|im_end|>"))
    values = audit.to_dict()
    assert (values["rows"], values["turns"], values["tokens"]) == (1, 2, length)
    assert values["supervised_tokens"] == trained
    assert sum(_numbers(values["length_histogram"])) == 1
    assert values["findings"]["duplicate_row"]["rows"] == MOST_PLACES + 5
    assert len(values["findings"]["duplicate_row"]["places"]) == MOST_PLACES
    assert from_dict(json.loads(json.dumps(values))) == audit
    total = joined([audit, audit])
    assert (total.rows, total.tokens, total.share("duplicate_row")) == (2, 2 * length, 1005)


def _numbers(histogram: Mapping[str, int]) -> list[int]:
    assert all(int(low) <= int(high) for low, high in (key.split("-") for key in histogram))
    return [*histogram.values()]


def test_the_documented_classes_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [[part.strip("| `") for part in line] for line in lines] == [
        *([name, one.severity, one.meaning] for name, one in OWN_DEFECTS.items()),
        *([kind, meaning] for kind, meaning in ERROR_KINDS.items() if kind in DEFECTS),
    ]
