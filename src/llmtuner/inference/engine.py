"""A model with its tokenizer and template: messages in, the answer out."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.data.conversation import Message
from llmtuner.data.prompt import prompt_ids
from llmtuner.data.template import Template, load_template
from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.inference.generate import generate_texts, generation_config
from llmtuner.model.inference import load_for_inference
from llmtuner.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ChatEngine:
    """Answers chats with the prompt that training proved.

    Attributes:
        model: on its device, in evaluation mode.
        tokenizer: of the model or its adapter.
        template: renders the prompt, and says what ends an answer.
        generating: how to choose tokens.
        use_kv_cache: keep keys and values between tokens.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    generating: GeneratingArgs
    use_kv_cache: bool = True

    def answer(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """Answer each chat; they run as one batch.

        Args:
            chats: turns so far, each ending with a user or tool turn.

        Returns:
            The new text of each, in order.
        """
        prompts = [
            prompt_ids(chat, template=self.template, tokenizer=self.tokenizer) for chat in chats
        ]
        config = generation_config(
            self.generating,
            tokenizer=self.tokenizer,
            stop_ids=self.template.stop_ids,
            use_kv_cache=self.use_kv_cache,
        )
        return generate_texts(
            self.model,
            self.tokenizer,
            prompts,
            config=config,
            skip_special_tokens=self.generating.skip_special_tokens,
        )


def load_engine(model: ModelArgs, data: DataArgs, generating: GeneratingArgs) -> ChatEngine:
    """Load everything that chatting needs."""
    tokenizer = load_tokenizer(model)
    template = load_template(
        data.template,
        tokenizer,
        default_system=data.default_system,
        enable_thinking=data.enable_thinking,
    )
    loaded = load_for_inference(model, num_tokens=len(tokenizer))
    return ChatEngine(loaded, tokenizer, template, generating, use_kv_cache=model.use_kv_cache)
