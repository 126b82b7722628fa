"""Text from a model: prompts in, only the newly written text out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.model.attention import padded_attention


def generation_config(
    args: GeneratingArgs,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    use_kv_cache: bool = True,
) -> GenerationConfig:
    """Return transformers' settings for our options; sampling options only when sampling.

    Args:
        args: how to choose tokens.
        tokenizer: gives the padding token, and the end token where no template ends turns.
        stop_ids: ids that end an answer.
        use_kv_cache: keep keys and values between tokens; without it each token costs a full pass.
    """
    samples = args.do_sample and args.temperature > 0  # temperature 0 means greedy
    values = {
        # as in LLaMA-Factory: max_length counts only where max_new_tokens is switched off
        **(
            {"max_new_tokens": args.max_new_tokens}
            if args.max_new_tokens > 0
            else {"max_length": args.max_length}
        ),
        "num_beams": args.num_beams,
        "repetition_penalty": args.repetition_penalty,
        "do_sample": samples,
        "use_cache": use_kv_cache,
        "eos_token_id": list(stop_ids) or tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.num_beams > 1:
        values["length_penalty"] = args.length_penalty
    if samples:
        values |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    return GenerationConfig(**values)


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt.

    Attributes:
        text: without the prompt.
        num_tokens: tokens written, the one that ends the answer too.
        is_finished: the model ended it; otherwise it ran out of room.
    """

    text: str
    num_tokens: int
    is_finished: bool


def generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig,
    skip_special_tokens: bool = True,
) -> list[str]:
    """Return the new text of each prompt, in order; see `generate_answers`."""
    answers = generate_answers(
        model, tokenizer, prompts, config=config, skip_special_tokens=skip_special_tokens
    )
    return [answer.text for answer in answers]


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig,
    skip_special_tokens: bool = True,
) -> list[Answer]:
    """Answer one batch of prompts.

    Args:
        model: on its device, with or without adapters.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt, as `prompt_ids` makes them.
        config: from `generation_config`.
        skip_special_tokens: leave stop tokens and the like out of the text.

    Returns:
        What was written after each prompt, in order; the prompt itself is not in it.
    """
    longest = max(len(prompt) for prompt in prompts)
    pad_id = config.pad_token_id or 0
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device = base.device
    with padded_attention(base):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
        )
    written = output[:, longest:]
    texts = tokenizer.batch_decode(written, skip_special_tokens=skip_special_tokens)
    lengths = [_length(ids, config) for ids in written.tolist()]
    return [Answer(text, *length) for text, length in zip(texts, lengths, strict=True)]


def _length(ids: Sequence[int], config: GenerationConfig) -> tuple[int, bool]:
    """Return the tokens up to the one that ends an answer, and whether there is one."""
    ends = config.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    end = next((number for number, token in enumerate(ids) if token in stops), None)
    return (len(ids), False) if end is None else (end + 1, True)
