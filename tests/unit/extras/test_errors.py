"""Error messages say where, what, what was given, what is allowed and what to do; codes differ."""

import pickle
from typing import get_args

import pytest

from llmtuner.extras.error_kinds import ERROR_KINDS, ErrorKind
from llmtuner.extras.errors import (
    ConfigError,
    ConfigErrors,
    DataError,
    DistributedError,
    EvalError,
    LlmtunerError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    StorageError,
    TemplateError,
    nearest,
)

EXIT_CODES = {
    LlmtunerError: 1,
    ConfigError: 2,
    ConfigErrors: 2,
    MissingExtraError: 2,
    DataError: 3,
    TemplateError: 3,
    EvalError: 3,
    ModelError: 4,
    NonFiniteError: 5,
    StorageError: 6,
    DistributedError: 7,
}


@pytest.mark.parametrize(("kind", "code"), EXIT_CODES.items(), ids=lambda item: str(item))
def test_every_kind_of_error_has_its_exit_code(kind: type[LlmtunerError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, LlmtunerError)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "It is wrong."),
        ({"where": "--flag"}, "--flag: It is wrong."),
        ({"got": "x y"}, "It is wrong. Got: 'x y'."),
        ({"got": 0}, "It is wrong. Got: 0."),
        ({"got": ""}, "It is wrong. Got: ''."),
        ({"allowed": ["a", 2]}, "It is wrong. Allowed: a, 2."),
        ({"allowed": "from 1 up"}, "It is wrong. Allowed: from 1 up."),
        ({"fix": "do this"}, "It is wrong. Fix: do this."),
        ({"fix": "do this."}, "It is wrong. Fix: do this."),
        (
            {"where": "f:3", "got": [1], "allowed": ("b",), "fix": "choose b"},
            "f:3: It is wrong. Got: [1]. Allowed: b. Fix: choose b.",
        ),
    ],
)
def test_the_parts_of_a_message_stand_in_one_line(given: dict[str, object], text: str) -> None:
    assert str(ConfigError("It is wrong.", **given)) == text  # type: ignore[arg-type]


def test_a_long_value_is_shortened_and_its_length_told() -> None:
    text = str(DataError("Too long.", got="x" * 1000))
    assert len(text) < 400
    assert text.endswith("… (1002 characters).")


def test_a_value_of_300_characters_is_shown_whole() -> None:
    assert str(DataError("Long.", got="x" * 298)) == f"Long. Got: '{'x' * 298}'."


def test_a_line_break_in_a_value_does_not_break_the_line() -> None:
    assert "\n" not in str(DataError("Odd.", got="a\nb"))


def test_a_place_can_be_added_later() -> None:
    error = ModelError("It is gone.", got=1, allowed=["a"], fix="look").at("dir/x")
    assert type(error) is ModelError
    assert str(error) == "dir/x: It is gone. Got: 1. Allowed: a. Fix: look."


def test_several_problems_stand_one_a_line() -> None:
    problems = [ConfigError("One.", where="--a"), DataError("Two.", got=2)]
    error = ConfigErrors(problems)
    assert str(error).splitlines() == ["--a: One.", "Two. Got: 2."]
    assert error.problems == tuple(problems)
    assert isinstance(error, ConfigError)


def test_a_missing_library_names_the_extra_that_brings_it() -> None:
    text = str(MissingExtraError("wandb", extra="trackers", needed_for="--report_to wandb"))
    assert text == (
        "--report_to wandb needs the library 'wandb', which is not installed. "
        "Fix: pip install 'llmtuner[trackers]'."
    )


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("learning_rat", "learning_rate"),
        ("lerning_rate", "learning_rate"),
        ("cutof_len", "cutoff_len"),
        ("cutoff_len", "cutoff_len"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_found_or_none(word: str, found: str | None) -> None:
    assert nearest(word, iter(["cutoff_len", "learning_rate", "seed"])) == found


def test_every_kind_of_data_error_is_explained() -> None:
    assert tuple(ERROR_KINDS) == get_args(ErrorKind)
    assert all(ERROR_KINDS.values())


def test_a_data_error_keeps_its_kind() -> None:
    error = DataError("It is empty.", kind="empty_turn").at("f:1")
    assert (error.kind, error.where) == ("empty_turn", "f:1")
    assert pickle.loads(pickle.dumps(error)).kind == "empty_turn"
    assert DataError("It is odd.").kind == "bad_row"
    assert TemplateError("It drops tools.").kind == "template_contract"


def test_any_error_takes_a_place() -> None:
    missing = MissingExtraError("x", extra="y", needed_for="z").at("--flag")
    assert str(missing).startswith("--flag: z needs the library 'x'")
