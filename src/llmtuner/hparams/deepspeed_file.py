"""The DeepSpeed file beside the flags: the file wins, except that precision must agree."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.config import RunConfig

Problem = tuple[Sequence[str], ConfigError]
"""The options that a problem is about, and its message."""

_NUMBERS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.eps": "adam_epsilon",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
_SCHEDULES = {
    "WarmupDecayLR": "linear",
    "WarmupLR": "constant_with_warmup",
    "WarmupCosineLR": "cosine",
}

_ZERO_WEIGHTS = 3


@dataclass(frozen=True)
class DeepspeedFile:
    """A DeepSpeed configuration, read for comparison only."""

    path: str
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return the value of a dotted key, or None where the file says nothing or "auto"."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return None if value == "auto" else value

    def number(self, key: str) -> float | None:
        """Return the fixed number of a dotted key, or None."""
        value = self.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number else None


def read_deepspeed_file(path: str) -> DeepspeedFile:
    """Read the JSON file.

    Raises:
        ConfigError: it is missing, malformed or holds no object.
    """
    fix = "give a JSON file, such as deepspeed_config.json"
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        problem = f"Cannot read the DeepSpeed file: {(error.strerror or 'unreadable').lower()}."
        raise ConfigError(problem, got=path, fix=fix, where="deepspeed") from None
    except json.JSONDecodeError as error:
        problem = f"Malformed JSON: {error.msg} (column {error.colno})."
        raise ConfigError(problem, where=f"{path}:{error.lineno}") from None
    except (ValueError, RecursionError):
        raise ConfigError("The DeepSpeed file is not readable JSON.", got=path, fix=fix) from None
    if not isinstance(values, dict):
        raise ConfigError("The DeepSpeed file must hold one object.", got=path, fix=fix)
    return DeepspeedFile(path, values)


def adopt_deepspeed(config: RunConfig, file: DeepspeedFile) -> RunConfig:
    """Return the config with what the file fixes, and a notice for each change."""
    for key, name in _NUMBERS.items():
        config = _adopt_number(config, file, key=key, name=name)
    betas = file.get("optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2:
        config = _adopt(config, "adam_beta1", betas[0], shown=f"optimizer.params.betas {betas}")
        config = _adopt(config, "adam_beta2", betas[1], shown=f"optimizer.params.betas {betas}")
    schedule = file.get("scheduler.type")
    if schedule is not None:
        new = _SCHEDULES.get(str(schedule), config.train.lr_scheduler_type)
        config = _adopt(config, "lr_scheduler_type", new, shown=f"scheduler {schedule}")
    optimizer = file.get("optimizer.type")
    if optimizer is not None and "optim" in config.given:
        line = f"optim {config.train.optim} and the DeepSpeed file's {optimizer} differ"
        config = _note(config, f"{line}: the file wins.")
    return _adopt_precision(config, file)


def check_deepspeed(config: RunConfig, file: DeepspeedFile, world_size: int) -> Iterator[Problem]:
    """Yield what the file makes impossible."""
    for key in (*_NUMBERS, "train_batch_size"):
        value = file.get(key)
        if value is not None and file.number(key) is None:
            yield _problem(file, key, f'{key} must be a number or "auto".', got=value)
    rates = {file.number(key) for key, name in _NUMBERS.items() if name == "learning_rate"}
    if len(rates - {None}) > 1:
        key = "scheduler.params.warmup_max_lr"
        yield _problem(
            file, key, f"optimizer.params.lr and {key} differ.", got=sorted(map(str, rates))
        )
    warmup = file.number("scheduler.params.warmup_num_steps")
    if warmup is not None and warmup < 1:
        key = "scheduler.params.warmup_num_steps"
        yield _problem(file, key, f"{key} must be at least 1.", got=warmup)
    yield from _check_totals(config, file, world_size)
    yield from _check_precision(config, file)
    if config.train.compiles and file.number("zero_optimization.stage") == _ZERO_WEIGHTS:
        problem = "torch_compile does not go with ZeRO-3, whose weights come and go while it runs."
        error = ConfigError(problem, where=file.path, fix="leave torch_compile out, or use ZeRO-2")
        yield ("deepspeed", "torch_compile"), error


def _check_totals(config: RunConfig, file: DeepspeedFile, world_size: int) -> Iterator[Problem]:
    train = config.train
    batch = file.number("train_batch_size")
    real = train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size
    if batch is not None and batch != real:
        problem = (
            f"train_batch_size is {batch:g} in the file, but {train.per_device_train_batch_size} "
            f"per device x {train.gradient_accumulation_steps} accumulation steps x {world_size} "
            f"processes is {real}."
        )
        yield _problem(file, "train_batch_size", problem)
    total = file.number("scheduler.params.total_num_steps")
    if total is not None and total != train.max_steps:
        key = "scheduler.params.total_num_steps"
        yield _problem(file, key, f"{key} is fixed, max_steps is {train.max_steps}.", got=total)


def _check_precision(config: RunConfig, file: DeepspeedFile) -> Iterator[Problem]:
    wishes = _precision_wishes(config)
    fixed = {name: file.get(f"{name}.enabled") for name in ("bf16", "fp16")}
    if fixed["bf16"] is True and fixed["fp16"] is True:
        yield _problem(file, "bf16.enabled", "The file turns on both bf16 and fp16.")
        return
    for name, wish in wishes.items():
        if wish is not None and fixed[name] is not None and bool(fixed[name]) != wish:
            problem = (
                f"{name}.enabled is {str(bool(fixed[name])).lower()} in the file, "
                f"but the options ask for {name} {str(wish).lower()}."
            )
            yield _problem(file, f"{name}.enabled", problem, names=("deepspeed", name))


def _precision_wishes(config: RunConfig) -> dict[str, bool | None]:
    """Return what the user asked for; None where nothing was said."""
    train, given = config.train, config.given
    wants_bf16 = train.bf16 if "bf16" in given else None
    wants_fp16 = train.fp16 if "fp16" in given else None
    if config.finetuning.pure_bf16 or wants_bf16:
        return {"bf16": True, "fp16": wants_fp16 or False}
    if wants_fp16:
        return {"bf16": wants_bf16 or False, "fp16": True}
    return {"bf16": wants_bf16, "fp16": wants_fp16}


def _adopt_precision(config: RunConfig, file: DeepspeedFile) -> RunConfig:
    if list(_check_precision(config, file)):
        return config
    for name, wish in _precision_wishes(config).items():
        fixed = file.get(f"{name}.enabled")
        if wish is None and isinstance(fixed, bool) and vars(config.train)[name] is not fixed:
            config = _adopt(config, name, fixed, shown=f"{name}.enabled {str(fixed).lower()}")
            if name == "fp16":
                config = replace(config, train=replace(config.train, bf16=False))
    return config


def _adopt_number(config: RunConfig, file: DeepspeedFile, *, key: str, name: str) -> RunConfig:
    value = file.number(key)
    if value is None:
        return config
    is_whole = isinstance(config.values().get(name), int)
    return _adopt(config, name, int(value) if is_whole else float(value), shown=f"{key} {value:g}")


def _adopt(config: RunConfig, name: str, value: Any, *, shown: str) -> RunConfig:
    """Return the config with `value`, and a notice that shows both where the user said another."""
    old = config.values().get(name)
    if old == value:
        return config
    if name in config.given:
        line = f"{name} {_show(old)} and the DeepSpeed file's {shown} differ: the file wins."
    else:
        line = f"{name} is {_show(value)}: the DeepSpeed file says {shown}."
    train = config.train
    if name in vars(train):
        train = replace(train, **{name: value})
    else:
        train = replace(train, other={**train.other, name: value})
    return _note(replace(config, train=train), line)


def _note(config: RunConfig, line: str) -> RunConfig:
    return replace(config, notices=(*config.notices, line))


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _problem(
    file: DeepspeedFile,
    key: str,
    problem: str,
    *,
    got: object = None,
    names: Sequence[str] = ("deepspeed",),
) -> Problem:
    fix = f'write "{key.split(".")[-1]}": "auto" in the file'
    return names, ConfigError(problem, got=got, where=file.path, fix=fix)
