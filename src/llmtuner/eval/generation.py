"""Answers that the model writes, from which the chosen letter is taken."""

from collections.abc import Callable, Sequence

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.eval.prompts import Prompt
from llmtuner.inference.generate import generate_texts


def write_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    config: GenerationConfig,
    batch_size: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Return the text that the model writes behind each prompt; batches are sorted by length."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = [prompts[number].ids for number in batch]
        # Tags of thoughts may be special tokens, and what stands between them is no answer.
        written = generate_texts(model, tokenizer, ids, config=config, skip_special_tokens=False)
        for number, text in zip(batch, written, strict=True):
            texts[number] = text
        on_done(len(batch))
    return texts
