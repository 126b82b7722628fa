"""The text of `--help`: examples first, then the options by group."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from llmtuner.hparams.aliases import load_aliases
from llmtuner.hparams.options import COMMAND_GROUPS, GROUPS, OTHER_GROUP, Option, options_of

_WIDTH = 100
_NAME_WIDTH = 34
_GLUE = "\u00a0"

_SUMMARIES: Mapping[str, str] = {
    "train": "Train a model: pre-training (pt) or supervised fine-tuning (sft).",
    "selfcheck": "Prove with your own settings that the batch layout changes no gradient.",
    "plan": "Say what a training run will need, before anything is loaded.",
    "export": "Merge adapters into the base model and write it to a folder.",
    "chat": "Talk to a model in the terminal.",
    "eval": "Score a model on a multiple-choice benchmark.",
    "data audit": "Count what is trained, cut and left out, and find defects with their places.",
    "data show": "Show one row token by token: what the model reads and what it learns.",
    "data verify": "Prove over all rows that what is trained is what is served.",
}
_EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "train": (
        "llmtuner train sft.yaml --learning_rate 2e-5",
        "llmtuner train --stage sft --do_train --model_name_or_path Qwen/Qwen3-1.7B "
        "--dataset identity,data/my.jsonl --lora_rank 16 --output_dir output/sft --plot_loss",
        "llmtuner train --do_train --model_name_or_path Qwen/Qwen3-1.7B --quantization_bit 4 "
        "--dataset identity --val_size 0.1 --eval_strategy steps --output_dir output/qlora",
        "deepspeed --num_gpus 2 src/train_bash.py --deepspeed deepspeed_config.json --stage pt "
        "--do_train --finetuning_type full --model_name_or_path … --dataset … --output_dir …",
    ),
    "selfcheck": (
        "llmtuner selfcheck sft.yaml",
        "llmtuner selfcheck sft.yaml --cutoff_len 256 --selfcheck_report check.json",
        "llmtuner selfcheck --model_name_or_path models/base --finetuning_type full "
        "--dataset identity --selfcheck_steps 3",
    ),
    "plan": (
        "llmtuner plan sft.yaml",
        "llmtuner plan sft.yaml --probe --json",
        "llmtuner plan --model_name_or_path Qwen/Qwen3-1.7B --dataset data/my.jsonl "
        "--finetuning_type full --per_device_train_batch_size 4 --cutoff_len 4096",
    ),
    "export": (
        "llmtuner export --model_name_or_path Qwen/Qwen3-1.7B --adapter_name_or_path output/sft "
        "--export_dir models/merged",
        "llmtuner export merge.yaml --export_size 2 --verify",
    ),
    "chat": (
        "llmtuner chat --model_name_or_path models/merged",
        "llmtuner chat --model_name_or_path Qwen/Qwen3-1.7B --adapter_name_or_path output/sft "
        "--temperature 0.3",
    ),
    "eval": (
        "llmtuner eval --model_name_or_path models/merged --task medical",
        "llmtuner eval --model_name_or_path models/merged --task ceval --split validation "
        "--lang zh --n_shot 5 --subjects physician,clinical_medicine --save_dir output/ceval",
        "llmtuner eval --model_name_or_path models/base --adapter_name_or_path output/sft "
        "--task mmlu_test --task_dir mmlu.zip --compare output/mmlu_base/results.json",
    ),
    "data audit": (
        "llmtuner data audit sft.yaml --report_dir output/audit",
        "llmtuner data audit --model_name_or_path Qwen/Qwen3-1.7B --dataset data/my.jsonl "
        "--audit_limits duplicate_row=0.01,answer_cut=0",
    ),
    "data show": (
        "llmtuner data show --model_name_or_path Qwen/Qwen3-1.7B --dataset identity --row 3",
        "llmtuner data show sft.yaml --row 0 --json",
    ),
    "data verify": (
        "llmtuner data verify sft.yaml",
        "llmtuner data verify --model_name_or_path output/sft --dataset data/my.jsonl",
    ),
}
_TITLES: Mapping[str, str] = {
    "model": "Model",
    "data": "Data",
    "audit": "Audit",
    "showing": "Showing",
    "finetuning": "Fine-tuning",
    "lora": "LoRA and QLoRA (finetuning_type lora)",
    "freeze": "Freeze (finetuning_type freeze)",
    "train": "Training",
    "swanlab": "SwanLab",
    "generating": "Generating",
    "export": "Export",
    "verifying": "Verify",
    "evaluating": "Benchmark",
    "selfcheck": "Selfcheck",
    "planning": "Planning",
}
_ORDERS: Mapping[str, tuple[str, ...]] = {
    "export": ("export", "verifying"),
    "chat": ("generating",),
    "selfcheck": ("selfcheck",),
    "plan": ("planning", "showing"),
    "eval": ("evaluating",),
    "data audit": ("showing", "audit", "data", "model"),
    "data show": ("showing", "data", "model"),
    "data verify": ("data", "model"),
}
"""Command -> groups that come first; the others follow in their usual order."""


def help_text(command: str, all: bool = False) -> str:
    """Return the help of a command.

    Args:
        command: a key of `COMMAND_GROUPS`.
        all: with one line for each of the less usual trainer arguments, instead of their names.
    """
    options = options_of(command)
    first = _ORDERS.get(command, ())
    groups = [*first, *(group for group in COMMAND_GROUPS[command] if group not in first)]
    parts = [_head(command)]
    for group in groups:
        members = [option for option in options.values() if option.group == group]
        if members and group != OTHER_GROUP and _belongs(command, group):
            parts.append(_section(_TITLES[group], GROUPS[group].__doc__ or "", members))
    tail = [
        option
        for option in options.values()
        if option.group == OTHER_GROUP and option.name not in load_aliases().names()
    ]
    if tail and not command.startswith("data "):
        parts.append(_tail(tail, all=all))
    return "\n".join(parts)


def _belongs(command: str, group: str) -> bool:
    """Leave out groups that a command only takes because LLaMA-Factory's does."""
    unused: Mapping[str, tuple[str, ...]] = {
        "train": ("export",),
        "selfcheck": ("export", "generating", "swanlab", "audit"),
        "plan": ("export", "generating", "swanlab", "audit"),
        "export": ("generating", "freeze"),
        "chat": ("export", "freeze"),
        "eval": ("export", "freeze"),
    }
    if command.startswith("data "):
        return group in (*_ORDERS[command], "finetuning")
    return group not in unused[command]


