"""What the benchmarks share: facts about the machine, interleaved timing, ratios, results files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], float]
"""One optimizer update; returns the loss (nats per token) of the weights before it."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

_WARMUP_STEPS = 2
_LOSS_TOLERANCE = 1e-4  # relative; the second loss also sees the first update


@dataclass(frozen=True)
class Timings:
    """Seconds of every step of one contender, in the order of the rounds."""

    seconds: list[float]
    losses: list[float]
    """Losses of the warm-up steps."""

    def tokens_per_second(self, num_tokens: int) -> float:
        """Median over the rounds."""
        return num_tokens / statistics.median(self.seconds)

    def speed_relative_to(self, other: Timings) -> list[float]:
        """Per round: how many times faster than `other`, which ran within the same seconds."""
        return [theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--rounds", type=int, default=rounds, help="timed steps (default: %(default)s)"
    )
    result.add_argument(
        "--threads", type=int, default=1, help="torch threads (default: %(default)s)"
    )
    result.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts processor time, for a busy machine and one thread (default: %(default)s)",
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return result


def interleave(
    steps: Mapping[str, Step], rounds: int, *, clock: Callable[[], float]
) -> dict[str, Timings]:
    """Time one step of every contender per round, each round starting with another one.

    Raises RuntimeError when the contenders' first losses differ: they would not do the same work.
    """
    losses = {name: [step() for _ in range(_WARMUP_STEPS)] for name, step in steps.items()}
    _refuse_different(losses)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            steps[name]()
            seconds[name].append(clock() - started)
    return {name: Timings(seconds[name], losses[name]) for name in steps}


def _refuse_different(losses: Mapping[str, Sequence[float]]) -> None:
    reference = next(iter(losses.values()))
    for name, values in losses.items():
        for value, expected in zip(values, reference, strict=True):
            if not abs(value - expected) <= _LOSS_TOLERANCE * abs(expected):
                raise RuntimeError(f"{name} starts with losses {values}, not {list(reference)}")


def spread(ratios: Sequence[float]) -> str:
    """`median (min..max)`."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def environment() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "commit": _commit(),
        "allocator": "runtime/cpu.py keeps freed memory in the process, for all contenders",
    }


def print_environment(facts: Mapping[str, object]) -> None:
    """One line per fact."""
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(flush=True)


def write_json(path: Path | None, results: Mapping[str, object]) -> None:
    """Write the results for other programs, whole or not at all."""
    if path is None:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash, with `+` when tracked files of the package differ from it."""
    repository = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "megatron_dlm", "tools")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
