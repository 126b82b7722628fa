"""The command line: commands are found, errors become one line and a code, help is light."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from llmtuner import __version__
from llmtuner.cli import main as cli
from llmtuner.cli.commands import COMMANDS
from llmtuner.cli.main import main
from llmtuner.extras.errors import (
    ConfigError,
    ConfigErrors,
    DataError,
    DistributedError,
    LayoutError,
    LlmtunerError,
    ModelError,
    NonFiniteError,
    StorageError,
)

NAMES = [name.replace("_", "-") for name in COMMANDS.names()]
SOURCE = Path(cli.__file__).parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Return a function that makes `work` the only command."""

    def install(run: Callable[[list[str]], int]) -> None:
        commands = SimpleNamespace(get=lambda name: run, names=lambda: ["work"])
        monkeypatch.setattr(cli, "COMMANDS", commands)

    return install


Install = Callable[[Callable[[list[str]], int]], None]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("Wrong."), 2),
        (ConfigErrors([ConfigError("Wrong."), ConfigError("Worse.")]), 2),
        (DataError("Wrong."), 3),
        (ModelError("Wrong."), 4),
        (NonFiniteError("Wrong."), 5),
        (StorageError("Wrong."), 6),
        (DistributedError("Wrong."), 7),
        (LayoutError("Wrong."), 8),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_becomes_a_line_and_a_code(
    command: Install, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def run(words: list[str]) -> int:
        raise error

    command(run)
    assert main(["work"]) == code
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "Traceback" not in seen.err
    assert seen.err.strip() == (f"Error: {error}" if code != 130 else "Interrupted.")


def test_sigterm_lets_a_command_tidy_up(
    command: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(words: list[str]) -> int:
        with TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            return time.sleep(5) or 0

    command(run)
    assert main(["work"]) == 143
    assert capsys.readouterr().err == "Ended by SIGTERM.\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("words", [["work", "--debug"], ["--debug", "work"]])
def test_debug_shows_where_an_error_came_from(command: Install, words: list[str]) -> None:
    def run(words: list[str]) -> int:
        assert words == []
        raise LlmtunerError("Wrong.")

    command(run)
    with pytest.raises(LlmtunerError, match="Wrong"):
        main(words)


def test_a_bug_is_not_dressed_up_as_the_users_error(command: Install) -> None:
    def run(words: list[str]) -> int:
        raise ZeroDivisionError

    command(run)
    with pytest.raises(ZeroDivisionError):
        main(["work"])


@pytest.mark.parametrize("code", [0, 3])
def test_the_command_gets_the_other_words_and_its_code_is_the_answer(
    command: Install, code: int
) -> None:
    seen: list[str] = []

    def run(words: list[str]) -> int:
        seen.extend(words)
        return code

    command(run)
    assert main(["work", "a.yaml", "--x", "1"]) == code
    assert seen == ["a.yaml", "--x", "1"]


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]], ids=str)
def test_the_overview_lists_every_command_with_a_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    listed = {line[0]: line[1] for line in lines if len(line) == 2}
    for name in NAMES:
        doc = COMMANDS.module(name.replace("-", "_")).__doc__
        assert listed[name] == (doc or "").splitlines()[0]
    assert {"train", "chat", "export", "compare", "demo-model"} <= set(NAMES)


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]], ids=str)
def test_the_version_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"llmtuner {__version__}\n"


@pytest.mark.parametrize(
    ("word", "nearest"), [("trian", "train"), ("exprot", "export"), ("chatt", "chat")]
)
def test_an_unknown_command_names_the_nearest(
    word: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["qqqq", "_options", "../train", "train.run"])
def test_what_is_no_command_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    seen = capsys.readouterr().err
    assert "Unknown command" in seen
    assert "train" in seen


def test_a_flag_in_the_place_of_the_command_is_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--do_train"]) == 2
    seen = capsys.readouterr().err
    assert "The command is missing" in seen
    assert "demo-model" in seen


HEAVY = ("torch", "transformers", "datasets", "peft", "numpy", "rich", "ruamel.yaml")


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)], ids=" ".join)
def test_help_of_every_command_is_light(words: list[str]) -> None:
    heavy = HEAVY if words else (*HEAVY, "pydantic")  # the overview needs no option
    code = (
        "import sys\n"
        "from llmtuner.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        f"heavy = set({heavy}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " ".join(["llmtuner", *words]) in done.stdout
    assert done.stderr == ""


# ---- commands that are small enough to run here ----


def test_a_demo_model_that_is_there_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("mine")
    assert main(["demo-model", "--output_dir", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.append(str(Path(__file__).parents[1] / "inference"))
    from tiny_chat import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("cli") / "model")


def talk(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    flags = ["--model_name_or_path", str(folder), "--do_sample", "false"]
    return main(["chat", *flags, "--max_new_tokens", "6", *words])


@pytest.mark.parametrize("end", ["quit\n", "exit\n", ""], ids=["quit", "exit", "end of input"])
def test_chat_answers_until_the_user_leaves(
    chat_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str,
) -> None:
    assert talk(chat_folder, f"hello\n\nhow are you\n{end}", monkeypatch) == 0
    assert capsys.readouterr().out.count("Assistant: ") == 2


def test_chat_remembers_until_it_is_told_to_forget(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(chat_folder, "hello\nhello\nclear\nhello\n", monkeypatch) == 0
    out = capsys.readouterr().out
    first, second, third = (part.split("User: ")[0] for part in out.split("Assistant: ")[1:])
    assert first == third
    assert first != second


def test_chat_without_a_model_ends_with_the_code_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(tmp_path / "nowhere", "hello\n", monkeypatch) == 4
    assert "nowhere" in capsys.readouterr().err


def test_compare_shows_both_answers_to_every_question(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(chat_folder)
    words = ["compare", "--model_name_or_path", folder, "--tuned_model", folder]
    assert main([*words, "--max_new_tokens", "1", "--prompts", "hello", "[bold]x"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    by_question = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert {"hello", "[bold]x"} <= set(by_question)
    assert by_question["hello"][0] == by_question["hello"][1]


def test_a_wrong_variable_of_a_launcher_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["train", "--stage", "sft"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("Error: WORLD_SIZE")
    assert "'two'" in told[0]
