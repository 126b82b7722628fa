"""Defects that stand in the text of a row, whatever the tokenizer makes of it."""

import json
import re
from collections.abc import Iterator
from itertools import islice

from llmtuner.data.audit.row import AuditedRow, Hit
from llmtuner.data.audit.units import has_units
from llmtuner.data.conversation import Message

_LONG_ENOUGH = 8
"""Words or CJK characters from which on a repeated turn is no everyday phrase ("go on")."""

_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_SINGLE_WORD = re.compile(r"[A-Z0-9\u3040-\u30ff\u3400-\u9fff]")
_FOREIGN = re.compile(
    r"<\|(?:im_(?:start|end|sep|user|assistant|system|middle)|endoftext|endofprompt|eo[tm]_id"
    r"|(?:start|end)_header_id|(?:begin|end)_of_text|python_tag|(?:start|end)_of_role|user"
    r"|assistant|system|observation|end|return|message|channel|START_OF_TURN_TOKEN"
    r"|END_OF_TURN_TOKEN)\|>|<｜(?:User|Assistant|begin▁of▁sentence|end▁of▁sentence)｜>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
# What UTF-8 looks like after it was read as Windows-1252; sequences that real text never has.
_HIGH = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(
    f"â€[{_HIGH}]|ï¿½|Ã[¡-ª¬-º¼-¿]|Â[\xa0£©®°±²³·½]|(?:[ã-é][{_HIGH}]{{2}}){{2}}"
    "|锟斤拷|烫烫烫|屯屯屯"
)
_MOJIBAKE_STARTS = "âïÃÂãäåæçèé锟烫屯"  # looking for each is much faster than the pattern
_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[0-9.eE+-]*')


def empty_system_turn(row: AuditedRow) -> Iterator[Hit]:
    """Find a system turn of white space: it also keeps the template from its own default."""
    first = row.conversation.messages[0]
    if first.role == "system" and not first.content.strip():
        yield Hit(1)


def duplicate_turn(row: AuditedRow) -> Iterator[Hit]:
    """Find a user turn or answer that repeats, word by word, one of the two turns before it."""
    messages = row.conversation.messages
    for number, message in enumerate(messages):
        own = message.content.strip()
        before = messages[max(number - 2, 0) : number]
        if message.role not in ("user", "assistant") or message.tool_calls or not own:
            continue
        for back, other in enumerate(reversed(before), start=1):
            is_same = other.content.strip() == own and other.role in ("user", "assistant")
            if is_same and has_units(own, _LONG_ENOUGH):
                yield Hit(number + 1, f"repeats turn {number + 1 - back}")
                break


def near_empty_answer(row: AuditedRow) -> Iterator[Hit]:
    """Find a trained turn with fewer than two letters or digits behind its thought.

    A choice (one digit or capital letter) is an answer, and so is a CJK character, which is a word.
    """
    for number, message in enumerate(row.conversation.messages, start=1):
        if message.train and not message.tool_calls and _says_nothing(message):
            yield Hit(number, message.content[-20:])


def _says_nothing(message: Message) -> bool:
    text = message.content
    thought = _THOUGHT.match(text)
    said: list[str] = []
    for character in islice(text, thought.end() if thought else 0, None):
        if character.isalnum():
            said.append(character)
            if len(said) > 1:
                return False
    return not said or not _SINGLE_WORD.match(said[0])


def unclosed_thinking(row: AuditedRow) -> Iterator[Hit]:
    """Find an answer that begins to think and never stops."""
    for number, message in enumerate(row.conversation.messages, start=1):
        opens = message.role == "assistant" and message.content.lstrip().startswith("<think>")
        if opens and "</think>" not in message.content:
            yield Hit(number)


def control_token_in_text(row: AuditedRow) -> Iterator[Hit]:
    """Find control tokens of this model in texts; they are encoded as ordinary characters."""
    own, answers = row.vocabulary.guards, row.vocabulary.answer_guards
    for turn, role, value in row.texts:
        for found in (answers if role == "assistant" else own).finditer(value):
            if not found[0].isalnum():  # one family has the control token "sop": also a word
                yield Hit(turn, found[0])
                break


def foreign_control_token(row: AuditedRow) -> Iterator[Hit]:
    """Find what other models have as control tokens: rows that were rendered once before."""
    own = row.vocabulary.guards
    for turn, _, value in row.texts:
        if "<" not in value and "[" not in value:
            continue
        for found in _FOREIGN.finditer(value):
            if not own.fullmatch(found[0]):
                yield Hit(turn, found[0])
                break


def replacement_character(row: AuditedRow) -> Iterator[Hit]:
    """Find U+FFFD, which stands where a file was decoded wrongly once."""
    for turn, _, value in row.texts:
        if "\ufffd" in value:
            yield Hit(turn, _around(value, value.index("\ufffd")))


def mojibake(row: AuditedRow) -> Iterator[Hit]:
    """Find text that was decoded with another encoding than it was written in."""
    for turn, _, value in row.texts:
        if value.isascii() or not any(start in value for start in _MOJIBAKE_STARTS):
            continue
        if found := _MOJIBAKE.search(value):
            yield Hit(turn, _around(value, found.start()))


def tool_json_respelled(row: AuditedRow) -> Iterator[Hit]:
    """Find numbers and strings in tool JSON that a template writes in another spelling."""
    conversation = row.conversation
    for turn, message in enumerate(conversation.messages, start=1):
        if row.vocabulary.writes_arguments_as_text:
            break
        for call in message.tool_calls:
            yield from _respelled(turn, call.arguments)
    if conversation.tools:
        yield from _respelled(None, conversation.tools)


def _respelled(turn: int | None, text: str) -> Iterator[Hit]:
    for found in _SCALAR.finditer(text):
        own = found[0]
        if own.isdigit() or (own[0] == '"' and "\\" not in own):
            continue
        try:
            other = json.dumps(json.loads(own), ensure_ascii=False)
        except ValueError:  # the reader has said so already
            return
        if other != own:
            yield Hit(turn, f"{own} becomes {other}")
            return


def _around(text: str, place: int) -> str:
    return text[max(place - 10, 0) : place + 10]
