"""Letters are taken out of written answers; where there is none or more than one, it says so."""

import pytest

from llmtuner.eval.answers import UNKNOWN, extract_letter

CHOSEN = {
    "B": ["答案是B", "B。", "B", "选 B", "(B)", "Ｂ", "B. Vitamin C", "B\n\nnext: A?", "（B）肾"],
    "C": ["The answer is C.", "答案为 C", "\\boxed{C}", "I'd choose option (C).", "不选A，选C"],
    "D": ["Answer: **D**", "正确答案是：(D) 肺", "我选择D。", "D选项", "<think>A? C?</think>\nD"],
    "A": ["正确答案应该是Ａ", "Vitamin C is it: answer is A", "A is wrong? No: the answer is A."],
    UNKNOWN: [
        *("ABCD", "A. x\nB. y\nC. z\nD. w", "A、B都对", "A and B", "答案是A和B", "选B或C", ""),
        *("The answer is A. No, the answer is B.", "<think>the answer is A", "b", "Because"),
        *("A patient should rest", "肾", "E"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "letter"), [(text, letter) for letter, texts in CHOSEN.items() for text in texts]
)
def test_letter(text: str, letter: str) -> None:
    assert extract_letter(text) == letter
