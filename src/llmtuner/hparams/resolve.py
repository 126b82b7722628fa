"""Derived values: each one is set in a new object and noted with its reason."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.deepspeed_file import DeepspeedFile, adopt_deepspeed
from llmtuner.hparams.options import all_options

TRACKERS = ("wandb", "swanlab", "tensorboard")
"""Trackers that a run can report to."""

HELD_OUT_RATIO = 0.1

_TRAINING = ("train", "selfcheck", "plan")
"""Commands whose settings are those of a training run."""


def resolve(config: RunConfig, deepspeed: DeepspeedFile | None = None) -> RunConfig:
    """Return the config with every value filled in that follows from others."""
    for rule in _RULES:
        config = rule(config)
    if config.command in _TRAINING:
        for rule in _TRAIN_RULES:
            config = rule(config)
        if deepspeed is not None:
            config = adopt_deepspeed(config, deepspeed)
    return config


def _derive(config: RunConfig, group: str, reason: str, **values: Any) -> RunConfig:
    changed = replace(vars(config)[group], **values)
    return replace(config, **{group: changed}, notices=(*config.notices, reason))


def _note(config: RunConfig, line: str) -> RunConfig:
    return replace(config, notices=(*config.notices, line))


def _lora_alpha(config: RunConfig) -> RunConfig:
    if config.lora.lora_alpha is not None:
        return config
    alpha = 2 * config.lora.lora_rank
    # Elsewhere the adapter's own file says what it was trained with.
    if config.command not in _TRAINING or config.method is not config.lora:
        return replace(config, lora=replace(config.lora, lora_alpha=alpha))
    return _derive(
        config,
        "lora",
        f"lora_alpha is {alpha}: 2 x lora_rank, as it was not given.",
        lora_alpha=alpha,
    )


def _other_methods(config: RunConfig) -> RunConfig:
    chosen = config.finetuning.finetuning_type
    options = all_options()
    for method, args in config.methods.items():
        for name in sorted(config.given.intersection(vars(args))):
            if method != chosen and vars(args)[name] != options[name].default:
                config = _note(config, f"{name} has no effect: finetuning_type is {chosen}.")
    return config


def _packing(config: RunConfig) -> RunConfig:
    if not config.data.neat_packing or config.data.packing:
        return config
    return _derive(config, "data", "packing is true: neat_packing asks for it.", packing=True)


def _trackers(config: RunConfig) -> RunConfig:
    wanted = list(config.train.report_to)
    if config.swanlab.use_swanlab and "swanlab" not in wanted:
        config = _note(config, "report_to gets swanlab: use_swanlab asks for it.")
        wanted.append("swanlab")
    if "all" in wanted:
        names = ", ".join(TRACKERS)
        config = _note(config, f"report_to all has no effect: name the trackers ({names}).")
    known = tuple(dict.fromkeys(name for name in wanted if name in TRACKERS))
    unknown = tuple(name for name in wanted if name not in (*TRACKERS, "all", "none"))
    report_to = (*known, *unknown) or ("none",)
    return replace(config, train=replace(config.train, report_to=report_to))


def _what_to_do(config: RunConfig) -> RunConfig:
    train = config.train
    if train.eval_strategy != "no" and train.do_train and not train.do_eval:
        reason = f"do_eval is true: eval_strategy is {train.eval_strategy}."
        config = _derive(config, "train", reason, do_eval=True)
    if train.do_predict and not train.predict_with_generate:
        reason = "predict_with_generate is true: do_predict asks for it."
        config = _derive(config, "train", reason, predict_with_generate=True)
    if train.eval_strategy == "steps" and not train.eval_steps:
        reason = f"eval_steps is {train.logging_steps:g}, like logging_steps, as it was not given."
        config = _derive(config, "train", reason, eval_steps=train.logging_steps)
    needs_metric = (
        train.save_strategy == "best" or config.finetuning.early_stopping_steps is not None
    )
    if needs_metric and train.metric_for_best_model is None:
        reason = "metric_for_best_model is eval_loss, the lower the better, as it was not given."
        values = {"metric_for_best_model": "eval_loss", "greater_is_better": False}
        config = _derive(config, "train", reason, **values)
    return config


def _evaluation_data(config: RunConfig) -> RunConfig:
    train, data = config.train, config.data
    wants_rows = train.do_eval or train.do_predict
    if not wants_rows or data.eval_dataset is not None or data.val_size > 0:
        return config
    if not train.do_train and data.dataset is not None:
        names = ",".join(data.dataset)
        reason = f"eval_dataset is {names}: without do_train, dataset is what is evaluated."
        return _derive(config, "data", reason, eval_dataset=data.dataset)
    if data.streaming or not train.do_train:
        return config
    reason = (
        f"val_size is {HELD_OUT_RATIO:g}: holding out 10 % (seed {train.seed}), as evaluation is "
        "asked for without val_size or eval_dataset."
    )
    return _derive(config, "data", reason, val_size=HELD_OUT_RATIO)


def _gradient_checkpointing(config: RunConfig) -> RunConfig:
    given = config.train.gradient_checkpointing_kwargs or {}
    for name in sorted(given.keys() - {"use_reentrant"}):
        config = _note(config, f"gradient_checkpointing_kwargs {name} has no effect.")
    reentrant = given.get("use_reentrant")
    if not isinstance(reentrant, bool) or reentrant == config.model.use_reentrant_gc:
        return config
    reason = f"use_reentrant_gc is {str(reentrant).lower()}: gradient_checkpointing_kwargs says so."
    return _derive(config, "model", reason, use_reentrant_gc=reentrant)


def _torch_compile(config: RunConfig) -> RunConfig:
    if not config.train.compiles:
        return config
    if config.model.fast_kernels:
        reason = "fast_kernels is false: torch_compile compiles the layers instead."
        config = _derive(config, "model", reason, fast_kernels=False)
    if config.model.use_reentrant_gc:
        reason = "use_reentrant_gc is false: torch_compile can only follow the other kind."
        config = _derive(config, "model", reason, use_reentrant_gc=False)
    return config


_Rule = Callable[[RunConfig], RunConfig]
_RULES: tuple[_Rule, ...] = (_lora_alpha, _packing)
_TRAIN_RULES: tuple[_Rule, ...] = (
    _other_methods,
    _trackers,
    _what_to_do,
    _evaluation_data,
    _gradient_checkpointing,
    _torch_compile,
)
