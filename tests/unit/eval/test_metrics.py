"""BLEU and ROUGE: by hand, against the libraries, in two languages, and at the edges."""

import sys

import pytest
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from llmtuner.eval.metrics import bleu_words, check_libraries, measure, rouge_words
from llmtuner.extras.errors import EvalError, MissingExtraError

ENGLISH = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("Don't take more than 3.5 mg a day!", "Never take more than 3.5 mg (a day)."),
    ("Rest & warm tea help against a cold", "Rest and warm tea help"),
    ("one two three four five six", "six five four three two one"),
]
CHINESE = [
    ("我爱北京天安门广场，也爱上海。", "我爱上海和北京天安门。"),
    ("早睡早起身体好", "早睡早起，身体才好"),
]


@pytest.mark.parametrize(
    ("got", "expected", "bleu", "rouge_1", "rouge_2", "rouge_l"),
    [
        # 5/6, 3/5, 1/4 and, as no four words are right, half of 1/3
        ("the cat sat on the mat", "the cat is on the mat", 37.9918, 83.3333, 60, 83.3333),
        # 我 爱 北京 天安门: 3/4, 1/3, half of 1/2, a quarter of 1/1
        ("我爱北京天安门", "我爱上海天安门", 35.3553, 75, 33.3333, 75),
        # all right, but a third of the length: exp(1 - 6/2); recall 1/3 and 1/5
        ("the cat", "the cat is on the mat", 13.5335, 50, 33.3333, 50),
        # 3/3, half of 1/2, a quarter of 1/1, times exp(1 - 6/3)
        ("mat the on", "the cat is on the mat", 14.5994, 66.6667, 0, 44.4444),
        ("nothing alike", "the cat is on the mat", 0, 0, 0, 0),
    ],
)
def test_scores_by_hand(
    got: str, expected: str, bleu: float, rouge_1: float, rouge_2: float, rouge_l: float
) -> None:
    found = measure([got], [expected])
    numbers = (found.bleu_4, found.rouge_1, found.rouge_2, found.rouge_l)
    assert numbers == pytest.approx((bleu, rouge_1, rouge_2, rouge_l), abs=1e-4)


@pytest.mark.parametrize("text", ["A", "a b", "好", "！", "你好吗", "5 mg", ENGLISH[1][0]])
def test_the_same_text_scores_100_and_no_text_0(text: str) -> None:
    names = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "bleu-4-corpus", "bleu-4-char")
    same = measure([text], [text]).to_dict("predict")
    assert same == {**{f"predict_{name}": 100.0 for name in names}, "predict_empty": 0}
    for nothing in ("", " \n"):
        empty = measure([nothing], [text]).to_dict("x")
        assert empty == {**{f"x_{name}": 0.0 for name in names}, "x_empty": 1}
    assert measure([""], [""]).bleu_4 == measure([""], [""]).rouge_2 == 100


def test_english_equals_the_libraries() -> None:
    got, expected = (list(column) for column in zip(*ENGLISH, strict=True))
    found = measure(got, expected)
    assert found.bleu_4_corpus == pytest.approx(sacrebleu.corpus_bleu(got, [expected]).score)
    sentences = [sacrebleu.sentence_bleu(one, [other]).score for one, other in ENGLISH]
    assert found.bleu_4 == pytest.approx(sum(sentences) / len(sentences))
    assert abs(found.bleu_4 - found.bleu_4_corpus) > 1
    names = ["rouge1", "rouge2", "rougeL"]
    scores = [RougeScorer(names).score(other, one) for one, other in ENGLISH]
    means = [100 * sum(s[name].fmeasure for s in scores) / len(scores) for name in names]
    assert [found.rouge_1, found.rouge_2, found.rouge_l] == pytest.approx(means)


@pytest.mark.parametrize(("got", "expected"), [*ENGLISH, *CHINESE])
def test_bleu_over_characters_is_that_of_nltk_with_its_third_smoothing(
    got: str, expected: str
) -> None:
    smooth = SmoothingFunction().method3
    theirs = 100 * sentence_bleu([list(expected)], list(got), smoothing_function=smooth)
    assert measure([got], [expected]).bleu_4_characters == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("text", "bleu", "rouge"),
    [
        ("It's 3.5%, No.", "It's 3.5 % , No .", "it s 3 5 no"),
        ("糖尿病患者，应控制饮食。", "糖尿病 患者 ， 应 控制 饮食 。", "糖尿病 患者 应 控制 饮食"),
        ("用Python写hello，好", "用 Python 写 hello ， 好", "用 python 写 hello 好"),
        ("Ünïcode Привет", "Ünïcode Привет", "ünïcode привет"),
    ],
)
def test_words(text: str, bleu: str, rouge: str) -> None:
    assert (" ".join(bleu_words(text)), " ".join(rouge_words(text))) == (bleu, rouge)


@pytest.mark.parametrize(("got", "expected"), [([], []), (["a"], ["a", "b"])])
def test_there_is_one_expected_text_for_each_answer(got: list[str], expected: list[str]) -> None:
    with pytest.raises(EvalError, match="one expected text for each answer"):
        measure(got, expected)


@pytest.mark.parametrize("library", ["sacrebleu", "rouge_score", "rjieba"])
def test_an_absent_library_is_one_clear_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError) as caught:
        check_libraries()
    assert library in str(caught.value)
    assert "llmtuner[metrics]" in str(caught.value)
    assert "\n" not in str(caught.value)
