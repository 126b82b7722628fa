"""Scores by the likelihood of the letters, with the common beginning of the prompts read once.

All prompts of a subject begin with the same tokens (its examples). Their keys and values are
computed once and lent to every batch of questions, of which only the rest is read. Only the last
position of each question goes through the head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtuner.eval.prompts import Prompt
from llmtuner.eval.reading import Model, open_reading
from llmtuner.extras.errors import EvalError

_MIN_SHARED_TOKENS = 16  # less is not worth a pass of its own


@dataclass(frozen=True)
class Scores:
    """What the letters of some prompts scored.

    Attributes:
        probabilities: [n][letters], each row adds up to 1.
        num_tokens_read: tokens that went through the model, padding included.
        num_tokens_whole: tokens of all prompts, which is what reading each alone takes.
    """

    probabilities: list[list[float]]
    num_tokens_read: int
    num_tokens_whole: int


@torch.inference_mode()
def score_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    share_prefix: bool = True,
    on_done: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Return the probability of each letter behind each prompt, in float32.

    Args:
        model: in evaluation mode, on its device.
        prompts: of one subject.
        batch_size: prompts in one pass; they are sorted by length.
        share_prefix: read the common beginning once.
        on_done: called with the number of prompts of every pass.

    Raises:
        EvalError: a probability is not finite.
    """
    ids = [prompt.ids for prompt in prompts]
    prefix_length = common_prefix_length(ids) if share_prefix and len(ids) > 1 else 0
    found: dict[int, list[float]] = {}
    with open_reading(model) as reading:
        is_shared = prefix_length >= _MIN_SHARED_TOKENS
        skipped = prefix_length if is_shared and reading.read_prefix(ids[0][:prefix_length]) else 0
        num_read = skipped
        for batch in _batches(ids, batch_size):
            suffixes = [ids[number][skipped:] for number in batch]
            logits, num_tokens = reading.last_logits(suffixes)
            num_read += num_tokens
            for number, row in zip(batch, logits, strict=True):
                found[number] = _letter_shares(row, prompts[number])
            on_done(len(batch))
    probabilities = [found[number] for number in range(len(ids))]
    return Scores(probabilities, num_read, sum(map(len, ids)))


def sharing_difference(model: Model, prompts: Sequence[Prompt]) -> float:
    """Return how far sharing moves the probabilities of the shortest prompt; NaN if it cannot be.

    A cache that cannot be lent (of a model with code of its own, say) shows up here.
    """
    shortest = sorted(prompts, key=lambda prompt: len(prompt.ids))[:2]
    whole = score_prompts(model, shortest[:1], batch_size=1, share_prefix=False)
    try:
        shared = score_prompts(model, shortest, batch_size=2)
    except (TypeError, AttributeError, NotImplementedError, ValueError):
        return float("nan")
    pairs = zip(whole.probabilities[0], shared.probabilities[0], strict=True)
    return max(abs(one - other) for one, other in pairs)


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with, leaving each one at least one of its own."""
    # of sorted sequences, the first and the last differ earliest
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return min(same, min(map(len, sequences)) - 1)


def _batches(ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield numbers of sequences, the longest first, so that too large a batch fails at once."""
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _letter_shares(logits: Tensor, prompt: Prompt) -> list[float]:
    shares: list[float] = logits[list(prompt.letter_ids)].softmax(dim=-1).tolist()
    if not all(share == share for share in shares):
        raise EvalError(
            "The model answers with NaN.",
            where=prompt.question.where,
            fix="check the weights, or try --infer_dtype float32",
        )
    return shares
