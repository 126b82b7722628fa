"""Show the answers of two models side by side: before and after tuning."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmtuner.hparams.data import DataArgs
from llmtuner.hparams.generating import GeneratingArgs
from llmtuner.hparams.model import ModelArgs


def run(argv: Sequence[str]) -> int:
    """Ask both models the same questions, greedily, and print a table."""
    parser = ArgumentParser(prog="llmtuner compare", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="model before tuning")
    parser.add_argument("--tuned_model", required=True, help="model after tuning, or its adapter")
    parser.add_argument("--prompts", nargs="+", required=True, help="questions to ask")
    parser.add_argument("--template", help="chat template; unset: each model's own")
    parser.add_argument("--max_new_tokens", type=int, default=80, help="longest answer (80)")
    args = parser.parse_args(argv)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    before = ModelArgs(model_name_or_path=args.model_name_or_path)
    if (Path(args.tuned_model) / "adapter_config.json").is_file():
        after = replace(before, adapter_name_or_path=(args.tuned_model,))
    else:
        after = ModelArgs(model_name_or_path=args.tuned_model)
    answers = [
        _answers(model, args.prompts, template=args.template, max_new_tokens=args.max_new_tokens)
        for model in (before, after)
    ]
    table = Table(box=box.ROUNDED, show_lines=True)
    for heading in ("question / 问题", "before / 训练前", "after / 训练后"):
        table.add_column(heading, overflow="fold")
    for row in zip(args.prompts, *answers, strict=True):
        table.add_row(*row)
    Console(markup=False).print(table)
    return 0


def _answers(
    model: ModelArgs, prompts: Sequence[str], *, template: str | None, max_new_tokens: int
) -> list[str]:
    from llmtuner.data.conversation import Message
    from llmtuner.inference.engine import load_engine

    generating = GeneratingArgs(do_sample=False, max_new_tokens=max_new_tokens)
    engine = load_engine(model, DataArgs(template=template), generating)
    return engine.answer([[Message("user", prompt)] for prompt in prompts])
