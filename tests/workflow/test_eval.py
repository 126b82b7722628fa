"""`llmtuner eval`: the shipped benchmark from the command line, its files, and what is refused."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtuner.cli.main import main

from .conftest import Train, read_json

ROOT = Path(__file__).parents[2]
DRAWN_BY_5 = sorted(random.Random("5 human_body").sample(range(5), 3))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def reading_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with a context that holds five examples."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(model_dir, folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture
def evaluate(reading_model: Path, capsys: Capture) -> Any:
    """Return a function that runs the command and gives back exit code, stdout and stderr."""

    def run(*flags: str, model: Path = reading_model) -> tuple[int, str, str]:
        argv = ["eval", "--model_name_or_path", str(model), "--infer_dtype", "float32"]
        argv += ["--task", "medical", "--task_dir", str(ROOT / "evaluation")]
        code = main([*argv, *flags])
        return (code, *capsys.readouterr())

    return run


def test_results_and_comparison_with_them(evaluate: Any, tmp_path: Path) -> None:
    base, alone = tmp_path / "base", tmp_path / "alone"
    code, out, err = evaluate("--save_dir", str(base), "--batch_size", "8")
    assert code == 0, err
    assert "Average:" in out
    assert "36" in out
    record = read_json(base / "run.json")
    assert record["num_questions"] == 36
    assert record["costs"]["num_tokens_read"] < record["costs"]["num_tokens_whole"] / 2
    assert record["costs"]["sharing_difference"] < 1e-5
    flags = ["--no_share_prefix", "--batch_size", "1", "--compare", str(base)]
    code, out, err = evaluate("--save_dir", str(alone), *flags)
    assert code == 0, err
    assert "0 gained, 0 lost" in out
    assert read_json(alone / "results.json") == read_json(base / "results.json")
    pairs = zip(details(alone), details(base), strict=True)
    for one, other in pairs:
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert one["prompt_sha256"] == other["prompt_sha256"]


def details(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "details.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_written_answers(evaluate: Any, tmp_path: Path) -> None:
    flags = ["--scoring", "generate", "--max_new_tokens", "4", "--subjects", "human_body"]
    flags += ["--n_shot", "3", "--seed", "5"]
    code, out, err = evaluate(*flags, "--save_dir", str(tmp_path / "out"))
    assert code == 0, err
    assert read_json(tmp_path / "out" / "run.json")["shots"] == {"human_body": DRAWN_BY_5}
    assert "12" in out
    assert all(line["text"] is not None for line in details(tmp_path / "out"))


def test_an_adapter_is_scored(evaluate: Any, train: Train, tmp_path: Path) -> None:
    flags = ["--subjects", "human_body", "--n_shot", "1", "--save_dir"]
    adapter = str(train("--max_steps", "4"))
    for name, more in {"base": [], "tuned": ["--adapter_name_or_path", adapter]}.items():
        code, _, err = evaluate(*flags, str(tmp_path / name), *more)
        assert code == 0, err
    assert details(tmp_path / "base")[0] != details(tmp_path / "tuned")[0]
    assert read_json(tmp_path / "tuned" / "run.json")["model"]["adapters"] == [adapter]


def test_a_split_without_labels_has_no_score(evaluate: Any, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "evaluation" / "medical", tmp_path / "medical")
    for path in (tmp_path / "medical" / "test").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.rpartition(",")[0] for line in lines), encoding="utf-8")
    flags = ["--task", "medical_test", "--task_dir", str(tmp_path)]
    code, out, err = evaluate(*flags, "--save_dir", str(tmp_path / "out"))
    assert code == 0, err
    assert "No labels" in out
    assert "Average" not in out
    assert (tmp_path / "out" / "submission.json").is_file()
    code, _, err = evaluate(*flags, "--fail_below", "50")
    assert (code, "has no labels" in err) == (3, True)


def test_a_score_that_is_too_low_has_its_own_exit_code(evaluate: Any, tmp_path: Path) -> None:
    flags = ["--subjects", "human_body", "--n_shot", "1"]
    code, _, err = evaluate(*flags, "--fail_below", "100", "--save_dir", str(tmp_path / "out"))
    assert (code, "The average is" in err) == (9, True)
    assert (tmp_path / "out" / "results.log").is_file()
    assert evaluate(*flags, "--fail_below", "0")[0] == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--task", "medicine"], 2, "did you mean medical"),
        (["--split", "train"], 2, "Allowed: validation, test"),
        (["--subjects", "human_bodies"], 3, "did you mean human_body"),
        (["--task", "ceval"], 3, "ceval/ceval-exam"),
        (["--compare", "nowhere.json"], 3, "cannot be read"),
        (["--save_dir", "."], 3, "exists already"),
        (["--model_name_or_path", "./nowhere"], 4, "nowhere"),
        (["--adapter_name_or_path", "./nowhere"], 4, "nowhere"),
        (["--fail_below", "101"], 2, "fail_below"),
    ],
)
def test_one_message_says_it(evaluate: Any, flags: list[str], code: int, said: str) -> None:
    got, _, err = evaluate(*flags)
    assert got == code, err
    assert said in err
    assert "Traceback" not in err


def test_a_prompt_longer_than_the_context(evaluate: Any, model_dir: Path, tmp_path: Path) -> None:
    code, _, err = evaluate("--save_dir", str(tmp_path / "out"), model=model_dir)
    assert code == 3
    assert "longer than the model's context of 256 tokens" in err
    assert "human_body_val.csv:" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sharing_equals_brute_force_on_the_demo_model(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo-model", "--output_dir", str(tmp_path / "demo")]) == 0
    found = {}
    for name, flags in {"shared": [], "alone": ["--no_share_prefix", "--batch_size", "1"]}.items():
        argv = ["eval", "--model_name_or_path", str(tmp_path / "demo"), "--infer_dtype", "float32"]
        argv += ["--task", "medical", "--task_dir", str(ROOT / "evaluation"), *flags]
        assert main([*argv, "--save_dir", str(tmp_path / name)]) == 0
        found[name] = details(tmp_path / name)
    for one, other in zip(found["shared"], found["alone"], strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
