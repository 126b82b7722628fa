"""Prompts and letters are right to the token; sharing and batching change no probability."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_benchmark import chat_tokenizer, save_model, write_benchmark
from transformers import MistralConfig, MistralForCausalLM

from llmtuner.data.template import load_template
from llmtuner.eval.asking import ask
from llmtuner.eval.benchmarks import BENCHMARKS
from llmtuner.eval.multiple_choice import (
    Scores,
    common_prefix_length,
    score_prompts,
    sharing_difference,
)
from llmtuner.eval.prompts import Prompt, PromptWriter, check_lengths
from llmtuner.eval.reader import load_reader
from llmtuner.eval.sources import SubjectQuestions, load_benchmark
from llmtuner.extras.errors import EvalError
from llmtuner.hparams.parser import parse
from llmtuner.model.fast.kernels import load_kernels

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reader(model_dir: Path) -> Any:
    words = ["--model_name_or_path", str(model_dir), "--task", "ceval", "--infer_dtype", "float32"]
    return load_reader(parse("eval", words))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SubjectQuestions:
    folder = write_benchmark(tmp_path_factory.mktemp("tasks"))
    options = {"split": "validation", "num_shots": 2, "wanted": ("anatomy",)}
    return load_benchmark(BENCHMARKS.get("ceval"), folder, **options).subjects[0]


def writer(tokenizer: Any, template: str | None = None, lang: Any = "en") -> PromptWriter:
    return PromptWriter(
        BENCHMARKS.get("ceval"), load_template(template, tokenizer), tokenizer, lang
    )


OPENING = "The following are multiple choice questions (with answers) about Anatomy.\n\n"


def asked(split: str, n: int) -> str:
    return f"anatomy {split} {n}{'?' * n}\nA. a{n}\nB. b{n}\nC. c{n}\nD. d{n}\nAnswer:"


def test_the_wording_in_plain_text(found: SubjectQuestions) -> None:
    tokenizer = chat_tokenizer()
    prompts = writer(tokenizer, "fewshot").for_letters(found)
    expected = f"{OPENING}{asked('dev', 0)}A\n\n{asked('dev', 1)}B\n\n{asked('val', 3)}"
    assert tokenizer.decode(prompts[3].ids) == expected
    assert tokenizer.convert_ids_to_tokens(list(prompts[3].letter_ids)) == [*"ABCD"]


def test_the_wording_as_a_chat(found: SubjectQuestions) -> None:
    tokenizer = chat_tokenizer()
    (prompt, *_) = writer(tokenizer, lang="zh").for_letters(found)
    asked_zh = asked("dev", 0).replace("\nAnswer:", "\n答案：")
    opening = "以下是中国关于Anatomy考试的单项选择题，请选出其中的正确答案。\n\n"
    text = tokenizer.decode(prompt.ids)
    assert text.startswith(
        f"<|im_start|>user\n{opening}{asked_zh}<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert text.count("以下是") == 1
    assert prompt.ids == writer(tokenizer, lang="zh").for_generation(found)[0].ids


def test_a_letter_that_the_tokenizer_joins_to_the_cue_is_scored_as_the_examples_show_it(
    found: SubjectQuestions,
) -> None:
    tokenizer = chat_tokenizer(*((":", letter) for letter in "ABCD"))
    (prompt, *_) = writer(tokenizer, "fewshot").for_letters(found)
    assert tokenizer.convert_ids_to_tokens(list(prompt.letter_ids)) == [":A", ":B", ":C", ":D"]
    assert tokenizer.decode(prompt.ids).endswith("\nAnswer")
    assert prompt.letter_ids[0] in prompt.ids


def brute_force(model: Any, prompt: Prompt) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1]
    return logits[list(prompt.letter_ids)].softmax(dim=-1).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_scores_equal_brute_force(
    reader: Any, found: SubjectQuestions, batch_size: int, share_prefix: bool
) -> None:
    prompts = writer(reader.tokenizer).for_letters(found)
    done: list[int] = []
    scores = score_prompts(
        reader.model, prompts, batch_size=batch_size, share_prefix=share_prefix, on_done=done.append
    )
    for prompt, shares in zip(prompts, scores.probabilities, strict=True):
        assert shares == pytest.approx(brute_force(reader.model, prompt), abs=1e-5)
    assert sum(done) == len(prompts) == 7
    assert max(max(shares) for shares in scores.probabilities) > 0.3
    assert (scores.num_tokens_read < 0.6 * scores.num_tokens_whole) == share_prefix


def test_a_sliding_window_and_an_adapter_are_scored_like_brute_force(
    found: SubjectQuestions,
) -> None:
    tokenizer = chat_tokenizer()
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=50, **sizes, **heads)
    base = MistralForCausalLM(config).eval()
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    prompts = writer(tokenizer).for_letters(found)
    for model in (base, get_peft_model(base, lora).eval()):
        scores = score_prompts(model, prompts, batch_size=4)
        for prompt, shares in zip(prompts, scores.probabilities, strict=True):
            assert shares == pytest.approx(brute_force(model, prompt), abs=1e-5)


def test_the_shared_cache_is_not_changed_by_a_batch(reader: Any, found: SubjectQuestions) -> None:
    prompts = writer(reader.tokenizer).for_letters(found)
    doubled = [*prompts, *copy.deepcopy(prompts)]
    shares = score_prompts(reader.model, doubled, batch_size=2).probabilities
    for one, other in zip(shares[:7], shares[7:], strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.skipif(load_kernels() is None, reason="no C compiler")
def test_layers_with_kernels_read_without_padding_and_score_alike(
    model_dir: Path, found: SubjectQuestions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(*words: str) -> Scores:
        words = ("--model_name_or_path", str(model_dir), "--task", "ceval", *words)
        reader = load_reader(parse("eval", list(words)))
        prompts = writer(reader.tokenizer).for_letters(found)
        assert sharing_difference(reader.model, prompts) < 0.02
        return score_prompts(reader.model, prompts, batch_size=3)

    exact = scores("--infer_dtype", "float32")
    padded = scores("--infer_dtype", "bfloat16", "--no_fast_kernels")
    flat = scores("--infer_dtype", "bfloat16")
    assert flat.num_tokens_read < padded.num_tokens_read == exact.num_tokens_read
    for half in (padded, flat):
        for one, other in zip(half.probabilities, exact.probabilities, strict=True):
            assert one == pytest.approx(other, abs=0.03)


def test_sharing_is_given_up_where_it_changes_scores(
    reader: Any, found: SubjectQuestions, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    assert sharing_difference(reader.model, writer(reader.tokenizer).for_letters(found)) < 1e-5
    words = ["--model_name_or_path", "m", "--task", "ceval", "--batch_size", "3"]
    data = SimpleNamespace(subjects=[found], num_questions=7)
    expected, _ = ask(parse("eval", words), BENCHMARKS.get("ceval"), data, reader)
    broken = lambda self, count: self.prefix and SimpleNamespace()  # noqa: E731
    monkeypatch.setattr("llmtuner.eval.reading._PaddedReading._lend", broken)
    answers, costs = ask(parse("eval", words), BENCHMARKS.get("ceval"), data, reader)
    assert "cache cannot be shared" in caplog.text
    assert costs.num_tokens_read >= costs.num_tokens_whole
    for one, other in zip(answers, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_prompt_longer_than_the_context_is_named(found: SubjectQuestions) -> None:
    prompts = writer(chat_tokenizer()).for_letters(found)
    longest = max(len(prompt.ids) for prompt in prompts)
    check_lengths(prompts, limit=longest)
    with pytest.raises(
        EvalError, match=rf"anatomy_val\.csv:8: .*of {longest - 1} tokens.*--n_shot"
    ):
        check_lengths(prompts, limit=longest - 1)


def test_nan_is_refused(found: SubjectQuestions, model_dir: Path) -> None:
    words = ["--model_name_or_path", str(model_dir), "--task", "ceval", "--infer_dtype", "float32"]
    broken = load_reader(parse("eval", words))
    broken.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(EvalError, match="answers with NaN"):
        score_prompts(broken.model, writer(broken.tokenizer).for_letters(found), batch_size=4)


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2], [1, 2, 3]], 1),
        ([[5], [1]], 0),
        ([[1, 2, 3], [1, 2, 3]], 2),
    ],
)
def test_common_prefix(sequences: list[list[int]], expected: int) -> None:
    assert common_prefix_length(sequences) == expected
