"""Help shows every option of a command, and nothing here needs torch."""

import subprocess
import sys

import pytest

from llmtuner.hparams.options import COMMAND_GROUPS, GROUPS, all_options, options_of
from llmtuner.hparams.parser import help_text

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy")


def test_parsing_and_help_import_nothing_heavy():
    code = (
        "import sys; from llmtuner.hparams.parser import help_text; help_text('train'); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMAND_GROUPS)
def test_help_starts_with_examples_and_fits_the_screen(command):
    text = help_text(command)
    lines = text.splitlines()
    assert lines[0].startswith(f"Usage: llmtuner {command}")
    assert f"  llmtuner {command} " in "\n".join(lines[:15])
    assert max(len(line) for line in lines) <= 100
    assert "\u00a0" not in text


def test_help_of_train_names_every_option():
    text = help_text("train", all=True)
    hidden = {"use_cache", *(name for name in options_of("train") if name.startswith("export_"))}
    hidden |= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    missing = {name for name in options_of("train") if f"--{name}" not in text.split()}
    assert missing == hidden


def test_help_shows_defaults_choices_and_units():
    words = " ".join(help_text("train").split())
    assert "Longest training sequence. [tokens; default 2048]" in words
    assert "[lora|freeze|full; default lora]" in words


def test_option_names_are_unique_over_the_groups():
    names = [name for owner in GROUPS.values() for name in vars(owner)["__pydantic_fields__"]]
    assert sorted(names) == sorted(set(names))
    assert set(names) - {"other"} <= set(all_options())


def test_every_own_option_has_a_sentence_of_help():
    for option in all_options().values():
        if option.group != "other":
            assert option.help.endswith("."), option.name
            assert option.help[0].isupper() or option.help.startswith(("pt", "bf", "fl")), option
