"""kill -9, stop signals, full disks, dying workers: the same command goes on to the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import zstandard
from command_line import Job, run_here, start

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.tokenizer_training import train_tokenizer

NUM_KILLS = 5
_SHARD_BYTES = 600_000
# The process in front of which it stands can write no file larger than 50 KiB: a full disk.
SMALL_FILES_ONLY = ["bash", "-c", 'ulimit -f 50; exec "$@"', "bash"]


@dataclass(frozen=True)
class Task:
    """One preprocess command."""

    inputs: list[str]
    tokenizer: str
    output: Path
    options: tuple[str, ...] = ()

    def arguments(self, *more: str) -> list[str]:
        return [
            "preprocess",
            f"--input={json.dumps(self.inputs)}",
            f"--tokenizer={self.tokenizer}",
            f"--output_prefix={self.output}/text",
            f"--shard_size_bytes={_SHARD_BYTES}",
            "--validation_fraction=0.1",
            "--workers=2",
            *self.options,
            *more,
        ]

    def num_whole(self) -> int:
        return len(list(self.output.glob("text_0*.manifest.json")))

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.output.iterdir()}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Some 18 MB: plain lines that many jobs share, and packed files that give many parts each."""
    directory = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [path.read_text("utf-8") for path in sorted(library.glob("*.py"))]
    lines = [json.dumps({"text": text}) + "\n" for text in 3 * _pieces(sources)]
    third = len(lines) // 3
    packed = zstandard.compress("".join(lines[:third]).encode())
    (directory / "a.jsonl.zst").write_bytes(packed)
    (directory / "b.jsonl").write_text("".join(lines[third : 2 * third]))
    (directory / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[2 * third :]).encode(), 1))
    train_tokenizer(
        TokenizerConfig(
            [f"{directory}/b.jsonl"], output_dir=f"{directory}/tokenizer", vocab_size=400
        )
    )
    inputs = [f"{directory}/{name}" for name in ("a.jsonl.zst", "b.jsonl", "c.jsonl.gz")]
    return Task(inputs, f"{directory}/tokenizer", directory / "whole")


def _pieces(sources: Iterable[str]) -> list[str]:
    return [text[i : i + 2000] for text in sources for i in range(0, len(text), 2000)]


@pytest.fixture(scope="module")
def whole(task: Task) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    assert run_here(task.arguments()) == 0
    assert task.num_whole() > 20
    return task.files()


@pytest.fixture
def interrupted(task: Task, tmp_path: Path) -> Task:
    return replace(task, output=tmp_path / "out")


