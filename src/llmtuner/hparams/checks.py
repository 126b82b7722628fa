"""Checks across options: what cannot work together, before anything is loaded."""

import math
import os
from collections.abc import Callable, Iterator, Mapping

from llmtuner.extras.env import process_env
from llmtuner.extras.errors import ConfigError
from llmtuner.hparams.config import RunConfig
from llmtuner.hparams.deepspeed_file import DeepspeedFile, Problem, check_deepspeed
from llmtuner.hparams.resolve import TRACKERS

_MODES_OF_ONE_SHAPE = ("reduce-overhead", "max-autotune")
_LONGEST_NAME_BYTES = 255  # of file systems


def check(config: RunConfig, deepspeed: DeepspeedFile | None = None) -> list[Problem]:
    """Return every problem, each with the options that it is about."""
    found = [problem for rule in _CHECKS[config.command] for problem in rule(config)]
    if deepspeed is not None:
        found += check_deepspeed(config, deepspeed, process_env().world_size)
    return found


def _output_is_no_input(config: RunConfig) -> Iterator[Problem]:
    """Training writes weights into output_dir and clears old ones: never those it starts from."""
    output_dir = config.train.output_dir
    inputs = (config.model.model_name_or_path, *(config.model.adapter_name_or_path or ()))
    for path in filter(None, inputs if config.train.do_train and output_dir else ()):
        if _real(path) == _real(str(output_dir)):
            problem = "output_dir is the folder of the model or adapter that training starts from."
            fix = "write to another --output_dir"
            yield ("output_dir", "model_name_or_path"), ConfigError(problem, got=path, fix=fix)


def _model(config: RunConfig) -> Iterator[Problem]:
    if not config.model.model_name_or_path:
        yield _missing("model_name_or_path", "a folder or hub name of the base model")
    if config.model.adapter_name_or_path and not config.method.uses_adapters:
        yield (
            ("adapter_name_or_path", "finetuning_type"),
            ConfigError(
                "adapter_name_or_path goes with finetuning_type lora only.",
                got=f"finetuning_type {config.finetuning.finetuning_type}",
                fix="set finetuning_type lora, or merge the adapter first with llmtuner export",
            ),
        )


def _quantization(config: RunConfig) -> Iterator[Problem]:
    bits, kind = config.model.quantization_bit, config.finetuning.finetuning_type
    if bits is not None and not config.method.trains_quantized:
        yield (
            ("quantization_bit", "finetuning_type"),
            ConfigError(
                "quantization_bit goes with finetuning_type lora only.",
                got=f"quantization_bit {bits}, finetuning_type {kind}",
                fix="set finetuning_type lora, or leave quantization_bit out",
            ),
        )


def _export(config: RunConfig) -> Iterator[Problem]:
    if not config.export.export_dir:
        yield _missing("export_dir", "the folder for the merged model")
    else:
        yield from _folder("export_dir", config.export.export_dir)
    if config.model.quantization_bit is not None:
        yield (
            ("quantization_bit",),
            ConfigError(
                "An adapter cannot be merged into a quantised model.",
                got=f"quantization_bit {config.model.quantization_bit}",
                fix="leave quantization_bit out",
            ),
        )


def _benchmark(config: RunConfig) -> Iterator[Problem]:
    if not config.evaluating.task:
        yield _missing("task", "a benchmark such as ceval, cmmlu or mmlu")


def _job(config: RunConfig) -> Iterator[Problem]:
    train, data = config.train, config.data
    jobs = ("do_train", "do_eval", "do_predict")
    if not (train.do_train or train.do_eval or train.do_predict):
        problem = "Nothing to do: do_train, do_eval and do_predict are all false."
        yield jobs, ConfigError(problem, fix="add --do_train")
    if not train.output_dir:
        yield _missing("output_dir", "the folder for the results")
    else:
        yield from _folder("output_dir", train.output_dir)
    has_rows = data.dataset is not None or data.tokenized_path is not None
    if not has_rows and (train.do_train or data.eval_dataset is None):
        yield _no_dataset(config)
    if train.gradient_checkpointing and config.model.disable_gradient_checkpointing:
        names = ("gradient_checkpointing", "disable_gradient_checkpointing")
        yield names, ConfigError(f"{names[0]} and {names[1]} are both true.", fix="drop one")
    unknown = [name for name in train.report_to if name not in (*TRACKERS, "none")]
    if unknown:
        allowed = (*TRACKERS, "none")
        yield (
            ("report_to",),
            ConfigError("Unknown tracker in report_to.", got=unknown, allowed=allowed),
        )