def _head(command: str) -> str:
    lines = [
        f"Usage: llmtuner {command} [config.yaml | config.json] [--name value] [name=value] …",
        "",
        _SUMMARIES[command],
        "",
        "Examples:",
    ]
    for example in _EXAMPLES[command]:
        lines += textwrap.wrap(
            example,
            _columns(),
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    lines += [
        "",
        "The file is read first; what stands further right on the command line wins.",
        "A switch is turned on by --name or --name true, and off by --no_name or --name false.",
        "",
    ]
    return "\n".join(lines)


def _section(title: str, summary: str, options: Iterable[Option]) -> str:
    lines = [f"{title}: {summary.splitlines()[0]}"]
    for option in options:
        lines += _entry(option)
    return "\n".join([*lines, ""])


def _entry(option: Option) -> list[str]:
    left = f"  --{option.name}"
    body = f"{option.help} {_facts(option)}".strip()
    indent = " " * _NAME_WIDTH
    wrapped = textwrap.wrap(
        body,
        _columns(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    if not wrapped:
        return [left]
    wrapped = [line.replace(_GLUE, " ") for line in wrapped]
    if len(left) < _NAME_WIDTH - 1:
        wrapped[0] = left.ljust(_NAME_WIDTH) + wrapped[0][_NAME_WIDTH:]
        return wrapped
    return [left, *wrapped]


def _facts(option: Option) -> str:
    kind = option.kind
    facts = []
    if kind.choices and len(kind.choices) <= 12:
        names = "|".join(str(choice) for choice in kind.choices)
        facts.append(names if len(names) < 50 else names.replace("|", ", "))
    if option.unit:
        facts.append(option.unit)
    if option.default is not None:
        facts.append(f"default {_shown(option.default)}")
    text = f"[{'; '.join(facts)}]" if facts else ""
    # Short facts stay on one line: the space that does not break becomes a plain one at the end.
    return text.replace(" ", _GLUE) if len(text) < 40 else text


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value) or "none"
    return '""' if value == "" else str(value)


def _tail(options: Iterable[Option], *, all: bool) -> str:
    title = (
        "More arguments of transformers' Seq2SeqTrainingArguments, described in its documentation:"
    )
    if all:
        lines = [line for option in options for line in _entry(option)]
    else:
        names = " ".join(f"--{option.name}" for option in options)
        lines = textwrap.wrap(
            names,
            _columns(),
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join([title, *lines])


def _columns() -> int:
    return max(60, min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns))
