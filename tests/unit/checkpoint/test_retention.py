"""Names and deletion: what is kept, what is left behind, and what replaces what."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from small_checkpoints import random_weights, write_step

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.pruning import prune
from megatron_dlm.checkpoint.retention import whole_checkpoints
from megatron_dlm.checkpoint.run_lock import RunLock
from megatron_dlm.config.checkpoint_commands import CheckpointPruneConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4, 6, 8):
        write_step(tmp_path / "run", step, random_weights(step))
    return tmp_path / "run"


def steps_of(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in whole_checkpoints(run / "checkpoints")[0]]


def flip(run: Path, step: int) -> None:
    file = run / "checkpoints" / retention.directory_name(step) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


def test_what_is_not_whole_does_not_count(run: Path) -> None:
    """Two are kept: the broken newest is none of them."""
    root = run / "checkpoints"
    (root / "iter_0000008" / "common.pt").unlink()
    retention.remove_old(root, keep_last=2, keep_every_steps=None)
    assert steps_of(run) == [4, 6]
    retention.remove_old(root, keep_last=1, keep_every_steps=None)
    assert steps_of(run) == [6]
    retention.remove_old(root, keep_last=1, keep_every_steps=None)
    assert steps_of(run) == [6]


def test_an_older_checkpoint_of_the_same_step_is_replaced(run: Path) -> None:
    root = run / "checkpoints"
    unfinished = root / "iter_0000004.12345678.unfinished"
    (root / "iter_0000006").rename(unfinished)
    expected = (unfinished / "__0_0.distcp").read_bytes()
    assert retention.publish(unfinished, 4) == root / "iter_0000004"
    assert (root / "iter_0000004" / "__0_0.distcp").read_bytes() == expected
    assert (root / retention.LATEST_NAME).read_text() == "4\n"
    assert steps_of(run) == [2, 4, 8]
    assert list(root.glob("*.unfinished")) == []


def test_what_was_interrupted_is_removed_and_never_whole(run: Path, tmp_path: Path) -> None:
    root = run / "checkpoints"
    (root / "iter_0000006").rename(root / "iter_0000006.1a2b3c4d.unfinished")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("")
    (root / "iter_0000009.unfinished").symlink_to(elsewhere)
    whole, warnings = whole_checkpoints(root)
    assert [checkpoint.step for checkpoint in whole] == [2, 4, 8]
    assert [warning.split(": ")[1] for warning in warnings] == ["the save was interrupted"] * 2
    retention.remove_unfinished(root)
    assert whole_checkpoints(root)[1] == []
    assert (elsewhere / "file").exists()  # a link is removed, not what it leads to


def test_set_aside_again_and_again(run: Path) -> None:
    root = run / "checkpoints"
    for expected in ("iter_0000008.damaged", "iter_0000008_2.damaged", "iter_0000008_3.damaged"):
        newest = whole_checkpoints(root)[0][-1]
        assert retention.set_aside(newest).name == expected
        write_step(run, 8, random_weights(8))
    assert whole_checkpoints(root)[1] == []


@pytest.mark.parametrize("content", [b"", b"6\n", b"\xff\x00garbage", b"9999999\n", None])
def test_the_marker_is_mended(content: bytes | None, run: Path) -> None:
    path = run / "checkpoints" / retention.LATEST_NAME
    newest = whole_checkpoints(run / "checkpoints")[0][-1]
    assert retention.mend_latest(newest) is None
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert "it now says 8" in (retention.mend_latest(newest) or "")
    assert path.read_text() == "8\n"


def test_files_that_vanish_before_the_manifest(run: Path) -> None:
    """A rank wrote a file that is not there when the save is published, or is seen late."""
    directory = run / "checkpoints" / "iter_0000008"
    known = {"__1_0.distcp": "00"}
    with pytest.raises(ValueError, match=r"__1_0.distcp was written and is gone; mend the file"):
        retention.write_manifest(directory, {}, known, patience_seconds=0.1)
    late = threading.Timer(0.3, (directory / "__1_0.distcp").touch)
    late.start()
    retention.write_manifest(directory, {}, known)
    manifest = whole_checkpoints(run / "checkpoints")[0][-1].manifest
    assert manifest["file_bytes"]["__1_0.distcp"] == 0


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(CheckpointPruneConfig(str(run), keep_last=1, keep_every_steps=4, dry_run=True))
    assert steps_of(run) == [2, 4, 6, 8]
    output = capsys.readouterr().out
    assert f"would delete {run}/checkpoints/iter_0000002 (" in output
    assert output.endswith("would be kept: steps 4, 8\n")
    prune(CheckpointPruneConfig(str(run), keep_last=1, keep_every_steps=4, keep_steps=[2]))
    assert steps_of(run) == [2, 4, 8]
    assert capsys.readouterr().out.endswith("kept: steps 2, 4, 8\n")
    (run / "checkpoints" / "iter_0000010.unfinished").mkdir()
    retention.set_aside(whole_checkpoints(run / "checkpoints")[0][0])
    prune(CheckpointPruneConfig(str(run), keep_last=1))
    names = sorted(path.name for path in (run / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000002.damaged", "iter_0000008"]
    prune(CheckpointPruneConfig(str(run), damaged=True))
    assert steps_of(run) == [8]
    assert not (run / "checkpoints" / "iter_0000002.damaged").exists()


def test_prune_deletes_nothing_where_the_newest_is_damaged(run: Path) -> None:
    flip(run, 8)
    with pytest.raises(ValueError, match=r"iter_0000008 is damaged: __0_0.distcp does not have"):
        prune(CheckpointPruneConfig(str(run), keep_last=1))
    assert steps_of(run) == [2, 4, 6, 8]


def test_prune_refuses(run: Path, tmp_path: Path) -> None:
    with RunLock(run), pytest.raises(ValueError, match=r"run is in use by process"):
        prune(CheckpointPruneConfig(str(run)))
    with pytest.raises(ValueError, match=r"is no run directory: it has no checkpoints/"):
        prune(CheckpointPruneConfig(str(tmp_path)))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no whole checkpoint; nothing is deleted"):
        prune(CheckpointPruneConfig(str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"keep_last is 0; at least 1 is kept"):
        CheckpointPruneConfig(str(run), keep_last=0)
    with pytest.raises(ValueError, match=r"keep_every_steps is 0"):
        CheckpointPruneConfig(str(run), keep_every_steps=0)
