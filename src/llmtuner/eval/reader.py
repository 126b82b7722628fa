"""The model that is asked, with its tokenizer and template."""

from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.data.template import Template, load_template
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.config import RunConfig
from llmtuner.model.context import context_tokens
from llmtuner.model.fast.layer import use_fast_layers
from llmtuner.model.inference import load_for_inference
from llmtuner.model.tokenizer import load_tokenizer

logger = get_logger(__name__)

PLAIN_TEMPLATE = "fewshot"
"""Taken where neither the user nor the tokenizer names a chat template, as for base models."""


@dataclass(frozen=True)
class Reader:
    """A model that is ready to be asked.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: of the model or its adapter.
        template: renders the prompts.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template

    @property
    def limit(self) -> int | None:
        """The longest text that the model can read, in tokens; None where its config is silent."""
        return context_tokens(self.model.config)


def load_reader(config: RunConfig) -> Reader:
    """Load tokenizer, template and model."""
    tokenizer = load_tokenizer(config.model)
    name = config.data.template
    if name is None and tokenizer.chat_template is None:
        logger.info(
            "The tokenizer has no chat template: asking in plain text (%s).", PLAIN_TEMPLATE
        )
        name = PLAIN_TEMPLATE
    template = load_template(
        name,
        tokenizer,
        default_system=config.data.default_system,
        enable_thinking=config.data.enable_thinking,
    )
    model = load_for_inference(
        config.model, num_tokens=len(tokenizer), use_cpu=config.train.use_cpu
    )
    if config.model.fast_kernels and config.model.quantization_bit is None:
        use_fast_layers(model.requires_grad_(False))
    return Reader(model, tokenizer, template)
