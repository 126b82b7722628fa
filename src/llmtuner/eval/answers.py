"""The letter that a written answer chooses, or that it chooses none."""

import re
import unicodedata

UNKNOWN = "UNKNOWN"
"""Stands for an answer that names no letter, or several."""

_THOUGHT = re.compile(r"<think>.*?</think>|^.*</think>|<think>.*\Z", re.DOTALL)
_OPEN, _CLOSE = r"[\s(\[{\"'“‘「【《*_$]*", r"[\s)\]}\"'”’」】》*_$]*"
_COPULA = r"(?:\s*(?:is|would be|should be|must be|应该是|应当是|应为|是|为|选|:|=))+"
_CLAIMS = (
    rf"\\boxed\s*\{{{_OPEN}(?:\\text\s*\{{)?{_OPEN}(?P<letter>[%s])(?![A-Za-z])",
    rf"(?:answer|correct (?:option|choice)|答案|正确选项|正确的选项|正确的是){_COPULA}"
    rf"{_OPEN}(?:option |choice |选项)?{_OPEN}(?P<letter>[%s])(?![A-Za-z])",
    rf"(?<![不没未A-Za-z])(?:应选|故选|所以选|因此选|我选|选择?|choose|select|pick)"
    rf"{_OPEN}(?:option |choice |选项)?{_OPEN}(?P<letter>[%s])(?![A-Za-z])",
)
_ALONE = r"(?<![A-Za-z])(?P<letter>[%s])(?![A-Za-z'])(?!(?<=A)\s+(?!and\b|or\b)[a-z])"  # no article
_LISTED = r"\A%s(?:\s*(?:[、,/&+]|and\b|or\b|和|与|或|及)\s*%s)[%s](?![A-Za-z])"
_BEGINS = rf"^{_OPEN}(?P<letter>[%s]){_CLOSE}(?:[.。,，、:;!]|$)"


def extract_letter(text: str, letters: str = "ABCD") -> str:
    """Return the letter that an answer chooses, or `UNKNOWN`.

    Thoughts do not count. Claims ("the answer is B", "答案是B", "选 B", a box) win over a letter
    that the answer begins with, and this over the only letter that stands alone. Several letters on
    the strongest of these levels are no choice; so is a list ("A and B").

    Args:
        text: what the model wrote.
        letters: names of the choices.
    """
    shown = unicodedata.normalize("NFKC", _THOUGHT.sub("", text)).strip()
    paragraph = shown.split("\n\n")[0]  # a base model goes on with questions of its own
    found = (
        _claimed(shown, letters)
        or _matches(_BEGINS, paragraph, letters)
        or _matches(_ALONE, shown, letters)
    )
    if len(found) != 1 or _is_listed(shown, letters, found):
        return UNKNOWN
    return next(iter(found))


def _claimed(shown: str, letters: str) -> set[str]:
    box, *others = (_matches(claim, shown, letters) for claim in _CLAIMS)
    return box or set().union(*others)


def _matches(pattern: str, text: str, letters: str) -> set[str]:
    return {letter for letter, _ in _places(pattern, text, letters)}


def _places(pattern: str, text: str, letters: str) -> list[tuple[str, int]]:
    flags = re.IGNORECASE | re.MULTILINE
    found = re.finditer(pattern.replace("%s", letters), text, flags)
    return [(match["letter"], match.end("letter")) for match in found if match["letter"].isupper()]


def _is_listed(shown: str, letters: str, chosen: set[str]) -> bool:
    """Say whether a chosen letter is followed by another one: "A and B", "A、B"."""
    following = _LISTED % (_CLOSE, _OPEN, letters)
    places = _places(_ALONE, shown, letters)
    return any(re.match(following, shown[end:]) for letter, end in places if letter in chosen)
