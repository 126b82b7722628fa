"""A folder is a registry: names without imports, one import per lookup, the user's files first."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtuner.extras.errors import ConfigError
from llmtuner.extras.registry import Registry

PACKAGE = "registry_under_test"


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of an importable package with the entries alpha, beta and broken."""
    folder = tmp_path / "lib" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "alpha.py").write_text("ENTRY = 'built-in alpha'\n")
    (folder / "beta.py").write_text("other = 1\n_hidden = 2\n")
    (folder / "broken.py").write_text("raise RuntimeError('imported')\n")
    (folder / "_private.py").write_text("ENTRY = 'private'\n")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def make(folder: Path | None = None) -> Registry:
    return Registry("thing", PACKAGE, exports="ENTRY", folder=folder)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("builtin")
def test_names_are_sorted_without_private_ones() -> None:
    assert make().names() == ["alpha", "beta", "broken"]


@pytest.mark.usefixtures("builtin")
def test_names_are_known_without_importing_any_entry() -> None:
    make().names()
    assert not [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]


@pytest.mark.usefixtures("builtin")
def test_only_the_entry_that_is_asked_for_is_imported() -> None:
    assert make().get("alpha") == "built-in alpha"
    loaded = {name for name in sys.modules if name.startswith(f"{PACKAGE}.")}
    assert loaded == {f"{PACKAGE}.alpha"}


@pytest.mark.usefixtures("builtin")
def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        make().get("alfa")
    assert str(caught.value) == (
        "Unknown thing. Got: 'alfa'. Allowed: alpha, beta, broken. Fix: did you mean alpha?"
    )


@pytest.mark.usefixtures("builtin")
@pytest.mark.parametrize("name", ["zzzzzz", "", "_private", "alpha.ENTRY", "../alpha", "os"])
def test_what_is_no_entry_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="Unknown thing"):
        make().get(name)


@pytest.mark.usefixtures("builtin")
def test_an_entry_without_its_export_says_what_it_has() -> None:
    with pytest.raises(ConfigError) as caught:
        make().get("beta")
    assert str(caught.value) == "The thing 'beta' does not define 'ENTRY'. Got: ['other']."


@pytest.mark.usefixtures("builtin")
def test_the_users_entry_wins_over_the_built_in_one(own: Path) -> None:
    (own / "alpha.py").write_text("ENTRY = 'my alpha'\n")
    assert make(own).get("alpha") == "my alpha"
    assert make().get("alpha") == "built-in alpha"


@pytest.mark.usefixtures("builtin")
def test_the_users_entries_stand_among_the_names_once(own: Path) -> None:
    (own / "alpha.py").write_text("ENTRY = 1\n")
    (own / "gamma.py").write_text("ENTRY = 2\n")
    (own / "_helper.py").write_text("")
    (own / "notes.txt").write_text("")
    registry = make(own)
    assert registry.names() == ["alpha", "beta", "broken", "gamma"]
    assert registry.get("gamma") == 2


@pytest.mark.usefixtures("builtin")
def test_built_in_entries_stay_reachable_beside_the_users(own: Path) -> None:
    (own / "gamma.py").write_text("ENTRY = 2\n")
    assert make(own).get("alpha") == "built-in alpha"


@pytest.mark.usefixtures("builtin")
def test_a_folder_that_does_not_exist_adds_nothing(tmp_path: Path) -> None:
    assert make(tmp_path / "nowhere").names() == ["alpha", "beta", "broken"]


@pytest.mark.usefixtures("builtin")
def test_the_users_file_is_read_anew_by_every_lookup(own: Path) -> None:
    path = own / "gamma.py"
    path.write_text("ENTRY = 'old'\n")
    assert make(own).get("gamma") == "old"
    path.write_text("ENTRY = 'newer'\n")
    assert make(own).get("gamma") == "newer"


@pytest.mark.usefixtures("builtin")
def test_a_users_file_that_cannot_be_run_hurts_only_its_own_lookup(own: Path) -> None:
    (own / "gamma.py").write_text("this is no Python\n")
    registry = make(own)
    assert "gamma" in registry.names()
    assert registry.get("alpha") == "built-in alpha"
    with pytest.raises(SyntaxError, match=r"gamma\.py"):
        registry.get("gamma")


@pytest.mark.usefixtures("builtin")
def test_a_users_package_is_an_entry_or_no_name(own: Path) -> None:
    (own / "delta").mkdir()
    (own / "delta" / "__init__.py").write_text("ENTRY = 'my delta'\n")
    registry = make(own)
    assert "delta" not in registry.names() or registry.get("delta") == "my delta"


def test_summaries_are_known_without_importing_any_entry(builtin: Path, own: Path) -> None:
    (builtin / "alpha.py").write_text('"""First line.\n\nMore.\n"""\n')
    (builtin / "gamma").mkdir()
    (builtin / "gamma/__init__.py").write_text('"""A folder."""\n')
    (own / "alpha.py").write_text('"""The user\'s own."""\n')
    expected = {"alpha": "First line.", "beta": "", "broken": "", "gamma": "A folder."}
    assert make().summaries() == expected
    assert make(own).summaries() == {**expected, "alpha": "The user's own."}
    assert not [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]
