"""How near answers come to the expected texts: BLEU-4 and ROUGE-1/2/L, for English and Chinese.

Texts are cut into words the usual way (BLEU: sacrebleu's 13a; ROUGE: letters and digits in lower
case), and runs of Chinese characters in them by the dictionary of jieba, so that a text in both
languages needs no decision. All scores are from 0 to 100.

Source: BLEU, Papineni et al. 2002, as in sacrebleu; ROUGE, Lin 2004, as in rouge-score.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from llmtuner.extras.errors import EvalError, MissingExtraError

_CJK = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_RUNS = re.compile(f"[{_CJK}]+|[^{_CJK}]+")
_HAS_CJK = re.compile(f"[{_CJK}]")
_WORDS = re.compile(r"[^\W_]+")
_SPACE = "␣"

Score = Callable[[str, str], float]
"""Takes an answer and the expected text."""


@dataclass(frozen=True)
class TextMetrics:
    """What a set of answers scores.

    Attributes:
        bleu_4: mean over the answers of their BLEU-4 over words.
        rouge_1: mean F1 of single words.
        rouge_2: mean F1 of pairs of words.
        rouge_l: mean F1 of the longest common subsequence of words.
        bleu_4_corpus: BLEU-4 of all answers as one text, as papers quote it.
        bleu_4_characters: mean BLEU-4 over characters, LLaMA-Factory's `predict_bleu-4`.
        num_empty: answers without any text.
    """

    bleu_4: float
    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu_4_corpus: float
    bleu_4_characters: float
    num_empty: int

    def to_dict(self, prefix: str) -> dict[str, float]:
        """Return the numbers under LLaMA-Factory's names, with `prefix_` in front."""
        values = {
            "bleu-4": self.bleu_4,
            "rouge-1": self.rouge_1,
            "rouge-2": self.rouge_2,
            "rouge-l": self.rouge_l,
            "bleu-4-corpus": self.bleu_4_corpus,
            "bleu-4-char": self.bleu_4_characters,
        }
        rounded = {f"{prefix}_{name}": round(value, 4) for name, value in values.items()}
        return {**rounded, f"{prefix}_empty": self.num_empty}


def check_libraries() -> None:
    """Refuse to begin what cannot be measured at its end.

    Raises:
        MissingExtraError: a library of the extra `metrics` is not installed.
    """
    try:
        import rjieba  # noqa: F401
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            error.name or "sacrebleu", extra="metrics", needed_for="Measuring answers"
        ) from None


def measure(predictions: Sequence[str], references: Sequence[str]) -> TextMetrics:
    """Score answers against the expected texts.

    Args:
        predictions: the model's answers.
        references: the text expected of each.

    Raises:
        EvalError: there is nothing to score, or not one expected text for each answer.
        MissingExtraError: the extra `metrics` is not installed.
    """
    if not predictions or len(predictions) != len(references):
        raise EvalError(
            "There must be one expected text for each answer, and at least one of them.",
            got=f"{len(predictions)} answers, {len(references)} expected texts",
        )
    check_libraries()
    pairs = list(zip(predictions, references, strict=True))
    bleu, rouges = _sentence_bleu(), _rouge_scores()

    def mean(score: Score) -> float:
        return fmean(score(*pair) for pair in pairs)

    rouge_1, rouge_2, rouge_l = (
        fmean(column) for column in zip(*(rouges(*pair) for pair in pairs), strict=True)
    )
    return TextMetrics(
        bleu_4=mean(lambda got, expected: bleu(bleu_words(got), bleu_words(expected))),
        rouge_1=rouge_1,
        rouge_2=rouge_2,
        rouge_l=rouge_l,
        bleu_4_corpus=_corpus_bleu(pairs),
        bleu_4_characters=mean(lambda got, expected: bleu(_characters(got), _characters(expected))),
        num_empty=sum(not text.strip() for text in predictions),
    )


def bleu_words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, as BLEU counts them."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return [word for token in Tokenizer13a()(text).split() for word in _segment(token)]


def rouge_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, as ROUGE counts them."""
    return [word for token in _WORDS.findall(text.lower()) for word in _segment(token)]


def _segment(token: str) -> list[str]:
    """Cut the Chinese parts of a token into words, and those from the others."""
    if not _HAS_CJK.search(token):
        return [token]
    from rjieba import cut

    return [
        word
        for run in _RUNS.findall(token)
        for word in (cut(run, True) if _HAS_CJK.match(run) else [run])
    ]


def _characters(text: str) -> list[str]:
    if not text.strip():
        return []
    return [_SPACE if character.isspace() else character for character in text]


def _sentence_bleu() -> Callable[[Sequence[str], Sequence[str]], float]:
    from sacrebleu.metrics.bleu import BLEU

    # effective_order: a text of less than four words is scored by the lengths that it has
    metric = BLEU(tokenize="none", force=True, effective_order=True)

    def score(got: Sequence[str], expected: Sequence[str]) -> float:
        if not got or not expected:
            return 100.0 * (not got and not expected)
        return float(metric.sentence_score(" ".join(got), [" ".join(expected)]).score)

    return score


def _corpus_bleu(pairs: Sequence[tuple[str, str]]) -> float:
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize="none", force=True, effective_order=True)
    got = [" ".join(bleu_words(prediction)) for prediction, _ in pairs]
    expected = [" ".join(bleu_words(reference)) for _, reference in pairs]
    return float(metric.corpus_score(got, [expected]).score)


class _RougeTokenizer:
    """What rouge-score asks for words."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return rouge_words(text)


def _rouge_scores() -> Callable[[str, str], tuple[float, float, float]]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, tokenizer=_RougeTokenizer())

    def score(got: str, expected: str) -> tuple[float, float, float]:
        words, expected_words = rouge_words(got), rouge_words(expected)
        if words == expected_words and len(words) < 2:
            # No words, or no pair of words: the library's 0 would mean that nothing was right.
            same = 100.0 * bool(words or got.strip() == expected.strip())
            return same, same, same
        found = scorer.score(expected, got)
        first, second, longest = (100.0 * found[name].fmeasure for name in names)
        return first, second, longest

    return score
