"""Work on many shards in several processes, or in this one where there is little to do."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from megatron_dlm.data.commands.reading_progress import reading_progress
from megatron_dlm.runtime.errors import is_users
from megatron_dlm.runtime.processes import end_with_parent, num_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Says that so many more bytes were read."""

# A process takes a third of a second to start: less than this per process is not worth it.
_BYTES_PER_WORKER = 64 << 20


def map_shards(
    function: Callable[[Item, Advance], Result],
    items: Sequence[Item],
    *,
    sizes_bytes: Sequence[int],
    workers: int,
    label: str,
) -> Iterator[Result]:
    """Yield function(item, advance) in order, the items shared among processes.

    `function` must be importable by name; `sizes_bytes` is what each item reads, for the progress
    that is shown on stderr; `workers` 0 stands for one per core. An error of one item ends all.
    """
    wanted = workers or num_cores()
    useful = min(len(items), -(-sum(sizes_bytes) // _BYTES_PER_WORKER))
    with reading_progress(label, sum(sizes_bytes)) as advance:
        if min(wanted, useful) <= 1:
            for item in items:
                yield function(item, advance)
            return
        results = _in_processes(function, items, min(wanted, useful))
        for result, size_bytes in zip(results, sizes_bytes, strict=True):
            advance(size_bytes)
            yield result


def _in_processes(
    function: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # forking a process with threads is unsafe
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_end_at_once, initargs=(theirs,)
    )
    try:
        for future in [pool.submit(_call, function, item) for item in items]:
            result, error = future.result()
            if error is not None:
                raise error
            yield result
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, perhaps for want of memory; try fewer workers"
        ) from None
    except KeyboardInterrupt:
        ours.close()  # ends the workers; after an error they finish the items that they are at
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _call(function: Callable[..., Any], item: Any) -> tuple[Any, Exception | None]:
    """The user's errors travel as values: raised again here they keep their one line."""
    try:
        return function(item, _ignore), None
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        return None, error


def _ignore(size_bytes: int) -> None:
    """A worker reports whole items only."""


def _end_at_once(channel: Connection) -> None:
    """This worker lives no longer than its parent, or than the other end of the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends us
    end_with_parent([channel])
