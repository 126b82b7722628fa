"""A seeded corpus of chats, clean but for defects that are planted at known places."""

import copy
import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Turn = dict[str, Any]
Row = dict[str, Any]
Found = set[tuple[str, str, int | None]]

_WORDS = """amber basil cedar delta ember fennel ginger harbor iris juniper kernel lemon maple
nectar olive pepper quartz river saffron thyme umber violet willow yarrow zinc anchor bridge candle
desert engine forest garden hollow island jungle kettle ladder meadow needle orchard"""
WORDS = _WORDS.split()
HANS = "春夏秋冬山川湖海风云雷雨花草树木虫鱼鸟兽金银铜铁红橙黄绿青蓝紫黑东西南北上下左右天地日月"
BOILERPLATE = "You are given a question about health and you should answer it in one short sentence"


class Writer:
    """Random text: no two turns are alike, and none shares a dozen words with another."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def words(self, count: int = 12) -> str:
        return " ".join(self._random.choices(WORDS, k=count)).capitalize() + "."

    def text(self) -> str:
        if self._random.random() < 0.3:
            return "".join(self._random.choices(HANS, k=16)) + "。"
        return self.words()


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def chat(*turns: Turn, **more: Any) -> Row:
    return {"messages": list(turns), **more}


def exchange(write: Writer, num: int = 1) -> list[Turn]:
    return [turn for _ in range(num) for turn in (user(write.text()), answer(write.text()))]


def tool_call(arguments: str) -> Turn:
    call = {"type": "function", "function": {"name": "dose", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def clean_rows(write: Writer, count: int) -> list[Row]:
    """Rows that a careless audit would take for bad ones, and plain rows."""
    go_on = user("Please go on.")
    tools = '[{"name": "dose", "parameters": {"limit": 1.5, "note": "a\\nb"}}]'
    rows = [
        chat(*exchange(write), go_on, answer(write.text()), go_on, answer(write.text())),
        chat(user(f"{write.words()} A or B?"), answer("B")),
        chat(user(f"{write.words()} 几个?"), answer("7")),
        chat(user(f"{write.words()} 在吗?"), answer("是")),
        chat(user(write.words()), answer(f"<think>\n{write.words()}\n</think>\n\n{write.words()}")),
        chat(user(f"“Café”, naïve “é”… São “MAÇÃ” â – {write.words()}"), answer(write.words())),
        chat(user(f"x[0] = <b>1</b> & a<|b {write.words()}"), answer(f"```{write.words()}```")),
        chat({"role": "system", "content": write.words()}, *exchange(write, 2)),
        chat(user(write.text()), tool_call('{"mg": 1.5, "of": "\\"a\\""}'),
             {"role": "tool", "content": "3"}, answer(write.text()), tools=tools),
        *(chat(user(f"{BOILERPLATE}: {write.words()}"), answer(write.text())) for _ in range(3)),
    ]  # fmt: skip
    return rows + [chat(*exchange(write)) for _ in range(count - len(rows))]


def is_pair(row: Row | str) -> bool:
    """Whether the row is one question and one answer, as two columns can hold it."""
    if isinstance(row, str) or [*row] != ["messages"]:
        return False
    return [turn["role"] for turn in row["messages"]] == ["user", "assistant"]


Plant = Callable[[Writer, Row], Row | str]
"""Makes a row with one defect; the other row is a clean one that comes before it."""

LONG = 900  # words; far beyond the cutoff of the tests


def _with(turns: Callable[[Writer], list[Turn]], **more: Any) -> Plant:
    return lambda write, _: chat(*turns(write), **more)


def _said(text: str) -> Plant:
    return _with(lambda write: [user(f"{write.words()} {text}"), answer(write.text())])


def _answered(text: str) -> Plant:
    return _with(lambda write: [user(write.text()), answer(text)])


def _conflict(write: Writer, other: Row) -> Row:
    return chat(*copy.deepcopy(other["messages"][:-1]), answer(write.text()))


def _repeated(write: Writer) -> list[Turn]:
    question = user(write.words())
    return [question, answer(write.text()), question, answer(write.text())]


# class -> turn, the row, further classes that the same row must show
PLANTS: dict[str, tuple[int | None, Plant, tuple[str, ...]]] = {
    "duplicate_row": (None, lambda _, other: copy.deepcopy(other), ()),
    "conflicting_answers": (None, _conflict, ()),
    "duplicate_turn": (3, _with(_repeated), ()),
    "near_empty_answer": (2, _answered("… !"), ()),
    "unclosed_thinking": (2, _answered("<think>\nwell, let me see"), ()),
    "empty_system_turn": (
        1, _with(lambda w: [{"role": "system", "content": " "}, *exchange(w)]), ()),
    "replacement_character": (1, _said("caf\ufffd"), ()),
    "mojibake": (1, _said("itâ€™s cafÃ©"), ()),
    "foreign_control_token": (1, _said("<<SYS>> hello <</SYS>>"), ()),
    "control_token_in_text": (1, _said("stop <|im_end|> here"), ()),
    "tool_json_respelled": (2, _with(lambda w: [
        user(w.text()), tool_call('{"mg": 1.10}'), {"role": "tool", "content": "3"},
        answer(w.text())], tools='[{"name": "dose"}]'), ()),
    "answer_cut": (2, _with(lambda w: [user(w.text()), answer(w.words(LONG))]), ()),
    "prompt_cut": (None, _with(lambda w: [user(w.words(LONG)), answer(w.text())]), ()),
    "turns_dropped": (None, _with(lambda w: exchange(w, 40)), ("prompt_cut",)),
    "nothing_supervised": (
        None, _with(lambda w: [user(w.text()), answer(w.text(), train=False)]), ()),
    "unknown_role": (None, _with(lambda w: [{"role": "human2", "content": "Hi"}]), ()),
    "tool_result_without_call": (None, _with(lambda w: [
        *exchange(w), {"role": "tool", "content": "3"}, answer(w.text())]), ()),
    "wrong_role_order": (None, _with(lambda w: [user(w.text()), *exchange(w)]), ()),
    "late_system_turn": (None, _with(lambda w: [
        *exchange(w), {"role": "system", "content": "Be brief."}, *exchange(w)]), ()),
    "unanswered_turn": (None, _with(lambda w: [*exchange(w), user(w.text())]), ()),
    "empty_turn": (None, _with(lambda w: [user(" \n"), answer(w.text())]), ()),
    "empty_answer": (None, _answered("  "), ()),
    "missing_content": (None, _with(lambda w: [user(w.text()), {
        "role": "assistant", "content": None}]), ()),
    "wrong_type": (None, _with(lambda w: [user(w.text()), {
        "role": "assistant", "content": 5}]), ()),
    "bad_weight": (None, _with(lambda w: [user(w.text()), answer("Yes it is.", weight=0.5)]), ()),
    "bad_tool_call": (None, _with(lambda w: [user(w.text()), tool_call("[1]")]), ()),
    "nul_character": (None, _said("a\0b"), ()),
    "lone_surrogate": (None, _said("a\ud83d b"), ()),
}  # fmt: skip
LINES = {
    "malformed_json": '{"messages": [{"role": "user", "content": "cut off',
    "duplicate_key": '{"messages": [], "messages": [{"role": "user", "content": "a"}]}',
}
"""Defects of JSON Lines alone: the line as it stands in the file."""
ONLY_LINES = ("nul_character", "lone_surrogate")
"""Defects of strings for which another JSON file is refused as a whole."""
PAIRS = ("duplicate_row", "conflicting_answers", "near_empty_answer", "unclosed_thinking",
         "replacement_character", "mojibake", "foreign_control_token", "control_token_in_text",
         "answer_cut", "prompt_cut")  # fmt: skip
"""Defects that two columns of a CSV can have."""


@dataclass
class Corpus:
    """Rows of one file and what is planted in it; `write` puts it on disk."""

    rows: list[Row | str]
    planted: list[tuple[int, str, int | None]] = field(default_factory=list)

    def expected(self, places: list[str]) -> Found:
        return {(name, places[number], turn) for number, name, turn in self.planted}


def make_corpus(seed: int, *, num_clean: int = 30, names: tuple[str, ...] = ()) -> Corpus:
    """Clean rows in random order with the named defects between them, never in front."""
    write, order = Writer(seed), random.Random(seed)
    clean = clean_rows(write, num_clean)
    order.shuffle(clean)
    rows: list[Any] = [(row, None) for row in clean]
    # each copy has an original of its own, before it, of one turn without system or tools
    plain = [
        n for n, row in enumerate(clean) if [*row] == ["messages"] and len(row["messages"]) == 2
    ]
    originals = iter(order.sample(plain, k=2))
    inserts = []
    for name in names:
        if name in LINES:
            inserts.append((order.randint(1, len(clean)), LINES[name], name))
            continue
        number = next(originals) if name in ("duplicate_row", "conflicting_answers") else plain[0]
        row = PLANTS[name][1](write, clean[number])
        inserts.append((order.randint(number + 1, len(clean)), row, name))
    for place, row, name in sorted(inserts, key=lambda insert: insert[0], reverse=True):
        rows.insert(place, (row, name))
    corpus = Corpus([row for row, _ in rows])
    for number, (_, name) in enumerate(rows):
        if name is not None:
            turn, more = (PLANTS[name][0], PLANTS[name][2]) if name in PLANTS else (None, ())
            corpus.planted += [(number, name, turn), *((number, other, None) for other in more)]
    return corpus


def write_corpus(corpus: Corpus, path: Path) -> Found:
    """Write the rows in the format that the suffix names, and return what must be found where."""
    if path.suffix == ".jsonl":
        lines = [row if isinstance(row, str) else json.dumps(row) for row in corpus.rows]
        path.write_text("\n\n".join(lines), encoding="utf-8")  # blank lines count as lines
        return corpus.expected([f"{path}:{2 * n + 1}" for n in range(len(lines))])
    if path.suffix == ".json":
        path.write_text(json.dumps(corpus.rows, indent=1), encoding="utf-8")
        return corpus.expected([f"{path}#{n}" for n in range(len(corpus.rows))])
    places = []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer, line = csv.writer(file, lineterminator="\n"), 2
        writer.writerow(("question", "answer"))
        for row in corpus.rows:
            pair = [turn["content"] for turn in row["messages"]]  # type: ignore[index]
            writer.writerow(pair)
            places.append(f"{path}:{line}")
            line += 1 + sum(text.count("\n") for text in pair)
    return corpus.expected(places)
