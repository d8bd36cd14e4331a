"""Work spread over forked processes: results as they finish, progress on the way, and no way to wait for ever."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

# Does item i; calls its second argument with progress from time to time.
Work = Callable[[int, Callable[[Any], None]], Any]
PARENT_CHECK_SECONDS = 0.5


def run_work(
    work: Work,
    items: Sequence[int],
    workers: int,
    report: Callable[[int, Any], None],
    worn: Callable[[], bool] = lambda: False,
) -> Generator[tuple[int, Any], None, None]:
    """Do the items with up to ``workers`` processes (this one when there is one item) and yield (item, result).

    Results come as they finish. ``report(item, progress)`` is called in between. A worker in which ``worn()`` is true
    after an item ends, and another one is forked in its place. ValueError and OSError of the work are raised here; a
    worker that dies raises ``RuntimeError``. Closing the generator ends all workers at once.
    """
    if len(items) <= 1:
        for item in items:
            yield item, work(item, lambda progress, item=item: report(item, progress))  # type: ignore[misc]
        return
    queue = deque(items)
    running: dict[Connection, Any] = {}
    gc.collect()
    gc.freeze()  # else the first collection of each worker writes to, and so copies, all that they share
    try:
        for _ in range(min(workers, len(items))):
            start_worker(work, worn, queue.popleft(), running)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                kind, item, value = receive(connection)
                if kind == "progress":
                    report(item, value)
                    continue
                if kind == "error":
                    raise value
                if queue and kind == "done":
                    connection.send(queue.popleft())
                else:
                    connection.close()  # a worker that waits for more sees the end
                    running.pop(connection).join()
                    if queue:
                        start_worker(work, worn, queue.popleft(), running)
                yield item, value
    finally:
        gc.unfreeze()
        for process in running.values():
            process.kill()
        for process in running.values():
            process.join()


def start_worker(work: Work, worn: Callable[[], bool], item: int, running: dict[Connection, Any]) -> None:
    """Fork a worker, give it its first item and add it to those that run.

    Forked workers share what is loaded; nothing in this process has started threads that they would miss.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    others = [*running, ours]
    process = context.Process(target=serve, args=(theirs, others, work, worn, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # else its end would never be seen
    running[ours] = process
    ours.send(item)


class Aside:
    """One call in a process of its own, begun now and asked for later. Leaving the context ends it.

    A ValueError or OSError of the call is raised by ``result``; a process that dies is a ``RuntimeError``.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe(duplex=False)

        def work() -> None:
            leave_signals()
            try:
                theirs.send((function(), None))
            except (ValueError, OSError) as error:
                theirs.send((None, error))

        self._process = context.Process(target=work, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._ours.close()

    @functools.cached_property
    def result(self) -> Any:
        """What the call returned; waits for it."""
        value, error = receive(self._ours)
        if error is not None:
            raise error
        return value


def receive(connection: Connection) -> Any:
    """The next message of a process."""
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError("a worker process died (out of memory?); use fewer --workers") from error


def leave_signals() -> None:
    """In a process of ours: the main process decides what an interrupt means, and ends us with a signal that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def serve(
    connection: Connection, others: Sequence[Connection], work: Work, worn: Callable[[], bool], parent: int
) -> None:
    """The life of a worker process: take an item, do it, send its result; end when the main process is gone."""
    for other in others:
        other.close()  # ends of the main process, which would seem alive as long as they are open here
    leave_signals()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with suppress(EOFError, OSError):  # the main process is gone
        while True:
            item = connection.recv()
            try:
                value = work(item, lambda progress, item=item: connection.send(("progress", item, progress)))  # type: ignore[misc]
            except (ValueError, OSError) as error:
                connection.send(("error", item, error))
                return
            last = worn()
            connection.send(("last" if last else "done", item, value))
            if last:
                return
