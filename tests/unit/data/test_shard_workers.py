"""Work in several processes: in order, errors in one line, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dlm.data.commands import reading_progress, shard_workers
from megatron_dlm.data.commands.shard_workers import map_shards
from megatron_dlm.data.storage.shards import Shard
from megatron_dlm.runtime.errors import is_users

Advance = Callable[[int], None]


def tell_process(item: int, advance: Advance) -> tuple[int, int]:
    time.sleep(0.3 if item == 0 else 0.01)
    advance(1)
    return item, os.getpid()


def open_shard(item: str, advance: Advance) -> None:
    Shard(item)


def open_file(item: str, advance: Advance) -> None:
    open(item).close()


def convert(item: str, advance: Advance) -> int:
    return int(item)


def end_abruptly(item: str, advance: Advance) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(function: Callable, items: list, workers: int) -> list:
    sizes = [100 << 20] * len(items)
    return list(map_shards(function, items, sizes_bytes=sizes, workers=workers, label="testing"))


def test_results_come_in_order_from_two_processes() -> None:
    results = run(tell_process, list(range(6)), 2)
    assert [item for item, _ in results] == list(range(6))
    processes = {process for _, process in results}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_little_work_and_one_worker_stay_here() -> None:
    assert {process for _, process in run(tell_process, [1, 2], 1)} == {os.getpid()}
    small = map_shards(tell_process, [1, 2], sizes_bytes=[5, 5], workers=2, label="testing")
    assert {process for _, process in small} == {os.getpid()}
    assert run(tell_process, [], 0) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("function", "kind", "message", "users"),
    [
        (open_shard, ValueError, "none.idx does not exist", True),
        (open_file, FileNotFoundError, "none", True),
        (convert, ValueError, "invalid literal", False),
    ],
)
def test_errors_keep_their_kind(
    workers: int, function: Callable, kind: type[Exception], message: str, users: bool
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run(function, ["/none", "/none"], workers)
    assert is_users(caught.value) == users


def test_progress_in_a_log_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading_progress, "_LINE_SECONDS", 0.0)
    with reading_progress.reading_progress("verifying", 2_000_000_000) as advance:
        advance(500_000_000)
        advance(1_000_000_000)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("verifying: 0.50 of 2.00 GB, ")
    assert second.startswith("verifying: 1.50 of 2.00 GB, ")
    assert second.endswith(" minutes left")


def test_killed_worker_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match="want of memory; try fewer workers"):
        run(end_abruptly, ["a", "b"], 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import os, sys, time\n"
        "from test_shard_workers import run, wait_for_ever\n"
        "if __name__ == '__main__':\n"
        f"    run(wait_for_ever, [{str(tmp_path)!r}] * 2, 2)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    folders = [str(Path(__file__).parent), str(Path(shard_workers.__file__).parents[3])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 60
        while len(workers := list(tmp_path.glob("worker_*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.send_signal(number)
    processes = [int(path.name.removeprefix("worker_")) for path in workers]
    while any(is_running(process) for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def wait_for_ever(item: str, advance: Advance) -> None:
    Path(item, f"worker_{os.getpid()}").touch()
    time.sleep(600)


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
