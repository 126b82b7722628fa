"""The tokenizer: from the adapter or the base model, with the user's added tokens."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmtuner.extras.errors import ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapters import locate_adapters
from llmtuner.model.hub import locate, locate_model

logger = get_logger(__name__)


def load_tokenizer(args: ModelArgs, *, without_model: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that fits the model and its adapters, and add the user's tokens.

    An adapter saved with its tokenizer wins over the base, because tokens added while it was
    trained have their ids from there.

    Args:
        args: names the model and its adapters.
        without_model: no weights will be asked for, so an adapter's folder will do as the model.

    Raises:
        ModelError: the folder holds no tokenizer that can be read.
    """
    folder = _tokenizer_folder(args, without_model=without_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            use_fast=args.use_fast_tokenizer,
            trust_remote_code=args.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"The tokenizer cannot be loaded ({reason}).",
            got=str(folder),
            allowed="a folder with tokenizer.json, or tokenizer.model and tokenizer_config.json",
            fix="copy the base model's tokenizer files into the folder",
        ) from error
    _add_tokens(tokenizer, args)
    _set_padding(tokenizer)
    return tokenizer


def _tokenizer_folder(args: ModelArgs, *, without_model: bool) -> Path:
    for folder in reversed(locate_adapters(args)):
        if (folder / "tokenizer_config.json").is_file():
            logger.info("Tokenizer: from the adapter %s.", folder)
            return folder
    if without_model and args.model_name_or_path:
        return locate(args.model_name_or_path, args, weights=False)
    return locate_model(args, weights=False)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, args: ModelArgs) -> None:
    num_added = tokenizer.add_tokens(list(args.add_tokens or ()))
    num_added += tokenizer.add_tokens(list(args.add_special_tokens or ()), special_tokens=True)
    if num_added:
        logger.info("Tokenizer: %d tokens added, %d in all.", num_added, len(tokenizer))


def _set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give batched generation a token to pad with.

    Training never pads and never derives labels from this token, so the end token stays learned
    although it may also be the padding.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("Tokenizer: no padding token; generation pads with %r.", tokenizer.eos_token)
