"""An audit in the terminal: what was counted, and what was found where."""

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtuner.data.audit.defects import DEFECTS, Severity
from llmtuner.data.audit.findings import SetAudit, joined
from llmtuner.data.audit.report import Audit

_NUM_PLACES = 3
_WIDTH = 120
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_audit(audit: Audit, *, console: Console | None = None) -> None:
    """Print the counts of each data set, and a table of findings.

    Args:
        audit: of all data sets.
        console: where to print; None is standard output.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)  # nobody looks at the edge of a file
    console.print(_counts(audit))
    sets = {name: one for name, one in audit.sets.items() if one.findings}
    for name, one in sets.items():
        console.print(_findings(name, one))
        for line in _places(one):
            console.print(
                line, soft_wrap=True
            )  # a place must stay whole, to be searched and clicked
    if not sets:
        console.print("Nothing found.", style="green")
    for excess in audit.excess():
        console.print(Text(f"Above its limit: {excess}", style="bold red"))


def _counts(audit: Audit) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("data set", overflow="fold")
    headings = ("rows", "refused", "turns", "samples", "tokens", "trained", "share", "longest")
    for heading in headings:
        table.add_column(heading, justify="right")
    sets = dict(audit.sets)
    if len(sets) > 1:
        sets["total"] = joined(audit.sets.values())
    for name, one in sets.items():
        numbers = (one.rows, one.refused_rows, one.turns, one.samples, one.tokens)
        share = f"{one.supervised_tokens / max(one.tokens, 1):.1%}"
        shown = [*map(str, (*numbers, one.supervised_tokens)), share, str(one.longest_tokens)]
        table.add_row(Text(Path(name).name), *shown)
    return table


def _findings(name: str, audit: SetAudit) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(name, style="bold"), title_justify="left")
    table.add_column("defect")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("meaning", overflow="fold")
    for defect in (defect for defect in DEFECTS if defect in audit.findings):
        entry = DEFECTS[defect]
        label = Text(f"{entry.severity} {defect}", style=_STYLES[entry.severity])
        share = f"{audit.share(defect):.2%}"
        table.add_row(label, str(audit.findings[defect].rows), share, Text(entry.meaning))
    return table


def _places(audit: SetAudit) -> Iterator[Text]:
    """Yield a line for each of the first places of each finding."""
    for defect in (defect for defect in DEFECTS if defect in audit.findings):
        found = audit.findings[defect]
        for place in found.places[:_NUM_PLACES]:
            yield Text.assemble(
                "  ", (defect, _STYLES[DEFECTS[defect].severity]), f" {_place(place)}"
            )
        if found.rows > _NUM_PLACES:
            yield Text(f"  {defect} … and {found.rows - _NUM_PLACES} more rows", style="dim")


def _place(place: dict[str, object]) -> str:
    turn = f" turn {place['turn']}" if place["turn"] else ""
    note = f": {place['note']}" if place["note"] else ""
    return f"{place['where']}{turn}{note}"
