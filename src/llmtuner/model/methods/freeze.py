"""Freeze training: a few layers, or parts of them, learn; the rest stays as it is."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.logs import get_logger
from llmtuner.hparams.freeze import FreezeArgs
from llmtuner.hparams.model import ModelArgs
from llmtuner.model.load import grown_vocabulary, load_model
from llmtuner.model.parameters import set_trained_dtype
from llmtuner.model.precision import Precision

logger = get_logger(__name__)

ALL = "all"


def load_for_training(
    model_args: ModelArgs,
    options: FreezeArgs,
    *,
    precision: Precision,
    attention: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> PreTrainedModel:
    """Load the model with the named layers and modules learning.

    Raises:
        ConfigError: a name is unknown, or nothing would learn.
    """
    model = load_model(
        model_args,
        dtype=precision.dtype,
        attention=attention,
        num_tokens=len(tokenizer),
        max_tokens=max_tokens,
    )
    model.requires_grad_(False)
    layers = transformer_layers(model)
    chosen = _chosen_layers(len(layers), options.freeze_trainable_layers)
    for index in chosen:
        _unfreeze(layers[index], options.freeze_trainable_modules)
    _unfreeze_extra(model, layers, options.freeze_extra_modules or ())
    for module in grown_vocabulary(model, model_args):
        module.requires_grad_(True)
        logger.info("Freeze: the vocabulary grew, so %s learns.", type(module).__name__)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "Nothing would learn.",
            where="freeze_trainable_layers",
            got=options.freeze_trainable_layers,
            fix="give a number of layers, or --freeze_extra_modules",
        )
    set_trained_dtype(model, precision.trained_dtype)
    logger.info("Freeze: layers %s learn.", ", ".join(map(str, chosen)) or "none")
    return model


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of the model's blocks: of its module lists, the one with most inside it.

    Raises:
        ConfigError: the model has no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(
            "This model's layers cannot be told apart.",
            where="finetuning_type",
            got=model.config.model_type,
            fix="use lora or full",
        )
    return max(lists, key=lambda blocks: sum(1 for _ in blocks.modules()))


def _chosen_layers(num_layers: int, wanted: int) -> list[int]:
    """Return the last `wanted` layers, or the first ones if it is negative."""
    if abs(wanted) > num_layers:
        raise ConfigError(
            "The model has fewer layers.",
            where="freeze_trainable_layers",
            got=wanted,
            allowed=f"-{num_layers} to {num_layers}",
        )
    return list(range(-wanted)) if wanted < 0 else list(range(num_layers - wanted, num_layers))


def _unfreeze(layer: nn.Module, names: tuple[str, ...]) -> None:
    if ALL in names:
        layer.requires_grad_(True)
        return
    children = dict(layer.named_children())
    for name in names:
        if name not in children:
            raise ConfigError(
                "The layers have no such module.",
                where="freeze_trainable_modules",
                got=name,
                allowed=[ALL, *children],
            )
        children[name].requires_grad_(True)


def _unfreeze_extra(model: PreTrainedModel, layers: nn.ModuleList, names: tuple[str, ...]) -> None:
    inside = {id(module) for module in layers.modules()}
    outside = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
    }
    for name in names:
        if name not in outside:
            raise ConfigError(
                "The model has no such module outside its layers.",
                where="freeze_extra_modules",
                got=name,
                allowed=outside,
            )
        outside[name].requires_grad_(True)
