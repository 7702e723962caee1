"""How busy `megatron-dlm study run` keeps the cores, over a study of several short runs.

    python tools/benchmarks/study_runner.py [--runs 8] [--steps 400]

Two numbers, both shares of cores * wall time from the start of the command to its end:
used: CPU seconds of the command and of all that it starts (exact, as the system counts them);
used or waiting: the same and the time in which their threads stood in line for a core, sampled.
On a machine that does nothing else the first is the measure. Beside other work it says how much was
left to the study, and the second is an upper bound of how busy it would have kept the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_dlm.data.storage.shard_writer import ShardWriter
from megatron_dlm.runtime.processes import num_cores

_VOCAB_SIZE = 512
_SAMPLE_SECONDS = 0.1


def main() -> None:
    """Make a study, run it, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_study(folder, num_runs=arguments.runs, num_steps=arguments.steps)
        wall, used, waited = _measure(folder)
    cores = num_cores()
    print(
        f"{arguments.runs} runs of {arguments.steps} steps on {cores} cores: {wall:.1f} s; "
        f"used {used / wall / cores:.1%}, used or waiting for a core "
        f"{min(1.0, (used + waited) / wall / cores):.1%}"
    )


def _write_study(folder: Path, *, num_runs: int, num_steps: int) -> None:
    generator = np.random.default_rng(1)
    for split in ("train", "valid"):
        with ShardWriter(folder / split, vocab_size=_VOCAB_SIZE, mask_id=_VOCAB_SIZE - 1) as writer:
            for _ in range(200):
                writer.add_document(generator.integers(0, _VOCAB_SIZE - 1, 1000))
            writer.publish()
    study = {
        "name": "busy",
        "set": {
            "model.num_layers": 2,
            "model.hidden_size": 48,
            "model.num_attention_heads": 3,
            "model.seq_length": 64,
            "model.vocab_size": _VOCAB_SIZE,
            "objective.mask_token_id": _VOCAB_SIZE - 1,
            "data.train": {str(folder / "train"): 1.0},
            "data.valid": {str(folder / "valid"): 1.0},
            "schedule.warmup_steps": 1,
            "train.steps": num_steps,
            "train.global_batch_size": 32,
            "train.micro_batch_size": 32,
            "train.precision": "fp32",
            "train.device": "cpu",
            "validation.interval_steps": 50,
            "logging.interval_steps": 50,
            "logging.tensorboard": False,
        },
        "axes": {"seed": {f"s{seed}": {"train.seed": seed} for seed in range(num_runs)}},
    }
    (folder / "study.yaml").write_text(json.dumps(study), encoding="utf-8")


def _measure(folder: Path) -> tuple[float, float, float]:
    """Seconds of the wall, of CPU, and of waiting for a core."""
    command = [sys.executable, "-m", "megatron_dlm", "study", "run"]
    flags = ["--study", str(folder / "study.yaml"), "--output_dir", str(folder / "out")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
    waited: dict[str, int] = {}
    try:
        while process.poll() is None:
            for task in _tasks_below(process.pid):
                waited[task] = _waited_nanoseconds(task, waited.get(task, 0))
            time.sleep(_SAMPLE_SECONDS)
    finally:
        process.terminate()  # nothing where it has ended; else it saves its runs and ends
        process.wait()
    wall = time.monotonic() - started
    assert process.returncode == 0, f"study run ended with status {process.returncode}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used, sum(waited.values()) / 1e9


def _tasks_below(pid: int) -> list[str]:
    """/proc folders of all threads of a process and of its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        waiting += parents.get(process, [])
        try:
            found += [entry.path for entry in os.scandir(f"/proc/{process}/task")]
        except OSError:
            continue
    return found


def _waited_nanoseconds(task: str, last: int) -> int:
    """Time that a thread was ready and had no core; what it was last where it has ended."""
    try:
        return int(Path(task, "schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return last


if __name__ == "__main__":
    main()
