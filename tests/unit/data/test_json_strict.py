"""Strict JSON: what parsers disagree about is refused with its place."""

import pytest

from llmtuner.data.json_strict import (
    JsonError,
    iter_array,
    line_and_column,
    parse_json,
    raw_objects,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        ('{"a": NaN}', "NaN"),
        ("[Infinity]", "Infinity"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "too large"),
        ('"\\ud800"', "surrogate"),
        ('"\\udc00"', "surrogate"),
        ('"\\ud800\\ud800\\udc00"', "surrogate"),
        ('"\\ud800 \\udc00"', "surrogate"),
        ('"a\\u0000b"', "NUL"),
        ('"a\0b"', "control character"),
        ("[1,]", ""),
        ('{"a": 1,}', ""),
        ('{"a": 1} {"b": 2}', "more text"),
        ("{'a': 1}", "property name"),
        ("", "expecting value"),
        ("[" * 100_000, "nesting"),
        ("[" * 101 + "]" * 101, "nesting"),
        ("1" * 5000, "digits"),
        ("\ufeff{}", "expecting value"),
    ],
)
def test_refuses(text: str, reason: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ('"\\\\ud800"', "\\ud800"),  # an escaped backslash, then plain letters
        ('"\u2028"', "\u2028"),
        ("[" * 100 + "]" * 100, None),
        (
            ' {"a": ["007", "2024-01-01", "true", "NaN"]} \r\n',
            {"a": ["007", "2024-01-01", "true", "NaN"]},
        ),
    ],
)
def test_accepts(text: str, value: object) -> None:
    parsed = parse_json(text)
    assert value is None or parsed == value


def test_offset_leads_to_line_and_column() -> None:
    text = '{"a": 1,\n "b": "\\ud800"}'
    with pytest.raises(JsonError) as caught:
        parse_json('{"a": 1,\n "b": oops}')
    assert line_and_column('{"a": 1,\n "b": oops}', caught.value.offset) == (2, 7)
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert line_and_column(text, caught.value.offset) == (2, 8)


def test_iter_array_yields_what_comes_before_the_fault() -> None:
    elements = iter_array('[{"a": 1}, 2 3]')
    assert next(elements)[0] == {"a": 1}
    assert next(elements)[0] == 2
    with pytest.raises(JsonError, match="expected ','"):
        next(elements)
    assert list(iter_array(" [ ] ")) == []
    with pytest.raises(JsonError):
        list(iter_array("[1] x"))
    with pytest.raises(JsonError):
        list(iter_array("[1"))


def test_raw_objects_keep_the_spelling() -> None:
    text = '[{"name": "f", "arguments": {"x":1e5 , "y": "\\u00e9"}}, {"name":"g"}]'
    first, second = raw_objects(text)
    assert first["arguments"] == '{"x":1e5 , "y": "\\u00e9"}'
    assert second == {"name": '"g"'}
    assert raw_objects("{ }") == [{}]
