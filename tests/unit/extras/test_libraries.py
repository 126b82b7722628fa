"""Libraries load while the collector rests; one that is hidden is found again afterwards."""

import importlib.util
import subprocess
import sys

import pytest

from llmtuner.extras.libraries import absent, loading_libraries

UNUSED = "antigravity"  # a module that is always there and that nobody loads


def test_a_hidden_library_cannot_be_found_or_imported() -> None:
    with absent(UNUSED):
        assert importlib.util.find_spec(UNUSED) is None
        with pytest.raises(ImportError):
            importlib.import_module(UNUSED)
    assert importlib.util.find_spec(UNUSED) is not None
    assert UNUSED not in sys.modules


def test_a_loaded_library_cannot_be_hidden() -> None:
    with absent("json"):
        assert importlib.util.find_spec("json") is not None
    assert "json" in sys.modules


def test_a_library_is_found_again_after_an_error() -> None:
    with pytest.raises(KeyError), absent(UNUSED):
        raise KeyError
    assert importlib.util.find_spec(UNUSED) is not None


LOADING = """
import gc, sys
from llmtuner.extras.libraries import loading_libraries
with loading_libraries():
    print(gc.isenabled(), sys.modules.get("bitsandbytes", "") is None)
print(gc.isenabled(), "bitsandbytes" in sys.modules, gc.get_freeze_count() > 0)
"""


def test_the_collector_rests_while_libraries_load_and_leaves_them_out() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LOADING], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["False True", "True False True"]


def test_nothing_happens_where_libraries_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    hidden: list[bool] = []
    monkeypatch.setattr("gc.freeze", lambda: hidden.append(True))
    with loading_libraries():
        assert sys.modules.get("bitsandbytes", sys) is not None
    assert not hidden
