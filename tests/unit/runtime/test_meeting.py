"""Ranks that meet, and one whose rank 0 does not come."""

from __future__ import annotations

import socket
import time

import pytest

from megatron_dlm.runtime.meeting import meet


def test_alone_there_is_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    meeting = meet(1.0)
    assert (meeting.rank, meeting.world_size, meeting.is_main) == (0, 1, True)
    assert meeting.from_main("numbers", [1, "a"]) == [1, "a"]
    meeting.wait_for_all()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_rank_waits_for_rank_0_no_longer_than_it_was_told(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    names = {"torchrun": ("RANK", "WORLD_SIZE"), "srun": ("SLURM_PROCID", "SLURM_NTASKS")}
    monkeypatch.delenv("RANK", raising=False)
    values = (*zip(names[launcher], ("1", "2"), strict=True), ("MASTER_ADDR", "127.0.0.1"))
    for name, value in (*values, ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    expected = rf"the ranks did not find each other \(127.0.0.1:{port}: .*refused\); the logs"
    with pytest.raises(ValueError, match=expected):
        meet(0.02)
    assert 1.2 <= time.monotonic() - started < 10
