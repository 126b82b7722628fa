"""Huge pages are asked for once, and only where the system gives them on request."""

import os
from pathlib import Path

import pytest

from llmtuner.extras import env
from llmtuner.extras.env import ask_for_huge_pages


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "enabled"
    monkeypatch.setattr(env, "_HUGE_PAGES", path)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
    ],
)
def test_the_users_tunables_stay(
    setting: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    setting.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", before)
    assert ask_for_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == after
    assert not ask_for_huge_pages(), "a program must not start itself for ever"


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_nothing_changes_where_they_are_not_given_on_request(
    setting: Path, text: str | None
) -> None:
    if text is not None:
        setting.write_text(text)
    assert not ask_for_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == ""


def test_what_the_user_chose_wins(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.write_text("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert not ask_for_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"
