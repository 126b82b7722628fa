"""SIGTERM ends a command as Ctrl-C does: what it was writing is tidied up first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmtuner.extras.env import process_env


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM meanwhile, so that `finally` and `with` do their work.

    Nothing is changed where somebody else already takes care of the signal, outside the main
    thread, where Python has no signals, or for one process of several: its launcher may end it
    while it waits for the others inside a library, where Python would never see the signal.
    """
    is_ours = (
        process_env().world_size == 1
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not is_ours:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # tidying up is not interrupted once more
    raise Terminated
