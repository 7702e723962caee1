"""One background thread that works a few items ahead of its consumer and ends with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_SECONDS = 0.1


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], *, depth: int
) -> Generator[Result, None, None]:
    """Yield function(item) in order, up to `depth` results ahead.

    An error of the function is raised at the place of its item. The thread ends when the iterator
    is exhausted, closed or collected.
    """
    ready: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    work = partial(_work, function, items, ready, stop)
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            result, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield cast(Result, result)
            del result
    finally:
        stop.set()
        thread.join()


def _work(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ready: queue.Queue[tuple[Result | None, BaseException | None]],
    stop: threading.Event,
) -> None:
    try:
        for item in items:
            _put(ready, (function(item), None), stop)
            if stop.is_set():
                return
        _put(ready, (None, StopIteration()), stop)
    except BaseException as error:
        _put(ready, (None, error), stop)


def _put(ready: queue.Queue[Any], entry: Any, stop: threading.Event) -> None:
    """Wait for room, but no longer than the consumer lives."""
    while not stop.is_set():
        try:
            return ready.put(entry, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
