"""LoRA: the base stays frozen, small matrices beside its linear layers learn.

On a quantised base this is QLoRA. Source: https://arxiv.org/abs/2106.09685 (LoRA),
https://arxiv.org/abs/2305.14314 (QLoRA).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.lora import LoraArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.adapter_fit import check_chain
from llmtuner.model.adapters import locate_adapters, read_adapter_config, vocabulary_rows
from llmtuner.model.hub import locate_model
from llmtuner.model.load import grown_vocabulary, load_model
from llmtuner.model.merge import attach_adapter, merge_adapters
from llmtuner.model.parameters import cast_parameters, set_trained_dtype
from llmtuner.model.patches import peft_without_bitsandbytes
from llmtuner.model.precision import Precision

logger = get_logger(__name__)

ALL = "all"


def load_for_training(
    model_args: ModelArgs,
    options: LoraArgs,
    *,
    precision: Precision,
    attention: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> PeftModel:
    """Load the base, merge earlier adapters, and add a new adapter or resume the last one.

    Raises:
        ModelError: an adapter does not fit the base.
        ConfigError: a target names no layer, or options exclude each other.
    """
    _check_options(model_args, options)
    merged, resumed = split_adapters(model_args, options)
    chain = [*merged, resumed] if resumed else merged
    check_chain(chain, locate_model(model_args))
    model = load_model(
        model_args,
        # Merging adds in float32 and rounds once.
        dtype=torch.float32 if merged else precision.dtype,
        attention=attention,
        num_tokens=len(tokenizer),
        min_rows=max(map(vocabulary_rows, chain), default=0),
        max_tokens=max_tokens,
    )
    if merged:
        model = merge_adapters(model, merged)
        cast_parameters(model, precision.dtype)
    model.requires_grad_(False)
    if resumed:
        peft_model = _resume(model, resumed, options)
    else:
        peft_model = _add(model, options, grown=grown_vocabulary(model, model_args))
    set_trained_dtype(peft_model, precision.trained_dtype)
    return peft_model


def split_adapters(model_args: ModelArgs, options: LoraArgs) -> tuple[list[Path], Path | None]:
    """Return the adapters that are merged before training, and the one that is trained further."""
    folders = locate_adapters(model_args)
    if not folders or options.create_new_adapter:
        return folders, None
    return folders[:-1], folders[-1]


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the last name parts of the linear layers, quantised ones too, without the head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def _check_options(model_args: ModelArgs, options: LoraArgs) -> None:
    adapters = model_args.adapter_name_or_path or ()
    num_merged = len(adapters) if options.create_new_adapter else len(adapters) - 1
    if num_merged > 0 and is_deepspeed_zero3_enabled():
        raise ConfigError(
            "Adapters cannot be merged into weights that ZeRO-3 has spread over the processes.",
            where="adapter_name_or_path",
            got=list(adapters),
            fix="merge them with `llmtuner export` first, or use ZeRO-2",
        )
    if model_args.quantization_bit is None:
        return
    if num_merged > 0:
        raise ConfigError(
            "Adapters cannot be merged into a quantised base.",
            where="adapter_name_or_path",
            got=list(adapters),
            allowed="one adapter, which is trained further",
            fix="merge them with `llmtuner export` first, or drop --quantization_bit",
        )


def _resume(model: PreTrainedModel, folder: Path, options: LoraArgs) -> PeftModel:
    peft_model = attach_adapter(model, folder, is_trainable=True)
    rank = read_adapter_config(folder)["r"]
    logger.info("LoRA: training %s further, with its own rank %d and targets.", folder, rank)
    if rank != options.lora_rank:
        logger.warning("LoRA: lora_rank %d is not used.", options.lora_rank)
    return peft_model


def _add(model: PreTrainedModel, options: LoraArgs, *, grown: list[nn.Module]) -> PeftModel:
    targets = _targets(model, options.lora_target)
    whole = _whole_modules(model, options.additional_target, grown)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        modules_to_save=whole or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        ensure_weight_tying=_touches_tied_weights(model, [*targets, *whole]),
    )
    logger.info("LoRA: rank %d on %s.", options.lora_rank, ", ".join(targets))
    with peft_without_bitsandbytes():
        return get_peft_model(model, config)


def _targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    known = linear_names(model)
    if ALL in wanted:
        return known
    # The head and embeddings take adapters too, but only when they are named.
    unknown = _unknown(model, wanted)
    if unknown:
        raise ConfigError(
            "The model has no such layers.",
            where="lora_target",
            got=unknown,
            allowed=[ALL, *known],
        )
    return list(wanted)


def _whole_modules(
    model: PreTrainedModel, wanted: tuple[str, ...] | None, grown: list[nn.Module]
) -> list[str]:
    """Return the modules that are trained whole; new rows of a grown vocabulary must learn."""
    if wanted is not None:
        unknown = _unknown(model, wanted)
        if unknown:
            known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
            raise ConfigError(
                "The model has no such modules.",
                where="additional_target",
                got=unknown,
                allowed=sorted(name for name in known if not name.isdigit()),
            )
        return list(wanted)
    names = [_last_name(model, module) for module in grown]
    if names:
        logger.info("LoRA: the vocabulary grew, so %s are trained whole.", ", ".join(names))
    return names


def _unknown(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    names = [f".{name}" for name, _ in model.named_modules()]
    return [word for word in wanted if not any(name.endswith(f".{word}") for name in names)]


def _last_name(model: nn.Module, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0].rpartition(".")[2]


def _touches_tied_weights(model: PreTrainedModel, names: list[str]) -> bool:
    if not model.config.get_text_config().tie_word_embeddings:
        return False
    tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    return any(
        _last_name(model, module) in [n.rpartition(".")[2] for n in names] for module in tied
    )
