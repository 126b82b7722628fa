"""Prove with your own settings that the batch layout changes neither loss nor gradient."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtuner.cli.options import parse_or_help
from llmtuner.extras.files import write_json
from llmtuner.extras.libraries import loading_libraries

if TYPE_CHECKING:
    from llmtuner.train.selfcheck import SelfcheckReport
    from llmtuner.train.selfcheck_compare import StepResult


def run(argv: Sequence[str]) -> int:
    """Run every layout, print the comparison, and fail if a layout differs."""
    config = parse_or_help("selfcheck", argv)
    if config is None:
        return 0
    with loading_libraries():  # only now: --help must not wait for torch
        from llmtuner.train.selfcheck import run_selfcheck

    report = run_selfcheck(config)
    _print_table(report)
    if config.selfcheck.selfcheck_report is not None:
        write_json(Path(config.selfcheck.selfcheck_report), report.to_dict())
    report.check()
    print(
        f"Every layout gives the same loss and gradient. "
        f"{len(report.results)} steps were compared in {report.seconds:.0f} s."
    )
    return 0


def _print_table(report: "SelfcheckReport") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ROUNDED)
    for heading in ("layout", "step", "loss", "+-", "gradient", "+-", "tensors", "verdict"):
        table.add_column(heading)
    last = ""
    for result in report.results:
        if last and result.layout != last:
            table.add_section()
        table.add_row(*_row(result, is_reference=result.layout == report.reference))
        last = result.layout
    for name in report.skipped:
        table.add_section()
        table.add_row(name, *[""] * 6, "skipped")
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in [f"{name} is skipped: {reason}." for name, reason in report.skipped.items()]:
        console.print(line, soft_wrap=True)
    for fault in report.faults():
        console.print(fault, soft_wrap=True)


def _row(result: "StepResult", *, is_reference: bool) -> list[str]:
    loss, norm = f"{result.loss:.6f}", f"{result.gradient_norm:.6f}"
    if is_reference:
        return [result.layout, str(result.step), loss, "", norm, "", "", "reference"]
    return [
        result.layout,
        str(result.step),
        loss,
        f"{result.loss_difference:.0e}",
        norm,
        f"{result.norm_difference:.0e}",
        f"{result.worst.difference:.0e}",
        "equal" if result.excess <= 1 else "DIFFERENT",
    ]
