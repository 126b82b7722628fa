"""The ids of many texts in one call of the Rust tokenizer, without what nobody reads.

`tokenizer(texts)` also makes offsets, masks and a dictionary for every text; on short texts that
takes as long as the ids. Where a tokenizer cuts texts into words by itself, it is asked for each
word once. Tokenizers whose class brings its own way of encoding are asked as usual.
"""

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmtuner.data.pieces import pieces_of

Ids = list[list[int]]


def batch_ids(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool | None = None,
) -> Ids:
    """Return what `tokenizer(texts)["input_ids"]` is; equal texts are encoded once.

    Args:
        texts: to encode.
        tokenizer: any; it does not truncate or pad.
        add_special_tokens: as of the tokenizer.
        split_special_tokens: the same; None leaves it to the tokenizer.
    """
    if split_special_tokens is None:
        split_special_tokens = bool(tokenizer.split_special_tokens)
    number_of = Counter(texts)
    different = list(number_of)
    if not different:
        return []
    options = {
        "add_special_tokens": add_special_tokens,
        "split_special_tokens": split_special_tokens,
    }
    if isinstance(tokenizer, PreTrainedTokenizerFast) and _encodes_as_usual(type(tokenizer)):
        found = _backend_ids(different, tokenizer, **options)
    else:
        found = tokenizer(different, return_attention_mask=False, **options)["input_ids"]
    if len(different) == len(texts):
        return found
    of_text = dict(zip(different, found, strict=True))
    return [of_text[text] if number_of[text] == 1 else list(of_text[text]) for text in texts]


def _backend_ids(
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_special_tokens: bool,
    split_special_tokens: bool,
) -> Ids:
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:  # as transformers does before each call
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != split_special_tokens:
        backend.encode_special_tokens = split_special_tokens
    if not (add_special_tokens or split_special_tokens) and (pieces := pieces_of(backend)):
        return pieces.ids(texts)
    encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def _encodes_as_usual(kind: type[PreTrainedTokenizerFast]) -> bool:
    """Say whether a class of tokenizers changes nothing between text and backend."""
    own = [vars(one) for one in kind.__mro__ if one not in PreTrainedTokenizerFast.__mro__]
    changing = ("__call__", "_encode_plus", "_switch_to_input_mode", "set_truncation_and_padding")
    return not any(name in names for names in own for name in changing)
