"""Work spread over forked processes: results as they finish, progress on the way, and no way to wait for ever."""

from __future__ import annotations

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
    work: Work, items: Sequence[int], workers: int, report: Callable[[int, Any], None]
) -> Generator[tuple[int, Any], None, None]:
    """Do the items with up to ``workers`` processes (this one when one is enough) and yield (item, result).

    Results come as they finish. ``report(item, progress)`` is called in between. ValueError and OSError of the work
    are raised here; a worker that dies raises ``RuntimeError``. Closing the generator ends all workers at once.
    """
    if min(workers, len(items)) <= 1:
        for item in items:
            yield item, work(item, lambda progress, item=item: report(item, progress))  # type: ignore[misc]
        return
    queue = deque(items)
    # Forked workers share what is loaded; nothing in this process has started threads that they would miss.
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []
    try:
        connections: list[Connection] = []
        for _ in range(min(workers, len(items))):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, work, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # else its end would never be seen
            processes.append(process)
            connections.append(ours)
            ours.send(queue.popleft())
        while connections:
            for connection in wait(connections):
                assert isinstance(connection, Connection)
                kind, item, value = receive(connection)
                if kind == "progress":
                    report(item, value)
                    continue
                if kind == "error":
                    raise value
                if queue:
                    connection.send(queue.popleft())
                else:
                    connections.remove(connection)
                yield item, value
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def receive(connection: Connection) -> tuple[str, int, Any]:
    """The next message of a worker."""
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError("a worker process died (out of memory?); use fewer --workers") from error


def serve(connection: Connection, work: Work, parent: int) -> None:
    """The life of a worker process: take an item, do it, send its result; end when the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

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
            connection.send(("done", item, value))
