"""What a stage makes of a conversation, together with everything that decides the result."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import Conversation
from llmtuner.data.render import Encoded, encode_conversation, encode_text
from llmtuner.data.template import Template
from llmtuner.hparams.data import DataArgs


@dataclass(frozen=True)
class ConversationEncoder:
    """Supervised samples: the assistant's turns are learned.

    Attributes:
        template: renders the conversation.
        tokenizer: the one the template was loaded for.
        cutoff_len: longest sample, in tokens.
        mask_history: learn only the last answer.
        train_on_prompt: learn the prompt too.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False

    @classmethod
    def of(
        cls, args: DataArgs, *, template: Template, tokenizer: PreTrainedTokenizerBase
    ) -> "ConversationEncoder":
        """Take the settings from the user's data options."""
        return cls(
            template=template,
            tokenizer=tokenizer,
            cutoff_len=args.cutoff_len,
            mask_history=args.mask_history,
            train_on_prompt=args.train_on_prompt,
        )

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode one conversation."""
        return encode_conversation(
            conversation,
            template=self.template,
            tokenizer=self.tokenizer,
            cutoff_len=self.cutoff_len,
            mask_history=self.mask_history,
            train_on_prompt=self.train_on_prompt,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the tokens."""
        return {
            "kind": "conversation",
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": self.template.text,
            "stop_ids": self.template.stop_ids,
            "enable_thinking": self.template.enable_thinking,
            "cutoff_len": self.cutoff_len,
            "mask_history": self.mask_history,
            "train_on_prompt": self.train_on_prompt,
        }


@dataclass(frozen=True)
class TextEncoder:
    """Pre-training samples: every token is learned.

    Attributes:
        tokenizer: encodes the text.
        cutoff_len: longest sample, in tokens; a longer document becomes several.
    """

    tokenizer: PreTrainedTokenizerBase
    cutoff_len: int

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode one document."""
        return encode_text(conversation, tokenizer=self.tokenizer, cutoff_len=self.cutoff_len)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the tokens."""
        return {
            "kind": "text",
            "tokenizer": tokenizer_digest(self.tokenizer),
            "cutoff_len": self.cutoff_len,
        }


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