def is_alive(process: int) -> bool:
    """Running; a process that is dead but not yet collected by its parent is not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def assert_all_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 120
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, "a worker outlives the command"
        time.sleep(0.01)


def test_killed_at_random_points(
    task: Task, whole: dict[str, bytes], interrupted: Task, tmp_path: Path
) -> None:
    """Of the whole group, or of the one process that the user knows of."""
    random_points = random.Random(1)
    total = sum(name.startswith("text_0") and name.endswith("manifest.json") for name in whole)
    for number in range(NUM_KILLS):
        job = start(interrupted.arguments(), tmp_path / f"run_{number}")
        wanted = min(interrupted.num_whole() + random_points.randint(0, 3), total - 1)
        job.wait_for(lambda wanted=wanted: interrupted.num_whole() >= wanted)  # type: ignore[misc]
        time.sleep(random_points.uniform(0, 0.1))
        workers = job.workers()
        if random_points.random() < 0.5:
            job.kill()
        else:
            job.process.kill()
            job.process.wait()
        assert_all_end(workers)
        assert not list(interrupted.output.glob("*.dataset.json"))
    ended = start(interrupted.arguments(), tmp_path / "last").end()
    assert ended.code == 0, ended.errors
    assert interrupted.files() == whole


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("workers", [1, 2])
def test_stop_signal(
    name: str,
    workers: int,
    task: Task,
    whole: dict[str, bytes],
    interrupted: Task,
    tmp_path: Path,
) -> None:
    """To the whole group, as a terminal and Slurm send it."""
    number = signal.Signals[name]
    job = start(interrupted.arguments(f"--workers={workers}"), tmp_path / "first")
    job.wait_for(lambda: interrupted.num_whole() >= 1)
    children = job.workers()
    os.killpg(job.process.pid, number)
    ended = job.end()
    assert ended.code == 128 + number, ended.errors
    assert ended.errors == f"stopped by {name}; the same command goes on from here\n"
    assert_all_end(children)
    assert not list(interrupted.output.glob("*.tmp"))
    assert not list(interrupted.output.glob("*.dataset.json"))
    assert run_here(interrupted.arguments()) == 0
    assert interrupted.files() == whole


def test_a_worker_that_is_killed(
    task: Task, whole: dict[str, bytes], interrupted: Task, tmp_path: Path
) -> None:
    """As the system does where memory runs out."""
    job = start(interrupted.arguments(), tmp_path / "first")
    job.wait_for(lambda: interrupted.num_whole() >= 2)
    children = job.workers()
    busy = [child for child in children if _is_worker(child)]
    os.kill(busy[0], signal.SIGKILL)
    ended = job.end()
    assert ended.code == 2
    (line,) = ended.error_lines()
    assert "a worker process ended early (killed, perhaps for want of memory" in line
    assert "Traceback" not in ended.errors
    assert_all_end(children)
    assert run_here(interrupted.arguments()) == 0
    assert interrupted.files() == whole


def _is_worker(process: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(
    workers: int, task: Task, whole: dict[str, bytes], interrupted: Task, tmp_path: Path
) -> None:
    arguments = interrupted.arguments(f"--workers={workers}")
    ended = start(arguments, tmp_path / "first", wrapper=SMALL_FILES_ONLY).end()
    assert ended.code == 2
    (line,) = ended.error_lines()
    assert "File too large; make room, then the same command goes on from here" in line
    assert f"{interrupted.output}/text_" in line
    assert "Traceback" not in ended.errors
    assert not list(interrupted.output.glob("*.tmp"))
    assert not list(interrupted.output.glob("*.dataset.json"))
    assert run_here(interrupted.arguments()) == 0
    assert interrupted.files() == whole


def test_an_error_in_one_worker_ends_the_others(
    task: Task, interrupted: Task, tmp_path: Path
) -> None:
    lines = Path(task.inputs[1]).read_bytes().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join([*lines[:500], b"{broken\n", *lines[500:]]))
    broken = replace(interrupted, inputs=[task.inputs[0], str(bad)])
    job = start(broken.arguments(), tmp_path / "log")
    ended = job.end()
    assert ended.code == 2
    (line,) = ended.error_lines()
    assert line.startswith(f"megatron-dlm preprocess: error: {bad}:501: not valid JSON")
    assert "Traceback" not in ended.errors
    assert not list(broken.output.glob("*.tmp"))
    assert not list(broken.output.glob("*.dataset.json"))


def test_slurm_tasks_side_by_side(
    whole: dict[str, bytes], interrupted: Task, tmp_path: Path
) -> None:
    """Both start at once and share the work without talking; whoever ends last lists the shards."""
    jobs = []
    for number in (0, 1):
        values = {"ID": 2 * number + 3, "MIN": 3, "MAX": 5, "COUNT": 2, "STEP": 2}
        slurm = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}
        log, command = tmp_path / f"task_{number}", interrupted.arguments("--workers=1")
        jobs.append(Job(command, log, program=[sys.executable, "-m"], environment=slurm))
    ends = [job.end() for job in jobs]
    assert [ended.code for ended in ends] == [0, 0], [ended.errors for ended in ends]
    assert "array task: 0 of 2" in ends[0].output
    assert "array task: 1 of 2" in ends[1].output
    assert any(f"{interrupted.output}/text.dataset.json lists" in ended.output for ended in ends)
    assert interrupted.files() == whole
