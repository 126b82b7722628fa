"""`llmtuner data show`: one row in the terminal, as one JSON object, or on a page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmtuner.cli.main import main
from llmtuner.cli.token_print import print_row
from llmtuner.data.token_view import Cell, SampleView, TurnView

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tokenizer_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tokenizer's files alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for path in model_dir.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(model_dir / "chat_template.jinja", folder)
    return folder


@pytest.fixture
def show(tokenizer_dir: Path, data_dir: Path, capsys: Capture) -> Any:
    """Return a function that runs the command and gives back exit code, stdout and stderr."""

    def run(*flags: str, dataset: str = "qa") -> tuple[int, str, str]:
        argv = ["data", "show", "--model_name_or_path", str(tokenizer_dir), "--dataset", dataset]
        code = main([*argv, "--dataset_dir", str(data_dir), *flags])
        return (code, *capsys.readouterr())

    return run


def test_stdout_is_one_json_object(show: Any, tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    code, out, err = show("--row", "2", "--json", "--lora_rank", "4")
    assert code == 0, err
    report = json.loads(out)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompt = "<|im_start|>user\n你是谁 0?<|im_end|>\n<|im_start|>assistant\n"
    answer = "我是岐黄助手。<|im_end|>"
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
    assert report["ids"] == first + second
    assert report["mask"] == [0] * len(first) + [1] * len(second)
    assert report["source"].endswith("qa.json#2")
    assert (report["prompt_text"], report["trained_text"]) == ([prompt], [answer])
    assert (report["text"], report["template"]) == (prompt + answer, None)
    assert report["num_supervised_tokens"] == len(second)
    assert "你是谁" in out


def test_a_terminal_without_colour_sees_what_is_trained(show: Any) -> None:
    code, out, err = show("--row", "2")
    assert code == 0, err
    assert "qa.json#2" in out
    marked = out[out.index("<|im_start|>") :]
    start, end = marked.index("⟦"), marked.index("⟧")
    assert marked[start + 1 : end].replace("│", "") == "我是岐黄助手。<|im_end|>"
    assert marked.startswith("<|im_start|>│use│r│⏎\n你是谁│")
    assert "\x1b" not in out


def test_texts_of_pretraining(show: Any) -> None:
    code, out, err = show("--stage", "pt", "--json", dataset="texts")
    assert code == 0, err
    report = json.loads(out)
    assert set(report["mask"]) == {1}
    assert report["prompt_text"] == [""]


def test_rows_are_counted_through_the_files(show: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    good = '{"instruction": "q", "output": "a"}'
    path.write_text(f'{good}\n{{"instruction": 5, "output": "a"}}\n{{\n{good}\n')
    sources = {}
    for row in ("0", "3", "5"):
        code, out, err = show("--row", row, "--json", "--max_samples", "1", dataset=f"{path},few")
        assert code == 0, err
        sources[row] = Path(json.loads(out)["source"]).name
    assert sources == {"0": "some.jsonl:1", "3": "some.jsonl:4", "5": "few.json#1"}
    for row, place in (("1", "some.jsonl:2"), ("2", "some.jsonl:3")):
        code, out, err = show("--row", row, "--on_bad_row", "skip", dataset=str(path))
        assert (code, out) == (3, "")
        assert place in err
    code, out, err = show("--row", "8", "--json", dataset=f"{path},few")
    assert (code, out) == (3, "")
    assert "There is no row 8: the data has 8 rows." in err


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--row", "-1"], 2, "row"),
        (["--template", "llama3"], 3, "<|start_header_id|>"),
        (["--stage", "pt"], 3, "qa.json#0"),
        (["--model_name_or_path", "./nowhere"], 4, "nowhere"),
        (["--report_dir", __file__], 6, "report_dir"),
    ],
)
def test_one_message_says_it(show: Any, flags: list[str], code: int, said: str) -> None:
    got, _, err = show(*flags)
    assert got == code, err
    assert said in err
    assert "Traceback" not in err


def test_the_page_is_written(show: Any, tmp_path: Path) -> None:
    code, out, _ = show("--row", "2", "--json", "--report_dir", str(tmp_path / "pages"))
    assert code == 0
    html = (tmp_path / "pages" / "row-2.html").read_text(encoding="utf-8")
    assert "qa.json#2" in html
    assert 'class="t"' in html
    assert json.loads(out)


def test_colour_and_no_colour_say_the_same() -> None:
    cells = (
        Cell("a\n", 0, (1,), False, False),
        Cell("\x1b[2J", 1, (2,), True, False),
        Cell("<e>", 2, (3,), True, True),
    )
    view = SampleView(
        "f:1", (1, 2, 3), (0, 1, 1), "", cells, (TurnView(1, 1, 3, "a\n", "b" * 99),), ("a note",)
    )
    report = {"source": "f:1", "template": "qwen", "num_supervised_tokens": 2}
    printed = {}
    for no_color in (False, True):
        console = Console(force_terminal=True, color_system="truecolor", no_color=no_color)
        with console.capture() as capture:
            print_row(report, [view, view], console=console)
        printed[no_color] = capture.get()
    assert "\x1b[30;42m␛[2J" in printed[False]
    assert "⟦" not in printed[False]
    assert "a⏎\n⟦␛[2J" in printed[True]
    for text in printed.values():
        assert "Sample 2 of 2" in text
        assert "a note" in text
        assert "\x1b[2J" not in text
