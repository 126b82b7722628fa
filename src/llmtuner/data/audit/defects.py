"""Every class of defect, in one table; a new one is a function and an entry here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmtuner.data.audit import text_defects as text
from llmtuner.data.audit import token_defects as tokens
from llmtuner.data.audit.row import RowDetector
from llmtuner.data.audit.set_defects import SetDetector, conflicting_answers, duplicate_row
from llmtuner.extras.error_kinds import ERROR_KINDS

AUDIT_VERSION = 1
"""Raised when the same rows would have other findings."""

Severity = Literal["error", "warning", "note"]
"""It damages training or evaluation · probably not wanted · good to know."""


@dataclass(frozen=True)
class Defect:
    """One class of defect.

    Attributes:
        severity: how bad it is.
        meaning: one line for people.
        in_row: finds it in a row by itself.
        in_set: finds it by comparing the rows of one set. With neither of the two it is the
            reader that finds it, or the comparison of two sets.
    """

    severity: Severity
    meaning: str
    in_row: RowDetector | None = None
    in_set: SetDetector | None = None


OWN_DEFECTS: Mapping[str, Defect] = {
    "contract_unproved": Defect(
        "error",
        "training and serving cannot be shown to agree on the row",
        in_row=tokens.contract_unproved,
    ),
    "nothing_supervised": Defect(
        "error", "nothing of the row is trained, it is left out", in_row=tokens.nothing_supervised
    ),
    "double_bos": Defect(
        "error", "BOS stands twice in a row: two parts add it", in_row=tokens.double_bos
    ),
    "end_token_not_learned": Defect(
        "error",
        "a whole answer or document whose end is not trained: the model would not stop",
        in_row=tokens.end_token_not_learned,
    ),
    "eval_row_in_train": Defect("error", "an evaluation row is a training row too"),
    "eval_ngram_in_train": Defect(
        "warning", "an evaluation row shares 13 words or CJK characters in a row with training rows"
    ),
    "answer_cut": Defect(
        "warning", "an answer lost its tail, and its end token with it", in_row=tokens.answer_cut
    ),
    "turns_dropped": Defect(
        "warning", "answers that did not fit are not trained", in_row=tokens.turns_dropped
    ),
    "prompt_cut": Defect(
        "warning",
        "text or turns before an answer did not fit and are gone",
        in_row=tokens.prompt_cut,
    ),
    "prompt_not_served": Defect(
        "warning",
        "a prompt was cut inside its tokens: serving never sends it",
        in_row=tokens.prompt_not_served,
    ),
    "missing_bos": Defect(
        "warning",
        "the tokenizer begins texts with BOS, and the sample does not begin with it",
        in_row=tokens.missing_bos,
    ),
    "duplicate_row": Defect(
        "warning", "the row says exactly what an earlier row says", in_set=duplicate_row
    ),
    "conflicting_answers": Defect(
        "note",
        "the same question as in an earlier row, with another answer",
        in_set=conflicting_answers,
    ),
    "duplicate_turn": Defect(
        "warning",
        "a turn of at least 8 words or CJK characters repeats one of the two turns before it",
        in_row=text.duplicate_turn,
    ),
    "near_empty_answer": Defect(
        "warning",
        "a trained turn with fewer than two letters or digits, and no choice (B, 7) or CJK word",
        in_row=text.near_empty_answer,
    ),
    "unclosed_thinking": Defect(
        "warning",
        "an answer begins with <think> and has no </think>",
        in_row=text.unclosed_thinking,
    ),
    "empty_system_turn": Defect(
        "warning",
        "the system turn is empty, which still replaces the template's default",
        in_row=text.empty_system_turn,
    ),
    "replacement_character": Defect(
        "warning",
        "a text holds U+FFFD: it was decoded wrongly once",
        in_row=text.replacement_character,
    ),
    "mojibake": Defect(
        "warning",
        "a text was decoded with another encoding than it was written in (â€™, Ã©, 锟斤拷)",
        in_row=text.mojibake,
    ),
    "foreign_control_token": Defect(
        "warning",
        "a text holds a control token of another model, as if it was rendered before",
        in_row=text.foreign_control_token,
    ),
    "thought_unasked": Defect(
        "note",
        "an answer has no thought where serving thinks, or one where it does not",
        in_row=tokens.thought_unasked,
    ),
    "control_token_in_text": Defect(
        "note",
        "a text holds a control token of this model; it is encoded as ordinary characters",
        in_row=text.control_token_in_text,
    ),
    "tool_json_respelled": Defect(
        "note",
        "the template writes a number or string of tool JSON in another spelling (1.10 as 1.1)",
        in_row=text.tool_json_respelled,
    ),
}
"""Defects that the audit itself looks for, the worst first."""

_BY_SEVERITY: tuple[Severity, ...] = ("error", "warning", "note")
_NOT_OF_ROWS = ("audit_limit", "no_usable_rows", "template_contract")  # told in other words here
_REFUSALS: Mapping[str, Defect] = {
    kind: Defect("error", meaning)
    for kind, meaning in ERROR_KINDS.items()
    if kind not in _NOT_OF_ROWS
}
_ALL = {**OWN_DEFECTS, **_REFUSALS}

DEFECTS: Mapping[str, Defect] = {
    name: _ALL[name] for name in sorted(_ALL, key=lambda n: _BY_SEVERITY.index(_ALL[n].severity))
}
"""The same with the reasons for which the reader refuses a row, the worst first."""

ROW_DETECTORS: Mapping[str, RowDetector] = {
    name: defect.in_row for name, defect in DEFECTS.items() if defect.in_row is not None
}
SET_DETECTORS: Mapping[str, SetDetector] = {
    name: defect.in_set for name, defect in DEFECTS.items() if defect.in_set is not None
}
