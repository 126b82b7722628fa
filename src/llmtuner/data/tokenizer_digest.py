"""A hash of everything in a tokenizer that decides the ids."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary, the merge rules and the special tokens."""
    if tokenizer.is_fast:
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    special = json.dumps(
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True
    )
    settings = f"{tokenizer.split_special_tokens}{type(tokenizer).__name__}"
    return hashlib.sha256(f"{rules}{special}{settings}".encode()).hexdigest()
