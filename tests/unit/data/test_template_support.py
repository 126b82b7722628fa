"""The page of supported templates is what the code does; needs the shared folder."""

import sys
from pathlib import Path

import pytest
from real_templates import SHARED, real_templates

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))
LINES = (ROOT / "docs/template_support.md").read_text(encoding="utf-8").splitlines()
FEW = {"GLM-4.6", "openai-gpt-oss-120b", "LFM2.5-Instruct", "qwen_chat_template"}

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="there is no folder `shared` with real templates"
)


def templates(*, few: bool) -> list[tuple[str, str]]:
    found = list(real_templates()) if SHARED.is_dir() else []
    return [one for one in found if (one[0].rpartition("/")[2] in FEW) == few]


def check(name: str, text: str) -> None:
    from template_support import judge, row

    assert row(name, judge(name, text)) in LINES, "run tools/template_support.py"


@pytest.mark.parametrize(("name", "text"), templates(few=True))
def test_the_page_tells_what_the_code_does(name: str, text: str) -> None:
    check(name, text)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), templates(few=False))
def test_the_whole_page_tells_what_the_code_does(name: str, text: str) -> None:
    check(name, text)


def test_every_template_is_on_the_page() -> None:
    shown = {line.split("|")[1].strip() for line in LINES if line.startswith("| ")}
    assert {name for name, _ in real_templates()} <= shown
