"""Small real tokenizers, trained on the spot; every text survives encoding and decoding."""

import re
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmtuner.data.templates import read_template, template_names

SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "You are a helpful assistant. user assistant system tool",
    "什么是高血压？高血压是动脉血压持续升高的疾病。",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
]
CONTROL_TOKENS = [
    "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<|observation|>", "[gMASK]", "sop",
    "<reserved_106>", "<reserved_107>",
]  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def control_tokens(template: str) -> list[str]:
    """Return the control tokens that a named template asks for in its header."""
    found = re.search(r"\{#- control: (.*?) -#\}", read_template(template))
    return found[1].split() if found else []


def extend(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add control tokens behind the vocabulary, where they move no other id."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)


@cache
def byte_level(without: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like Qwen's or Llama 3's, with all templates' control tokens."""
    tokenizer = plain_byte_level(without)
    wanted = {token for name in template_names() for token in control_tokens(name)}
    extend(tokenizer, sorted(wanted.difference(without)))
    return tokenizer


def plain_byte_level(without: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The same with only the control tokens above."""
    tokens = [token for token in CONTROL_TOKENS if token not in without]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    names = {key: token for key, token in NAMES.items() if token in tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: it writes a space of its own in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(prepend)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*CONTROL_TOKENS, *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)
