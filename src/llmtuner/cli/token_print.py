"""A row in the terminal, token by token; in files and without colour, signs say the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from llmtuner.data.token_view import Cell, SampleView, TurnView, visible

_BETWEEN = "│"
_OPEN, _CLOSE = "⟦", "⟧"  # around what is trained, where there is no colour
_TRAINED = "black on green"
_WIDTH = 60


def print_row(
    report: Mapping[str, Any], views: Sequence[SampleView], *, console: Console | None = None
) -> None:
    """Print the samples of one row.

    Args:
        report: from `row_report`.
        views: the same samples, from `token_view`.
        console: where to print; None is standard output.
    """
    console = console or Console()
    has_colour = console.color_system is not None and not console.no_color
    lines = [_head(report, views)]
    if not views:
        lines.append(Text("Nothing of this row is trained: it is left out.", style="yellow"))
    for note in views[0].notes if views else ():
        lines.append(Text(f"Note: {note}.", style="yellow"))
    if views:
        lines.append(_legend(has_colour))
    for number, view in enumerate(views):
        if len(views) > 1:
            title = f"Sample {number + 1} of {len(views)}: {_counts(view)}"
            lines += [Text(), Text(title, style="bold")]
        lines += [Text(), _tokens(view.cells, has_colour), Text()]
        lines += [_turn(turn) for turn in view.turns]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _head(report: Mapping[str, Any], views: Sequence[SampleView]) -> Text:
    num_tokens = sum(len(view.ids) for view in views)
    parts = [report["source"]]
    parts += [f"template {report['template']}"] if report["template"] else []
    parts.append(f"{num_tokens} tokens, {report['num_supervised_tokens']} trained")
    return Text(" · ".join(parts), style="bold")


def _counts(view: SampleView) -> str:
    return f"{len(view.ids)} tokens, {view.num_trained} trained"


def _legend(has_colour: bool) -> Text:
    trained = ("trained", _TRAINED) if has_colour else f"{_OPEN}trained{_CLOSE}"
    return Text.assemble(trained, " ", "read", _BETWEEN, "only", ", ⏎ is a line break", style="dim")


def _tokens(cells: Sequence[Cell], has_colour: bool) -> Text:
    text = Text()
    was_trained = False
    for number, cell in enumerate(cells):
        if cell.is_trained != was_trained and not has_colour:
            text.append(_OPEN if cell.is_trained else _CLOSE)
        elif number and not text.plain.endswith("\n"):
            text.append(_BETWEEN, style="dim")
        text.append(visible(cell.text), style=_style(cell) if has_colour else "")
        was_trained = cell.is_trained
    if was_trained and not has_colour:
        text.append(_CLOSE)
    return text


def _style(cell: Cell) -> str:
    if cell.is_trained:
        return f"bold {_TRAINED}" if cell.is_special else _TRAINED
    return "magenta" if cell.is_special else ""


def _turn(turn: TurnView) -> Text:
    name = "Text" if turn.message is None else f"Message {turn.message}"
    prompt = _short(turn.prompt_text, from_end=True)
    after = f"after {turn.start} tokens {prompt} " if turn.start else ""
    cut = " (cut: its end is not learned)" if turn.is_cut else ""
    answer = _short(turn.trained_text)
    return Text(f"{name}: {after}learns {turn.end - turn.start} tokens {answer}{cut}")


def _short(text: str, *, from_end: bool = False) -> str:
    """Return a text on one line: its last characters, or its first and its last ones."""
    line = visible(text).replace("⏎\n", "⏎")
    if len(line) <= _WIDTH:
        return f"“{line}”"
    head = "" if from_end else line[: _WIDTH // 2]
    return f"“{head}…{line[len(head) - _WIDTH :]}”"
