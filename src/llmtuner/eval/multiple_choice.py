"""Scores by the likelihood of the letters, with the common beginning of the prompts read once.

All prompts of a subject begin with the same tokens (its examples). Their keys and values are
computed once and lent to every batch of questions, of which only the rest is read. Only the last
position of each question goes through the head.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from llmtuner.eval.prompts import Prompt
from llmtuner.extras.errors import EvalError
from llmtuner.model.attention import padded_attention, supports_kept_logits

_MIN_SHARED_TOKENS = 16  # less is not worth a pass of its own

Model = PreTrainedModel | PeftModel


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
    with padded_attention(_base(model)):
        prefix = None
        if prefix_length >= _MIN_SHARED_TOKENS:
            prefix = _read_prefix(model, ids[0][:prefix_length])
        skipped = 0 if prefix is None else prefix_length
        num_read = skipped
        for batch in _batches(ids, batch_size):
            suffixes = [ids[number][skipped:] for number in batch]
            logits = _last_logits(model, suffixes, prefix)
            num_read += len(batch) * max(map(len, suffixes))
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


def _base(model: Model) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _read_prefix(model: Model, ids: Sequence[int]) -> Cache | None:
    """Return the keys and values of the common beginning, or None if the model keeps none."""
    tokens = torch.tensor([ids], device=_base(model).device)
    output = model(input_ids=tokens, use_cache=True, **_keep(model, torch.tensor([len(ids) - 1])))
    cache = output.past_key_values
    return cache if isinstance(cache, Cache) else None


def _last_logits(model: Model, sequences: Sequence[Sequence[int]], prefix: Cache | None) -> Tensor:
    """Return the logits behind each sequence, float32 [n, vocabulary].

    Sequences are padded on the right, where nothing that counts looks.
    """
    device = _base(model).device
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    kept, column = torch.unique(lengths - 1, return_inverse=True)
    lent = {} if prefix is None else {"past_key_values": _lend(prefix, len(sequences))}
    options = _keep(model, kept)
    if not options:
        column = lengths - 1
    logits = model(input_ids=ids.to(device), use_cache=prefix is not None, **lent, **options).logits
    found: Tensor = logits[torch.arange(len(sequences)), column].float().cpu()
    return found


def _keep(model: Model, positions: Tensor) -> dict[str, Tensor]:
    """Return the argument by which only some positions go through the head."""
    if not supports_kept_logits(model):
        return {}
    return {"logits_to_keep": positions.to(_base(model).device)}


def _lend(prefix: Cache, count: int) -> Cache:
    """Return a cache of `count` equal rows; what a pass adds to it does not reach the original."""
    lent = copy.deepcopy(prefix)
    lent.reorder_cache(torch.zeros(count, dtype=torch.long))  # type: ignore[arg-type]
    return lent


def _letter_shares(logits: Tensor, prompt: Prompt) -> list[float]:
    shares: list[float] = logits[list(prompt.letter_ids)].softmax(dim=-1).tolist()
    if not all(share == share for share in shares):
        raise EvalError(
            "The model answers with NaN.",
            where=prompt.question.where,
            fix="check the weights, or try --infer_dtype float32",
        )
    return shares
