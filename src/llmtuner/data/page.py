"""One self-contained HTML page: what an audit counted and found, and samples token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from llmtuner.data.token_view import Cell, SampleView, visible

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_HEADINGS: Mapping[str, str] = {
    "totals": "Totals · 总计",
    "total": "Totals · 总计",
    "datasets": "Data sets · 数据集",
    "findings": "Findings · 发现的问题",
    "lengths": "Lengths · 长度分布",
    "length_histogram": "Lengths in tokens · 长度分布（词元）",
    "settings": "Settings · 设置",
    "row": "Row · 数据行",
    "source": "place · 位置",
    "template": "template · 模板",
    "num_supervised_tokens": "trained tokens · 训练词元",
    "is_prompt_cut": "prompt cut · 提示被截断",
    "is_answer_cut": "answer cut · 回答被截断",
    "num_turns_dropped": "trained turns dropped · 丢弃的训练轮次",
    "rows": "rows · 行",
    "samples": "samples · 样本",
    "turns": "turns · 轮次",
    "tokens": "tokens · 词元",
    "supervised_tokens": "trained tokens · 训练词元",
    "rows_left_out": "rows left out · 未用的行",
    "rows_cut": "rows cut · 截断的行",
    "bad_rows": "bad rows · 坏行",
    "refused_rows": "refused · 拒绝的行",
    "supervised_share": "share trained · 训练占比",
    "longest_tokens": "longest · 最长",
    "used_for": "used for · 用途",
    "unreadable": "unreadable · 无法读取",
    "dataset": "data set · 数据集",
    "defect": "defect · 问题",
    "severity": "severity · 严重程度",
    "kind": "kind · 类别",
    "count": "count · 数量",
    "share": "share · 占比",
    "limit": "limit · 上限",
    "limits": "Limits · 上限",
    "exceeded": "Above the limits · 超出上限",
    "meaning": "meaning · 含义",
    "places": "places · 位置",
    "examples": "examples · 示例",
}


@dataclass(frozen=True)
class _Block:
    """A part of a report in the form that the page shows: a table, bars, a list, or a text."""

    kind: Literal["table", "bars", "items", "text"]
    text: str = ""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    bars: Sequence[tuple[str, float, float]] = ()
    items: Sequence[Any] = ()


def render_page(title: str, report: Mapping[str, Any], views: Sequence[SampleView]) -> str:
    """Return the page as HTML text, without scripts and without anything to be fetched.

    Args:
        title: heading of the page.
        report: JSON values by name; each becomes a section, in the order given. Objects become
            tables, lists of objects too, and an object of counts whose name ends in `histogram`
            becomes bars. Names in `_HEADINGS` get a heading in two languages.
        views: samples to show token by token, from `token_view`.
    """
    template = ImmutableSandboxedEnvironment(
        autoescape=True, undefined=jinja2.StrictUndefined
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    sections = [(_heading(name), _block(value, name)) for name, value in report.items()]
    return template.render(
        title=title, sections=sections, views=views, marks=_marks, hint=_hint, visible=visible
    )


def _heading(name: str) -> str:
    return _HEADINGS.get(name, name.replace("_", " "))


def _block(value: Any, name: str = "") -> _Block:
    """Return how a JSON value is shown."""
    if isinstance(value, Mapping) and _is_histogram(value, name):
        return _bars(value)
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Mapping) for item in value.values()):
            return _table([{"": key, **item} for key, item in value.items()])
        rows = [(_heading(str(key)), _cell(item, str(key))) for key, item in value.items()]
        return _Block("table", rows=rows)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) for item in value):
            return _table(value)
        return _Block("items", items=[_block(item) for item in value])
    return _Block("text", text=_text(value))


def _table(records: Sequence[Mapping[str, Any]]) -> _Block:
    columns = list(dict.fromkeys(str(key) for record in records for key in record))
    rows = [[_cell(record.get(name), name) for name in columns] for record in records]
    return _Block("table", headings=[_heading(name) for name in columns], rows=rows)


def _is_histogram(value: Mapping[str, Any], name: str) -> bool:
    counts = [isinstance(count, int | float) for count in value.values()]
    return name.endswith(("histogram", "lengths")) and bool(counts) and all(counts)


def _bars(counts: Mapping[str, float]) -> _Block:
    most = max(counts.values()) or 1
    bars = [(str(label), count, round(100 * count / most, 2)) for label, count in counts.items()]
    return _Block("bars", bars=bars)


def _cell(value: Any, name: str) -> Any:
    """Return a number or text as it is, anything else as a block."""
    if isinstance(value, Mapping | list | tuple):
        return _block(value, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else visible(str(value))


def _marks(cell: Cell) -> Markup:
    names = [name for name, is_on in (("t", cell.is_trained), ("s", cell.is_special)) if is_on]
    return Markup(' class="{}"').format(" ".join(names)) if names else Markup("")


def _hint(cell: Cell) -> str:
    last = cell.start + len(cell.ids) - 1
    numbers = str(cell.start) if last == cell.start else f"{cell.start}–{last}"
    return f"token {numbers} · id {' '.join(map(str, cell.ids))}"
