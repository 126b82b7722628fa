"""Full training: every weight learns."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.hparams.full import FullArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.load import load_model
from llmtuner.model.precision import Precision


def load_for_training(
    model_args: ModelArgs,
    options: FullArgs,
    *,
    precision: Precision,
    attention: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> PreTrainedModel:
    """Load the model with every weight learning, in float32 unless `precision` is pure."""
    model = load_model(
        model_args,
        dtype=precision.trained_dtype,
        attention=attention,
        num_tokens=len(tokenizer),
        max_tokens=max_tokens,
    )
    return model.requires_grad_(True)
