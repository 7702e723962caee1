"""Bits that flip and files that end early, in every file of a checkpoint: all are noticed."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from small_checkpoints import random_weights, write_step

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.damage import check, damage
from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.inspection import verify
from megatron_dlm.checkpoint.retention import Checkpoint, whole_checkpoints
from megatron_dlm.config.checkpoint_commands import CheckpointVerifyConfig

FILES = [".metadata", "__0_0.distcp", "common.pt", "metadata.json", retention.MANIFEST_NAME]
NUM_FLIPS = 60


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return write_step(tmp_path / "run", 7, random_weights(0))


def found_wrong(path: Path) -> str | None:
    """What a start of the run would say of it."""
    whole, warnings = whole_checkpoints(path.parent)
    if not whole:
        (warning,) = warnings
        return warning
    problems = damage(whole[0], sorted(whole[0].checksums))
    return problems[0] if problems else None


def test_these_are_all_files(checkpoint: Checkpoint) -> None:
    assert sorted(file.name for file in checkpoint.path.iterdir()) == sorted(FILES)
    assert found_wrong(checkpoint.path) is None
    assert sorted(checkpoint.checksums) == sorted({*FILES} - {retention.MANIFEST_NAME})
    check(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint.path / name
    content = path.read_bytes()
    draw = random.Random(f"flips of {name}")
    for place in draw.sample(range(8 * len(content)), NUM_FLIPS):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        wrong = found_wrong(checkpoint.path)
        if wrong is None:  # white space of the manifest is the one thing that says nothing
            assert name == retention.MANIFEST_NAME, f"bit {place}"
            assert json.loads(changed) == json.loads(content), f"bit {place}"
        else:
            assert name in wrong, f"bit {place}"


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint.path / name
    content = path.read_bytes()
    draw = random.Random(f"ends of {name}")
    for length in [0, len(content) - 1, *draw.sample(range(len(content)), 10)]:
        path.write_bytes(content[:length])
        assert name in (found_wrong(checkpoint.path) or ""), f"{length} bytes"
    path.unlink()
    assert name in (found_wrong(checkpoint.path) or "")


def test_two_files_changed_places(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Right sizes, right bytes, of another step."""
    other = write_step(tmp_path / "other", 9, random_weights(1))
    shutil.copy(other.path / "__0_0.distcp", checkpoint.path / "__0_0.distcp")
    assert damage(checkpoint, sorted(checkpoint.checksums)) == [
        "__0_0.distcp does not have the checksum that was written"
    ]


def test_a_manifest_must_not_lead_elsewhere(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = checkpoint.path / retention.MANIFEST_NAME
    for name in ("../../../secret", str(tmp_path / "secret"), "..", "", "a\\b"):
        content = json.loads(path.read_text())
        content["file_bytes"] = {name: 1}
        path.write_text(json.dumps(retention.sealed(content)))
        whole, (warning,) = whole_checkpoints(checkpoint.path.parent)
        assert whole == []
        assert "which leaves the directory" in warning


def test_checkpoints_from_before_checksums(checkpoint: Checkpoint) -> None:
    """Format 1 had sizes only; what claims a later format must have its checksums."""
    path = checkpoint.path / retention.MANIFEST_NAME
    content = json.loads(path.read_text())
    for name in ("file_sha256", "sha256"):
        del content[name]
    path.write_text(json.dumps(content))
    assert "its own checksum is wrong" in (found_wrong(checkpoint.path) or "")
    path.write_text(json.dumps({**content, "format": 1}))
    assert found_wrong(checkpoint.path) is None
    check(find_checkpoint(checkpoint.path))


def test_verify_names_the_broken_files_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    paths = [write_step(run, step, random_weights(step)).path for step in (2, 4, 6)]
    verify(CheckpointVerifyConfig([str(run)]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"{path}:" for path in paths]
    assert all(re.search(r"whole, [\d.]+ kB compared$", line) for line in lines)

    file = paths[1] / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (paths[2] / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 checkpoints are damaged; the first: .*iter_"):
        verify(CheckpointVerifyConfig([str(run)]))
    output = capsys.readouterr().out
    assert f"{paths[1]}: __0_0.distcp does not have the checksum" in output
    assert f"{paths[2]}: common.pt has None bytes" in output
    with pytest.raises(ValueError, match=r"iter_0000004 is damaged: __0_0.distcp does not have"):
        find_checkpoint(run)
    verify(CheckpointVerifyConfig([str(paths[0])]))
    with pytest.raises(ValueError, match=r"1 of 1 checkpoints are damaged"):
        verify(CheckpointVerifyConfig([str(paths[2])]))
    with pytest.raises(ValueError, match=r"holds no checkpoint; name a run directory"):
        verify(CheckpointVerifyConfig([str(tmp_path / "absent")]))
