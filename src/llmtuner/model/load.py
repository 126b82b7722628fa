"""The base model: from a folder or the hub, in a given type, quantised or stretched if asked."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmtuner.extras.env import process_env
from llmtuner.extras.errors import ConfigError, ModelError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.attention import OURS, register_varlen
from llmtuner.model.hub import locate_model
from llmtuner.model.quantize import keep_layout, quantization_config
from llmtuner.model.rope import scale_rope
from llmtuner.model.weights import check_weight_files

logger = get_logger(__name__)

# Matrix units work on blocks of this many columns; an odd vocabulary wastes them.
_VOCABULARY_MULTIPLE = 64


def load_config(args: ModelArgs, *, max_tokens: int | None = None) -> PreTrainedConfig:
    """Read the model's configuration and apply the user's changes to it; loads no weights.

    Args:
        args: the model and its options.
        max_tokens: longest sample, for `rope_scaling`.

    Raises:
        ModelError: there is no model, or its configuration cannot be read.
    """
    folder = locate_model(args, weights=False)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=args.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise _loading_error(folder, error) from error
    if args.rope_scaling is not None:
        scale_rope(config, args.rope_scaling, max_tokens=max_tokens)
    if args.moe_aux_loss_coef is not None:
        _set_moe_loss(config, args.moe_aux_loss_coef)
    return config


def load_model(
    args: ModelArgs,
    *,
    dtype: torch.dtype,
    attention: str,
    device: str | None = None,
    num_tokens: int = 0,
    min_rows: int = 0,
    max_tokens: int | None = None,
    for_training: bool = True,
) -> PreTrainedModel:
    """Load the base model.

    Args:
        args: the model and its options.
        dtype: type of the weights that are not quantised.
        attention: transformers' `attn_implementation`.
        device: "cpu", "cuda:0", "auto"; None: left to the trainer, on the CPU for now.
        num_tokens: length of the tokenizer; the embeddings grow to hold it with `resize_vocab`.
        min_rows: rows of the embeddings that an adapter carries; they always grow to these.
        max_tokens: longest sample, for `rope_scaling`.
        for_training: whether gradients will flow through the weights, quantised ones too.

    Raises:
        ModelError: the model is missing, damaged, or too small for the tokenizer.
    """
    if attention in OURS:
        register_varlen()
    config = load_config(args, max_tokens=max_tokens)
    model: PreTrainedModel
    if args.train_from_scratch:
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=args.trust_remote_code,
        )
        logger.info("Model: %s with random weights.", args.model_name_or_path)
    else:
        model = _load_weights(args, config, dtype=dtype, attention=attention, device=device)
    # PEFT writes this name into adapters: the user's word for the model, not a cache folder.
    model.config._name_or_path = model.name_or_path = str(args.model_name_or_path)
    _fit_vocabulary(model, args, num_tokens=num_tokens, min_rows=min_rows)
    keep_layout(model, for_training=for_training)
    if args.upcast_layernorm:
        _upcast_norms(model)
    if args.upcast_lmhead_output:
        model.get_output_embeddings().register_forward_hook(_to_float32)
    return model


def _load_weights(
    args: ModelArgs,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    device: str | None,
) -> PreTrainedModel:
    folder = locate_model(args)
    check_weight_files(folder)
    quantization = quantization_config(args, compute_dtype=dtype)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            device_map=_device_map(args, device, quantization),
            offload_folder=args.offload_folder if device == "auto" else None,
            use_safetensors=True,
            trust_remote_code=args.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _loading_error(folder, error) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        raise ModelError(
            "The model's files lack some of its weights.",
            where=str(folder),
            got=sorted(report["missing_keys"]),
            fix="copy or download the model again",
        )
    return model


def _device_map(
    args: ModelArgs, device: str | None, quantization: BitsAndBytesConfig | None
) -> str | dict[str, str] | None:
    if device == "auto" or (quantization and args.quantization_device_map):
        return "auto"
    if device is not None:
        return {"": device}
    if quantization is None:
        return None
    # Quantised weights cannot be moved later, so they are put where this process computes.
    on_gpu = torch.cuda.is_available()
    return {"": f"cuda:{process_env().local_rank}" if on_gpu else "cpu"}


def _loading_error(folder: Path, error: Exception) -> ModelError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    fix = "copy or download the model again"
    if "trust_remote_code" in str(error):
        reason = "it brings its own Python code"
        fix = "read that code, then give --trust_remote_code"
    return ModelError(f"The model cannot be loaded: {reason}", where=str(folder), fix=fix)


def _fit_vocabulary(
    model: PreTrainedModel, args: ModelArgs, *, num_tokens: int, min_rows: int
) -> None:
    """Give every id of the tokenizer its row; new rows are drawn around the mean of the old."""
    rows = embedding_rows(model)
    if max(num_tokens, min_rows) <= rows:
        return
    is_wanted = args.resize_vocab or args.add_tokens or args.add_special_tokens
    if num_tokens > max(rows, min_rows) and not is_wanted:
        raise ModelError(
            "The tokenizer has more tokens than the model has embeddings.",
            got=f"{num_tokens} tokens, {rows} embeddings",
            fix="give --resize_vocab",
        )
    if args.quantization_bit is not None:
        raise ConfigError(
            "The vocabulary of a quantised model cannot grow.",
            where="resize_vocab",
            fix="drop --quantization_bit, or do not add tokens",
        )
    model.resize_token_embeddings(
        max(num_tokens, min_rows), pad_to_multiple_of=_VOCABULARY_MULTIPLE, mean_resizing=True
    )
    new_rows = embedding_rows(model)
    logger.info("Vocabulary: %d -> %d rows for %d tokens.", rows, new_rows, num_tokens)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many ids the embedding has rows for."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def _set_moe_loss(config: PreTrainedConfig, weight: float) -> None:
    text = config.get_text_config()
    if "router_aux_loss_coef" not in text.to_dict():
        raise ConfigError(
            "This model has no experts to balance.",
            where="moe_aux_loss_coef",
            got=config.model_type,
            fix="drop --moe_aux_loss_coef",
        )
    text.router_aux_loss_coef = weight
    text.output_router_logits = weight > 0


def _upcast_norms(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = parameter.data.float()


def _to_float32(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()


def grown_vocabulary(model: PreTrainedModel, args: ModelArgs) -> list[nn.Module]:
    """Return the modules whose new rows must learn; none when the vocabulary did not grow.

    Tokens that the user adds are new also where the model has spare rows for them.
    """
    text_config = model.config.get_text_config()
    has_new_rows = embedding_rows(model) > load_config(args).get_text_config().vocab_size
    if not (has_new_rows or args.add_tokens or args.add_special_tokens):
        return []
    heads = [] if text_config.tie_word_embeddings else [model.get_output_embeddings()]
    return [model.get_input_embeddings(), *heads]
