"""The page: everything is escaped, nothing is fetched, each token is there once."""

import re
from html.parser import HTMLParser

import pytest
from example_chats import chat, thought_chat
from tiny_tokenizers import byte_level

from llmtuner.data.page import render_page
from llmtuner.data.render import encode_conversations
from llmtuner.data.template import load_template
from llmtuner.data.token_view import token_view, visible

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
REPORT = {
    "totals": {"rows": 3, "share": 0.25, "is_clean": False, "limit": None},
    "datasets": {
        "first": {"rows": 2, "length_histogram": {"0–63": 1, "64–127": 4}},
        "second": {"rows": 1, "tokens": 7},
    },
    "findings": [
        {"kind": "duplicate_row", "places": ["a.jsonl:3", "a.jsonl:5"]},
        {"kind": "answer_cut", "count": 0, "places": []},
    ],
    "length_histogram": {"0–63": 0},
    "notes": ["one", 2],
}


class Page(HTMLParser):
    """The tags, attributes and text of a page; a tag that is not closed is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def views():
    tokenizer = byte_level()
    template = load_template("qwen3", tokenizer)
    rows = encode_conversations(
        [chat(EVIL, EVIL + "\n你好 👍🏽"), thought_chat()], template=template, tokenizer=tokenizer
    )
    return [view for row in rows for view in token_view(row, tokenizer)]


def test_data_cannot_become_markup(views) -> None:
    report = {EVIL: {EVIL: EVIL}, "findings": [{EVIL: [EVIL]}], "x_histogram": {EVIL: 1}}
    html = render_page(EVIL, report, views)
    page = Page(html)
    assert not {"script", "img", "iframe", "link"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert names <= {"lang", "charset", "name", "content", "http-equiv", "class", "title", "style"}
    assert page.text.count(EVIL) >= 5
    assert "http" not in re.sub("http-equiv", "", html)


def test_every_token_is_there_with_its_number_id_and_mask(views) -> None:
    page = Page(render_page("t", {}, views))
    hints = [value for tag, name, value in page.attributes if (tag, name) == ("b", "title")]
    cells = [cell for view in views for cell in view.cells]
    assert [[int(n) for n in hint.split("id ")[1].split()] for hint in hints] == [
        list(cell.ids) for cell in cells
    ]
    starts = [int(re.search(r"token (\d+)", hint)[1]) for hint in hints]
    assert starts == [cell.start for cell in cells]
    classes = [value for tag, name, value in page.attributes if (tag, name) == ("b", "class")]
    num_legend = 3
    trained = [value for value in classes[num_legend:] if "t" in value.split()]
    assert len(trained) == sum(cell.is_trained for cell in cells)
    for view in views:
        assert "".join(visible(cell.text) for cell in view.cells) in page.text


def test_a_report_becomes_tables_and_bars() -> None:
    html = render_page("审计", REPORT, [])
    page = Page(html)
    found = ["审计", "Totals · 总计", "Data sets · 数据集", "a.jsonl:5", "0.25", "false"]
    for words in found:
        assert words in page.text
    assert page.tags.count("table") == 3
    assert [v for tag, name, v in page.attributes if (tag, name) == ("i", "style")] == [
        "width:25.0%",
        "width:100.0%",
    ]
    assert "Samples" not in page.text
