"""Writes the files of one rank: in this process, or in one process that dies with it.

Megatron Core forks a process for each file and has them meet at semaphores. When one of them is
killed there, with its rank or for want of memory, the others wait for ever; so here the files of a
rank are written by threads of one process.
"""

from __future__ import annotations

import gc
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_dlm.checkpoint.writer_report import WriterReport
from megatron_dlm.runtime.processes import end_with_parent, forks_die_with_us


def write_now(request: AsyncRequest) -> None:
    """Write the files of a save and finish it on all ranks. Collective."""
    if request.async_fn is not None:  # this rank has something to write
        request = request._replace(async_fn=_Writing(request.async_fn.args[0]))
    request.execute_sync()


def write_beside(request: AsyncRequest, calls: AsyncCallsQueue) -> None:
    """Write them in a process of their own, while training goes on. Collective."""
    if request.async_fn is not None:
        request = request._replace(async_fn=_WritingBeside(request.async_fn.args[0]))
    with forks_die_with_us():
        calls.schedule_async_request(request)


class _Writing:
    """Stands in for Megatron Core's write_preloaded_data_multiproc."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        self._transforms = transforms

    def __call__(self, rank: int, buckets: Sequence[Any], report: WriterReport) -> None:
        """Each bucket is a file; what came of them, or the first error, goes into the report."""
        with ThreadPoolExecutor(max_workers=len(buckets)) as threads:
            outcomes = list(threads.map(self._write, range(len(buckets)), buckets))
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        report.put(errors[0] if errors else dict(enumerate(outcomes)))

    def _write(self, number: int, bucket: Any) -> Any:
        """The results of one file, or the exception."""
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        under_way: queue.Queue[int] = queue.Queue()
        under_way.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            self._transforms, number, bucket, results, under_way, use_fsync=True
        )
        return results.get_nowait()[1]


class _WritingBeside(_Writing):
    """The same in a forked process."""

    def __call__(self, rank: int, buckets: Sequence[Any], report: WriterReport) -> None:
        # A copy of all weights must not outlive a training that was killed.
        end_with_parent()
        gc.disable()  # tensors on a GPU belong to the parent and cannot be freed here
        super().__call__(rank, buckets, report)
