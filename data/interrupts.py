"""Ctrl-C that waits until the work on one sample is done.

A decoder written in C calls back into Python, and an exception raised there is lost: libsndfile would take an interrupt
for the end of the file, and a good clip for one that is cut short. So whoever decodes in the main process holds
interrupts back meanwhile. Worker processes, which a terminal's Ctrl-C reaches too, are deaf to it: their parent ends
them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; a second one takes effect at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, asked = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt
        asked = True

    if before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt


def deaf_workers(preload: str) -> ForkServerContext:
    """What starts worker processes that do not hear Ctrl-C, from their first line on; `preload` is a module they need.

    Forking a process that has threads can deadlock, so they are forked from a server, which would print a traceback
    where it were interrupted while it imports. There is one server: one that runs already stays as it is.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", preload])
    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the server inherits, and its children
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    return context
