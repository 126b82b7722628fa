"""Prediction: similar lengths together, file order, and a killed run that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import NUM_TOKENS, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from llmtuner.data.questions import Question, QuestionSet
from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.hparams.parser import parse
from llmtuner.inference.generate import Answer, generate_texts
from llmtuner.model.fingerprint import weights_digest
from llmtuner.train import predict
from llmtuner.train.answer_journal import append_answers, journal_of, open_journal
from llmtuner.train.predict import (
    Predictions,
    plan_batches,
    plan_room,
    predictions_file,
    summarise,
    write_predictions,
)

PROMPTS = [[5], [6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]
QUESTIONS = QuestionSet(
    tuple(Question(prompt, [number + 3, 2], f"f#{number}") for number, prompt in enumerate(PROMPTS))
)
SETTINGS = {"seed": 1, "model": "a"}
ANSWERS = {0: Answer("好", 1, True), 2: Answer("two\nlines", 3, False)}
ROWS = {number: {"prompt": "p", "label": "l"} for number in range(3)}


class Killed(Exception):
    """Stands for the end of the process."""


def run(path: Path, *, seed: int = 1, model: Any = None, **values: Any) -> Predictions:
    generating = GeneratingArgs(**{"max_new_tokens": 4, "temperature": 2.0, **values})
    return write_predictions(
        QUESTIONS,
        model=model or tiny_llama("padded"),
        tokenizer=tiny_tokenizer(),
        generating=generating,
        stop_ids=[2],
        use_kv_cache=True,
        batch_size=2,
        path=path,
        precision=torch.autocast("cpu", enabled=False),
        seed=seed,
        number_type="fp32",
    )


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_batches_hold_similar_lengths_longest_first() -> None:
    assert plan_batches([3, 9, 3, 4, 9], 2) == [[1, 4], [3, 0], [2]]
    assert plan_batches([], 2) == []


def test_lines_are_in_the_order_of_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "generated_predictions.jsonl"
    found = run(path, do_sample=False)
    tokenizer, config = tiny_tokenizer(), GenerationConfig(max_new_tokens=4, eos_token_id=2)
    alone = [
        generate_texts(tiny_llama("padded"), tokenizer, [prompt], config=config)[0]
        for prompt in PROMPTS
    ]
    assert len(set(alone)) > 2
    assert [line["predict"] for line in lines(path)] == alone
    assert [line["prompt"] for line in lines(path)] == tokenizer.batch_decode(PROMPTS)
    assert [line["label"] for line in lines(path)] == found.labels
    assert [line["predict"] for line in lines(path)] == [answer.text for answer in found.answers]
    assert all(list(line) == ["prompt", "label", "predict"] for line in lines(path))


@pytest.mark.parametrize("num_batches", [0, 1, 2])
@pytest.mark.parametrize("broken", ["", '{"index": 4, "ans'])
def test_a_killed_run_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_batches: int, broken: str
) -> None:
    expected = run(tmp_path / "golden.jsonl")
    asked = []

    def generate(*args: Any, **options: Any) -> list[Answer]:
        if len(asked) == num_batches and path is killed:
            raise Killed
        asked.append(args[2])
        return real(*args, **options)

    path = killed = tmp_path / "generated_predictions.jsonl"
    real = predict.generate_answers
    monkeypatch.setattr(predict, "generate_answers", generate)
    with pytest.raises(Killed):
        run(path)
    assert not path.exists()
    with journal_of(path).open("a") as file:
        file.write(broken)
    killed = None
    found = run(path)
    assert found.num_kept == 2 * num_batches
    assert len(asked) == 3
    assert found.answers == expected.answers
    assert path.read_bytes() == (tmp_path / "golden.jsonl").read_bytes()


@pytest.mark.parametrize("change", [{"seed": 2}, {"max_new_tokens": 3}, {"model": "other"}])
def test_other_settings_or_weights_start_over(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "generated_predictions.jsonl"
    run(path)  # its journal is still there
    assert run(path).num_kept == len(PROMPTS)
    if change == {"model": "other"}:
        model = tiny_llama("padded")
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.001)
        change = {"model": model}
    caplog.clear()
    assert run(path, **change).num_kept == 0
    name = "weights" if "model" in change else next(iter(change))
    assert f"settings ({name}); predicting starts over" in caplog.text


def test_sampling_differs_between_batches_and_seeds(tmp_path: Path) -> None:
    texts = [
        [answer.text for answer in run(tmp_path / f"{n}.jsonl", seed=seed, top_k=0).answers]
        for n, seed in enumerate((1, 1, 2))
    ]
    assert texts[0] == texts[1] != texts[2]


# ---- journal ----


def test_a_journal_keeps_what_is_whole_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    assert open_journal(path, SETTINGS) == {}
    append_answers(path, ANSWERS, ROWS)
    whole = path.read_bytes()
    assert open_journal(path, SETTINGS) == ANSWERS
    for end in range(len(whole) - 1, whole.rindex(b"\n", 0, -1), -7):
        path.write_bytes(whole[:end])
        kept = open_journal(path, SETTINGS)
        assert kept == {0: ANSWERS[0]} or end == len(whole) - 1
        append_answers(path, {2: ANSWERS[2]}, ROWS)
        assert open_journal(path, SETTINGS) == ANSWERS


@pytest.mark.parametrize(
    "text", ["", "\n", "[1]\n", '{"settings": 5}\n', '{"index": 0}\n', "\x00", '{"settings": {}}\n']
)
def test_a_foreign_journal_is_not_used(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    assert open_journal(path, SETTINGS) == {}
    append_answers(path, ANSWERS, ROWS)
    assert open_journal(path, SETTINGS) == ANSWERS
    for other in range(2):
        assert open_journal(path, {**SETTINGS, "model": "b"}) == {}, other
    assert open_journal(path, SETTINGS) == {}, "answers of two settings must not be mixed"


# ---- room, weights, results ----


@pytest.mark.parametrize(
    ("flags", "room", "max_new_tokens"),
    [
        (["--max_new_tokens", "10"], 54, 10),
        ([], 32, 32),
        (["--max_new_tokens", "0", "--max_length", "40"], 39, 0),
        (["--max_new_tokens", "0"], 63, 0),
    ],
)
def test_the_room_of_a_prompt(
    tmp_path: Path, flags: list[str], room: int, max_new_tokens: int
) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    base = ["--model_name_or_path", str(tmp_path), "--dataset", "d", "--output_dir", "o"]
    config, found = plan_room(parse("train", [*base, "--do_predict", *flags]))
    assert (found, config.generating.max_new_tokens) == (room, max_new_tokens)
    assert any("max_new_tokens is 32" in line for line in config.notices) is (flags == [])
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        plan_room(parse("train", [*base, "--do_predict", "--max_new_tokens", "64"]))


def test_a_digest_tells_weights_apart() -> None:
    model = tiny_llama()
    digest = weights_digest(model)
    assert weights_digest(tiny_llama()) == digest
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    fresh = weights_digest(adapted)
    next(p for n, p in adapted.named_parameters() if "lora_B" in n).data.add_(1e-3)
    assert len({digest, fresh, weights_digest(adapted), weights_digest(model.half())}) == 4
    assert model.config.vocab_size == NUM_TOKENS


def test_results_are_of_each_set_and_of_all_answers() -> None:
    def made(texts: list[str], labels: list[str], num_kept: int) -> Predictions:
        asked = tuple(Question([1], [1], "", is_cut=n == 0) for n in range(len(texts)))
        answers = [Answer(text, 2, bool(text)) for text in texts]
        return Predictions(QuestionSet(asked, 1), labels, answers, num_kept, 2.0, {"seed": 3})

    results = summarise({"a": made(["x y"], ["x y"], 0), "b": made(["", "x", "x"], ["x"] * 3, 1)})
    expected = {
        "predict_a_rouge-1": 100, "predict_b_rouge-1": 66.6667, "predict_rouge-1": 75,
        "predict_a_samples": 1, "predict_b_samples": 3, "predict_samples": 4,
        "predict_samples_kept": 1, "predict_tokens": 8, "predict_unfinished": 1,
        "predict_empty": 1, "predict_prompts_cut": 2, "predict_rows_left_out": 2,
        "predict_runtime": 4.0, "predict_samples_per_second": 0.75,
        "predict_settings": {"seed": 3},
    }  # fmt: skip
    assert {name: results[name] for name in expected} == expected


def test_files_of_named_sets() -> None:
    assert predictions_file(Path("o"), "").name == "generated_predictions.jsonl"
    assert predictions_file(Path("o"), "a/b").name == "generated_predictions_a_b.jsonl"
