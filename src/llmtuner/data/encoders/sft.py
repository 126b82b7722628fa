"""Supervised samples: the assistant's turns of conversations are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtuner.data.conversation import Conversation
from llmtuner.data.render import Encoded, encode_conversations
from llmtuner.data.template import Template, load_template
from llmtuner.data.tokenizer_digest import tokenizer_digest
from llmtuner.hparams.data import DataArgs

PACKS_BY_DEFAULT = False
"""What `packing` means where it is not given."""


@dataclass(frozen=True)
class ConversationEncoder:
    """Renders, proves and tokenises conversations.

    Attributes:
        template: renders the conversation.
        tokenizer: the one the template was loaded for.
        cutoff_len: longest sample, in tokens.
        truncation: how longer samples are cut.
        mask_history: learn only the last answer.
        train_on_prompt: learn the prompt too.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    cutoff_len: int
    truncation: str = "turns"
    mask_history: bool = False
    train_on_prompt: bool = False

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encode conversations."""
        return encode_conversations(
            conversations,
            template=self.template,
            tokenizer=self.tokenizer,
            cutoff_len=self.cutoff_len,
            truncation=self.truncation,
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
            "truncation": self.truncation,
            "mask_history": self.mask_history,
            "train_on_prompt": self.train_on_prompt,
        }


def build_encoder(args: DataArgs, tokenizer: PreTrainedTokenizerBase) -> ConversationEncoder:
    """Load the template and take the settings from the user's data options.

    The tokenizer gets the template, so that both are saved together.
    """
    template = load_template(
        args.template,
        tokenizer,
        default_system=args.default_system,
        enable_thinking=args.enable_thinking,
    )
    tokenizer.chat_template = template.serving_text()
    return ConversationEncoder(
        template=template,
        tokenizer=tokenizer,
        cutoff_len=args.cutoff_len,
        truncation=args.truncation,
        mask_history=args.mask_history,
        train_on_prompt=args.train_on_prompt,
    )
