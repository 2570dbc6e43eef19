"""Parts of a benchmark, each in a process of its own that ends when its time is up.

What a part finds is handed on at once, so nothing is lost when it is cut off, runs out of memory or crashes; and
its memory, that of the device too, is free for the next.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import torch

from fomo.errors import UserError, one_line

ENDED = "ended"  # the key under which it is said that a part did not come to its end
Found = tuple[str, object]


class Report:
    """In a part's process: hands on what was found, and knows how much of the part's time is gone."""

    def __init__(self, connection: Connection, seconds: float):
        self.connection, self.seconds, self.began = connection, seconds, time.monotonic()

    def __call__(self, key: str, value: object) -> None:
        self.connection.send((key, value))

    def used(self) -> float:
        """Share of the time, 0 to 1."""
        return (time.monotonic() - self.began) / self.seconds


def in_process(part: Callable[..., None], seconds: float, *arguments: object) -> Iterator[Found]:
    """What `part(report, *arguments)` reports, as it comes; at last why it ended, if not by itself.

    The system ends the process after `seconds`, whatever it is doing.
    """
    context = way_to_start()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=enter, args=(there, seconds, part, arguments))
    began = time.monotonic()
    process.start()
    there.close()
    try:
        yield from received(here, process)
        process.join(5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its worker processes
        process.join()
    if process.exitcode == -signal.SIGALRM:
        yield ENDED, f"cut off after its share of {time.monotonic() - began:.0f} s"
    elif process.exitcode < 0:
        yield ENDED, f"failed: killed by signal {-process.exitcode}"


def received(connection: Connection, process: BaseProcess) -> Iterator[Found]:
    """Until the process is gone; worker processes that it leaves behind may hold its pipe open."""
    while True:
        alive = process.is_alive()
        if connection.poll(0.1):
            try:
                yield connection.recv()
            except EOFError:
                return
        elif not alive:
            return


def enter(connection: Connection, seconds: float, part: Callable[..., None], arguments: tuple) -> None:
    """In the part's process."""
    os.setsid()
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of data workers: a spawned process would spawn its own
    for signum in (signal.SIGALRM, signal.SIGTERM):  # not as the process that started this one handles them
        signal.signal(signum, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    report = Report(connection, seconds)
    try:
        part(report, *arguments)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        report(ENDED, f"failed: {type(error).__name__}: {one_line(error)}")
    sys.stderr.flush()


@cache
def way_to_start() -> BaseContext:
    """Forked processes have the imports of this one, but cannot use CUDA if one of those has asked for devices."""
    pid = os.fork()
    if not pid:
        os._exit(torch.cuda._is_in_bad_fork())
    _, status = os.waitpid(pid, 0)
    return multiprocessing.get_context("spawn" if status else "fork")
