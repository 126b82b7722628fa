"""Full training: every weight learns."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.extras.errors import ConfigError
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
    """Load the model with every weight learning, in float32 unless `precision` is pure.

    Raises:
        ConfigError: the base is asked to be quantised.
    """
    if model_args.quantization_bit is not None:
        raise ConfigError(
            "Quantised weights cannot learn.",
            where="quantization_bit",
            got=model_args.quantization_bit,
            fix="use --finetuning_type lora, or drop --quantization_bit",
        )
    model = load_model(
        model_args,
        dtype=precision.trained_dtype,
        attention=attention,
        num_tokens=len(tokenizer),
        max_tokens=max_tokens,
    )
    return model.requires_grad_(True)
