"""events.jsonl: one object per line, whatever a killed process left there."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from megatron_dlm.training.events import Events


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.write("start", world_size=2)
    events.write("rollback", step=12, to_step=10, reason='loss "nan"')
    # Not closed: what a killed run leaves.
    start, rollback = read(path)
    assert {**start, "time": None} == {"time": None, "kind": "start", "world_size": 2}
    assert rollback["step"] == 12
    assert rollback["to_step"] == 10
    assert rollback["reason"] == 'loss "nan"'
    written = datetime.fromisoformat(rollback["time"])
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=1)


def test_events_of_a_later_start_follow(tmp_path):
    path = tmp_path / "events.jsonl"
    for kind in ("start", "resume"):
        with Events(path) as events:
            events.write(kind)
    assert [event["kind"] for event in read(path)] == ["start", "resume"]


def test_a_half_written_line_does_not_swallow_the_next_event(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind":"start"}\n{"kind":"sa')
    with Events(path) as events:
        events.write("resume", step=3)
    lines = path.read_text().splitlines()
    assert lines[1] == '{"kind":"sa'
    assert json.loads(lines[2])["kind"] == "resume"


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Events(None) as events:
        events.write("start")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_file_takes_no_more(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.close()
    events.close()
    events.write("end")
    assert (tmp_path / "events.jsonl").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_does_not_stop_the_run():
    with (
        pytest.raises(OSError, match="No space left"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")
    with Events(Path("/dev/full")) as events:
        events.write("save", step=1)


def test_an_unknown_kind_is_a_defect(tmp_path):
    with Events(tmp_path / "e") as events, pytest.raises(AssertionError, match="unknown kind"):
        events.write("party")
