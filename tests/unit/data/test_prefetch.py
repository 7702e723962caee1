"""The prefetch thread keeps order, passes errors on, and ends with its consumer."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from megatron_dlm.data.prefetch import prefetch


def num_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_order_and_end() -> None:
    assert list(prefetch(lambda n: n * n, range(100), depth=2)) == [n * n for n in range(100)]
    assert num_threads() == 0


def test_works_ahead_but_not_further_than_depth() -> None:
    done: list[int] = []
    results = prefetch(lambda n: done.append(n), iter(range(100)), depth=3)
    next(results)
    deadline = time.monotonic() + 60
    while len(done) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One consumed, three in the queue, one waiting for room.
    assert done == [0, 1, 2, 3, 4]
    results.close()  # type: ignore[attr-defined]


def test_an_error_arrives_at_its_place() -> None:
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise ValueError("bad shard")
        return number

    results = prefetch(fail_at_three, range(10), depth=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="bad shard"):
        next(results)
    assert num_threads() == 0


@pytest.mark.parametrize("how", ["close", "drop", "never started"])
def test_the_thread_ends_with_its_consumer(how: str) -> None:
    results = prefetch(lambda n: n, iter(int, 1), depth=2)
    if how != "never started":
        next(results)
        assert num_threads() == 1
    if how == "close":
        results.close()  # type: ignore[attr-defined]
    del results
    gc.collect()
    assert num_threads() == 0
