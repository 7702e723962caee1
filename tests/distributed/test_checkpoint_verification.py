"""Which checkpoint a run goes on from, agreed by ranks that each read a part of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_pool import RankPool
from small_checkpoints import random_weights, write_step

from megatron_dlm.checkpoint import retention
from megatron_dlm.config.parallel import ParallelConfig


def choose(root: Path, verify: str) -> tuple[str | None, list[str]]:
    """On every rank: the name of the chosen checkpoint and the warnings, or the error."""
    from megatron_dlm.checkpoint.verification import newest_sound
    from megatron_dlm.runtime.errors import AgreedError
    from megatron_dlm.runtime.parallel import laid_out

    with laid_out(ParallelConfig()) as parallel:
        try:
            found, warnings = newest_sound(root, parallel, verify=verify)  # type: ignore[arg-type]
        except AgreedError as error:
            return None, [str(error)]
    return (found.path.name if found else None), warnings


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        write_step(tmp_path, step, random_weights(step))
    return tmp_path / "checkpoints"


def agreed(ranks: RankPool, root: Path, verify: str = "checksums") -> tuple[str | None, list[str]]:
    first, second = ranks.run(choose, root, verify, num_ranks=2)
    assert first == second
    return first


def test_the_newest_sound_one_is_taken(ranks: RankPool, root: Path) -> None:
    assert agreed(ranks, root) == ("iter_0000006", [])
    (root / "iter_0000008.12ab34cd.unfinished").mkdir()
    name, warnings = agreed(ranks, root)
    assert name == "iter_0000006"
    assert warnings == [
        f"ignoring {root}/iter_0000008.12ab34cd.unfinished: the save was interrupted"
    ]
    assert agreed(ranks, root) == ("iter_0000006", [])

    # One file of each of two checkpoints: another rank may find each of them.
    flip(root / "iter_0000006" / "__0_0.distcp")
    flip(root / "iter_0000004" / "common.pt")
    assert agreed(ranks, root, "sizes") == ("iter_0000006", [])
    name, warnings = agreed(ranks, root)
    assert name == "iter_0000002"
    assert warnings == [
        f"ignoring {root}/iter_0000006: __0_0.distcp does not have the checksum that was written; "
        "it is kept as iter_0000006.damaged",
        f"ignoring {root}/iter_0000004: common.pt does not have the checksum that was written; it "
        "is kept as iter_0000004.damaged",
        f"{root}/latest_checkpointed_iteration.txt said '6'; it now says 2",
    ]
    assert agreed(ranks, root) == ("iter_0000002", [])


def test_damage_everywhere_is_no_reason_to_start_anew(ranks: RankPool, root: Path) -> None:
    (root / "iter_0000002" / "common.pt").unlink()
    (root / "iter_0000004" / retention.MANIFEST_NAME).write_text("{")
    flip(root / "iter_0000006" / ".metadata")
    for _ in range(2):  # it stays so
        name, (error,) = agreed(ranks, root)
        assert name is None
        assert f"{root} holds checkpoints but none is sound: " in error
        assert "common.pt has None bytes" in error
        assert "set train.resume never to start anew" in error


def test_before_the_first_save(ranks: RankPool, tmp_path: Path) -> None:
    assert agreed(ranks, tmp_path / "checkpoints") == (None, [])
    (tmp_path / "checkpoints" / "iter_0000004.unfinished").mkdir(parents=True)
    name, (warning,) = agreed(ranks, tmp_path / "checkpoints")
    assert name is None
    assert warning.endswith("the save was interrupted")