def _precision(config: RunConfig) -> Iterator[Problem]:
    train = config.train
    names = ("bf16", "fp16", "pure_bf16")
    if train.fp16 and train.bf16:
        yield names, ConfigError("fp16 and bf16 are both true.", fix="drop one of the two")
    if config.finetuning.pure_bf16 and train.fp16:
        yield names, ConfigError("pure_bf16 and fp16 are both true.", fix="drop one of the two")
    if config.finetuning.pure_bf16 and train.bf16 is False and "bf16" in config.given:
        yield names, ConfigError("pure_bf16 is true and bf16 is false.", fix="drop one of the two")


def _compiling(config: RunConfig) -> Iterator[Problem]:
    mode = config.train.other.get("torch_compile_mode")
    if mode in _MODES_OF_ONE_SHAPE:
        problem = "This mode records CUDA graphs, one for each shape; batches have many lengths."
        allowed = ("default", "max-autotune-no-cudagraphs")
        error = ConfigError(problem, where="torch_compile_mode", got=mode, allowed=allowed)
        yield ("torch_compile_mode",), error


def _data(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.val_size == 1 or (data.val_size > 1 and not data.val_size.is_integer()):
        allowed = "a fraction below 1, or a whole number above 1"
        error = ConfigError("val_size is no share of the rows.", got=data.val_size, allowed=allowed)
        yield ("val_size",), error
    if data.val_size > 0 and data.eval_dataset is not None and "val_size" in config.given:
        problem = "val_size and eval_dataset are both given."
        yield ("val_size", "eval_dataset"), ConfigError(problem, fix="drop one of the two")
    if data.mask_history and data.train_on_prompt:
        problem = "mask_history and train_on_prompt contradict each other."
        yield ("mask_history", "train_on_prompt"), ConfigError(problem, fix="drop one of the two")
    if data.streaming:
        yield from _streaming(config)
    if data.interleave_probs is not None:
        yield from _mixing(config)


def _streaming(config: RunConfig) -> Iterator[Problem]:
    data, train = config.data, config.train
    if train.do_train and train.max_steps <= 0:
        problem = "streaming needs max_steps: the length of a stream is not known."
        yield ("streaming", "max_steps"), ConfigError(problem, fix="add --max_steps 1000")
    wants_rows = train.do_train and (train.do_eval or train.do_predict)
    has_rows = data.val_size > 1 or data.eval_dataset is not None
    if 0 < data.val_size < 1 or (wants_rows and not has_rows):
        problem = "With streaming, evaluation needs val_size as a count, or eval_dataset."
        names = ("streaming", "val_size", "eval_dataset")
        yield names, ConfigError(problem, got=f"val_size {data.val_size:g}", fix="--val_size 100")
    without_effect = {
        "mix_strategy": data.mix_strategy != "concat",
        "tokenized_path": data.tokenized_path is not None,
        "eval_on_each_dataset": data.eval_on_each_dataset,
        "disable_shuffling": config.finetuning.disable_shuffling,
    }
    for name, is_on in without_effect.items():
        if is_on:
            problem = f"{name} has no effect on a stream."
            yield ("streaming", name), ConfigError(problem, fix="leave out one of the two")


def _mixing(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    shares = data.interleave_probs or ()
    names = ("interleave_probs", "mix_strategy", "dataset")
    if data.mix_strategy == "concat":
        problem = "interleave_probs has no meaning with mix_strategy concat."
        yield (
            names,
            ConfigError(problem, fix="set mix_strategy interleave_under or interleave_over"),
        )
    if data.dataset is not None and len(shares) != len(data.dataset):
        problem = "interleave_probs needs one share for each data set."
        yield names, ConfigError(problem, got=shares, allowed=f"{len(data.dataset)} numbers")
    elif min(shares, default=0) <= 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        problem = "interleave_probs must be above 0 and add up to 1."
        yield names, ConfigError(problem, got=shares)


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    train = config.train
    needs_it = {
        "load_best_model_at_end": train.load_best_model_at_end,
        "early_stopping_steps": config.finetuning.early_stopping_steps is not None,
        f"lr_scheduler_type {train.lr_scheduler_type}": train.lr_scheduler_type
        in ("reduce_lr_on_plateau", "greedy"),
        "save_strategy best": train.save_strategy == "best",
    }
    if train.do_train and train.eval_strategy == "no":
        for what, is_on in needs_it.items():
            if is_on:
                problem = f"{what} needs evaluation while training."
                fix = "set eval_strategy steps or epoch"
                yield ("eval_strategy", what.split()[0]), ConfigError(problem, fix=fix)
    elif train.load_best_model_at_end and train.save_strategy not in ("best", train.eval_strategy):
        yield (
            ("eval_strategy", "save_strategy"),
            ConfigError(
                "load_best_model_at_end needs a checkpoint at each evaluation.",
                got=f"eval_strategy {train.eval_strategy}, save_strategy {train.save_strategy}",
                fix=f"set save_strategy {train.eval_strategy}",
            ),
        )
    elif train.load_best_model_at_end and train.save_strategy == "steps":
        yield from _saving_steps(config)
    yield from _whole_steps(config)


def _saving_steps(config: RunConfig) -> Iterator[Problem]:
    save, evaluate = config.train.save_steps, config.train.eval_steps or 0
    is_mixed = (save < 1) != (evaluate < 1)
    times = save / evaluate if evaluate else 0.0
    if evaluate and (is_mixed or not math.isclose(times, round(times), abs_tol=1e-6)):
        problem = "load_best_model_at_end needs save_steps to be a multiple of eval_steps."
        got = f"save_steps {save:g}, eval_steps {evaluate:g}"
        yield ("save_steps", "eval_steps"), ConfigError(problem, got=got)


def _whole_steps(config: RunConfig) -> Iterator[Problem]:
    train = config.train
    steps = {"logging_steps": train.logging_steps, "save_steps": train.save_steps}
    steps |= {"eval_steps": train.eval_steps or 1.0, "warmup_steps": train.warmup_steps}
    for name, value in steps.items():
        if value > 1 and not value.is_integer():
            allowed = "a whole number, or a fraction of all steps below 1"
            yield (name,), ConfigError(f"{name} is no number of steps.", got=value, allowed=allowed)
        if value == 0 and name != "warmup_steps":
            fix = f"{name.split('_')[0]}_strategy no turns it off"
            yield (name,), ConfigError(f"{name} must be above 0.", got=value, fix=fix)


def _missing(name: str, what: str) -> Problem:
    return (name,), ConfigError(f"{name} is missing.", fix=f"add --{name} with {what}")


def _no_dataset(config: RunConfig) -> Problem:
    info = f"{config.data.dataset_dir}/dataset_info.json"
    return _missing("dataset", f"a name from {info}, or a file")


def _rows(config: RunConfig) -> Iterator[Problem]:
    if config.data.dataset is None and config.data.eval_dataset is None:
        yield _no_dataset(config)


def _training_rows(config: RunConfig) -> Iterator[Problem]:
    if config.data.dataset is None and config.data.tokenized_path is None:
        yield _no_dataset(config)


def _selfcheck(config: RunConfig) -> Iterator[Problem]:
    batch = config.selfcheck.selfcheck_batch
    if batch % 2:
        problem = "selfcheck_batch must be even: two processes share it."
        yield ("selfcheck_batch",), ConfigError(problem, got=batch)
    if process_env().world_size > 1:
        problem = "selfcheck starts its processes itself."
        fix = "start it as `llmtuner selfcheck`, without deepspeed or torchrun"
        yield ("world_size",), ConfigError(problem, got=process_env().world_size, fix=fix)


def _real(path: str) -> str:
    """Return where a path leads; unlike pathlib's, it takes any text."""
    return os.path.realpath(os.path.expanduser(path.replace("\0", "")))


def _folder(name: str, path: str) -> Iterator[Problem]:
    """Refuse what is a file, and names that no folder can have."""
    fix = "name a folder"
    if any(ord(character) < 32 for character in path):
        yield (name,), ConfigError(f"{name} holds a control character.", got=path, fix=fix)
    elif os.path.isfile(path):
        yield (name,), ConfigError(f"{name} is a file.", got=path, fix=fix)
    elif max(len(part.encode(errors="replace")) for part in path.split("/")) > _LONGEST_NAME_BYTES:
        problem = f"{name} has a part of more than {_LONGEST_NAME_BYTES} bytes."
        yield (name,), ConfigError(problem, got=path, fix="choose a shorter name")


_Check = Callable[[RunConfig], Iterator[Problem]]
_CHECKS: Mapping[str, tuple[_Check, ...]] = {
    "train": (
        *(_model, _output_is_no_input, _quantization, _job, _precision, _compiling, _data),
        _evaluation,
    ),
    "plan": (_model, _quantization, _training_rows, _precision, _compiling, _data, _evaluation),
    "selfcheck": (_model, _quantization, _training_rows, _selfcheck, _data),
    "export": (_model, _export),
    "chat": (_model, _quantization),
    "eval": (_model, _quantization, _benchmark),
    "data audit": (_model, _rows),
    "data show": (_model, _rows),
    "data verify": (_model, _rows),
}
