"""Progress counts what is read, reckons packed bytes, and writes lines to a log."""

from __future__ import annotations

import pytest

from megatron_dlm.data.inputs.documents import Piece
from megatron_dlm.data.inputs.input_plan import Job
from megatron_dlm.data.preprocessing import progress
from megatron_dlm.data.preprocessing.job_workers import Report
from megatron_dlm.data.preprocessing.progress import ProgressDisplay
from megatron_dlm.data.preprocessing.shard_job import Progress

JOBS = {
    0: Job((Piece("a.jsonl", 0, 1000),), 1000),
    1: Job((Piece("b.jsonl.zst", 0, 500),), 500),
    2: Job((Piece("c.parquet", 0, 3),), 500),
}


def report(job: int, num_bytes: int | None, *, documents: int = 1, tokens: int = 10) -> Report:
    done = None if num_bytes is None else Progress(documents, num_bytes, tokens)
    return Report(job, done, "library 1.0")


def test_share_of_the_bytes_on_disk() -> None:
    display = ProgressDisplay(JOBS)
    assert display.share_done() == 0
    display.add(report(0, 400))
    assert display.share_done() == pytest.approx(400 / 2000)
    display.add(report(1, 600))  # three times packed, until it is known better
    assert display.share_done() == pytest.approx((400 + 200) / 2000)
    display.add(report(1, 1400))
    display.add(report(1, None))
    assert display.share_done() == pytest.approx((400 + 500) / 2000)
    display.add(report(2, 1000))  # four times, as the packed job that is done
    assert display.share_done() == pytest.approx((400 + 500 + 250) / 2000)
    display.add(report(2, 9000))
    assert display.share_done() == pytest.approx((400 + 500 + 495) / 2000), "not done before it is"
    for job in (0, 2):
        display.add(report(job, None))
    assert display.share_done() == 1
    assert (display.documents, display.num_bytes, display.tokens) == (5, 12_400, 50)


def test_lines_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressDisplay(JOBS) as display:
        now += 10
        display.add(report(0, 500_000, documents=50, tokens=100))
        assert capsys.readouterr().err == ""
        now += 30
        display.add(report(1, 1_500_000, documents=150, tokens=300))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "0 of 3 jobs, 200 documents (5/s), 2 MB (0.1 MB/s), 400 tokens (10/s), about 0:00:14 left"
    )


def test_an_hour_is_said_as_one() -> None:
    assert progress._duration(3725.4) == "1:02:05"
