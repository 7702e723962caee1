"""status.json: whole or not at all, and whose it is."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from megatron_dlm.training.journal import Journal
from megatron_dlm.training.status import read_status, write_status


def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_status(tmp_path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    write_status(tmp_path, "preempted", 12, "SIGTERM")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.reason) == ("preempted", 12, "SIGTERM")
    assert (status.job, status.restart, status.pid) == ("17", 3, os.getpid())
    assert status.is_of_this_job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert not status.is_of_this_job
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running"}', "\0"])
def test_damaged_file_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None


def test_a_reader_never_sees_half(tmp_path: Path) -> None:
    write_status(tmp_path, "running", 0)
    is_over = threading.Event()
    found: list[bool] = []

    def read() -> None:
        while not is_over.is_set():
            found.append(read_status(tmp_path) is not None)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        write_status(tmp_path, "running", step, "x" * step)
    is_over.set()
    reader.join()
    assert all(found)


def test_failure_is_noted_once_and_only_in_an_own_directory(tmp_path: Path) -> None:
    journal = Journal()
    journal.failed("before the directory was ours", is_writer=True)
    assert list(tmp_path.iterdir()) == []
    journal.open(tmp_path, step=4, is_main=True)
    journal.failed("rank 1 died", is_writer=True)
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["kind"], event["state"], event["step"]) == ("end", "failed", 4)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason) == ("failed", "rank 1 died")


def test_overdue_by_what_it_does() -> None:
    journal = Journal()
    assert not journal.is_overdue(0.0), "nothing is overdue before the first step"
    journal.doing("step 1", patience=3)
    assert journal.is_overdue(0.0)
    assert not journal.is_overdue(60.0)
    assert journal.state == "step 1"
