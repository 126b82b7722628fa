"""Pre-training samples: every token of a plain text is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import Conversation
from llmtuner.data.render import Encoded, encode_texts
from llmtuner.data.tokenizer_digest import tokenizer_digest
from llmtuner.hparams.data import DataArgs

PACKS_BY_DEFAULT = True
"""What `packing` means where it is not given."""


@dataclass(frozen=True)
class TextEncoder:
    """Tokenises documents.

    Attributes:
        tokenizer: encodes the text.
        cutoff_len: longest sample, in tokens; a longer document becomes several.
        template: none: a text is shown as it is.
    """

    tokenizer: PreTrainedTokenizerBase
    cutoff_len: int
    template: None = None

    def __call__(self, documents: Sequence[Conversation]) -> list[Encoded]:
        """Encode documents."""
        return encode_texts(documents, tokenizer=self.tokenizer, cutoff_len=self.cutoff_len)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the tokens."""
        return {
            "kind": "text",
            "tokenizer": tokenizer_digest(self.tokenizer),
            "cutoff_len": self.cutoff_len,
        }


def build_encoder(args: DataArgs, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Take the settings from the user's data options."""
    return TextEncoder(tokenizer=tokenizer, cutoff_len=args.cutoff_len)
