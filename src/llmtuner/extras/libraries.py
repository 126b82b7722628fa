"""Slow libraries in less time: the garbage collector rests, and nothing comes along unasked."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast

_UNASKED = ("bitsandbytes",)
"""What comes along with peft wherever it is installed, and with it much of torch's compiler.

peft 0.21 imports it in `helpers.py` for `KappaTuneSelector`, which nothing here uses, and
without a model with quantised layers nothing else needs it. To be removed when peft imports it
where it is used.
"""


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Import torch, transformers and what is built on them within this block.

    Imports make hundreds of thousands of objects that live as long as the process. The collector
    would search all of them again and again, a quarter of the time, and later in every full
    collection of the run; so it rests, and then leaves them out for good. What is garbage by then
    stays, too: about 10 MB of memory, of which later objects would have used a part again.
    """
    if "torch" in sys.modules:  # loaded already: then what lives by now may be of an earlier run
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with absent(*_UNASKED):
            yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Let libraries seem not to be installed within this block, unless they are loaded already."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    hidden = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(hidden))  # Python's own sign for "do not look for it"
    try:
        yield
    finally:
        for name in hidden:
            if modules.get(name) is None:
                modules.pop(name, None)
