"""Seconds and memory of the phases of a training step, and its operators.

Import only after `open_device`: it has to adapt Megatron Core first.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from synthetic_run import SyntheticRun
from torch.profiler import ProfilerActivity

from megatron_dlm.models.accounting import training_flops_per_token
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.memory import peak_memory_bytes

# rest: zeroing gradients, reading the loss, and in a pipeline waiting for other stages.
PHASES = ("data", "forward", "backward", "reduce", "optimizer", "rest")


def plain_seconds(run: SyntheticRun, steps: int, *, warmup: int) -> list[float]:
    """Of whole steps, as training takes them; the loss is read after each."""
    for _ in range(warmup):
        run.step()
    run.device.forget_peak_memory()
    seconds = []
    for _ in range(steps):
        run.device.synchronize()
        started = time.perf_counter()
        run.step()
        run.device.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


@dataclass
class Phases:
    """What the clock saw; `seconds` per phase and step."""

    run: SyntheticRun
    seconds: dict[str, list[float]]
    memory: list[tuple[float, str, int]]
    """(seconds since the first step, phase that ended, bytes)."""

    def summary(self, steps: Sequence[float]) -> dict[str, Any]:
        """For phases.json; `steps` are the seconds of whole steps."""
        run, step = self.run, statistics.median(steps)
        flops = training_flops_per_token(run.config.model, run.config.objective).total
        speed = run.tokens_per_step / step
        peak = run.device.peak_flops
        return {
            "step_seconds": step,
            "tokens_per_second": speed,
            "model_flops_per_token": flops,
            "mfu": speed * flops / (peak * run.parallel.world_size) if peak else None,
            "peak_memory_bytes": peak_memory_bytes(run.device),
            "phase_seconds": {name: statistics.median(self.seconds[name]) for name in PHASES},
        }

    def table(self, steps: Sequence[float]) -> str:
        """One line per phase."""
        facts = self.summary(steps)
        phases: dict[str, float] = facts["phase_seconds"]
        whole = sum(phases.values())
        lines = [
            f"step {facts['step_seconds'] * 1e3:.1f} ms, "
            f"{facts['tokens_per_second']:.0f} tokens/s, "
            f"MFU {'unknown' if facts['mfu'] is None else format(facts['mfu'], '.1%')}, "
            f"peak memory {facts['peak_memory_bytes'] / 1e9:.2f} GB",
            f"phase by phase, waiting for the device after each: {whole * 1e3:.1f} ms",
        ]
        lines += [
            f"  {name:<10} {seconds * 1e3:10.2f} ms {seconds / whole:6.1%}"
            for name, seconds in phases.items()
        ]
        return "\n".join(lines)

    def write_memory(self, path: Path) -> None:
        """memory.csv."""
        _write_csv(path, ("second", "phase", "bytes"), self.memory)


@dataclass
class _Clock:
    device: Device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: list[tuple[float, str, int]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted and the device waited for."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.device.synchronize()
            started = time.perf_counter()
            result = function(*arguments, **options)
            self.device.synchronize()
            ended = time.perf_counter()
            self.seconds[phase] += ended - started
            self.memory.append((ended - self.started, phase, self.device.memory_bytes()))
            return result

        return call


def measure_phases(run: SyntheticRun, steps: int) -> Phases:
    """Of `steps` steps. Megatron's schedules, gradient reduction and optimizer are timed inside."""
    clock = _Clock(run.device)
    found: dict[str, list[float]] = {name: [] for name in PHASES}
    with _instrumented(run, clock):
        for _ in range(steps):
            clock.seconds.clear()
            started = time.perf_counter()
            batches = clock.timed("data", run.batches)()
            run.step(batches)
            run.device.synchronize()
            whole = time.perf_counter() - started
            clock.seconds["rest"] = whole - sum(clock.seconds.values())
            for name in PHASES:
                found[name].append(clock.seconds[name])
    return Phases(run, found, clock.memory)


@contextmanager
def _instrumented(run: SyntheticRun, clock: _Clock) -> Iterator[None]:
    config = run.chunks[0].module.config
    with ExitStack() as undo:
        for owner, name, phase in (
            (schedules, "forward_step", "forward"),
            (schedules, "backward_step", "backward"),
            (config, "finalize_model_grads_func", "reduce"),
            (run.optimizer, "step", "optimizer"),
        ):
            original = getattr(owner, name)
            setattr(owner, name, clock.timed(phase, original))
            undo.callback(setattr, owner, name, original)
        yield


@dataclass(frozen=True)
class Operators:
    """Operators by the time they take themselves, the longest first."""

    rows: list[tuple[str, float, int]]
    """(name, seconds per step, calls per step)."""

    def table(self, count: int) -> str:
        """The first `count` of them."""
        whole = sum(seconds for _, seconds, _ in self.rows) or 1.0
        lines = ["operator".ljust(56) + "   ms/step  share calls/step"]
        lines += [
            f"{name[:55]:<56} {seconds * 1e3:9.2f} {seconds / whole:6.1%} {calls:10d}"
            for name, seconds, calls in self.rows[:count]
        ]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """operators.csv, all of them."""
        _write_csv(path, ("operator", "seconds_per_step", "calls_per_step"), self.rows)


def trace(run: SyntheticRun, steps: int, path: Path | None) -> Operators:
    """Trace `steps` steps; the trace goes to `path` unless it is None."""
    activities = [ProfilerActivity.CPU]
    if run.device.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            run.step()
        run.device.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))
    kind = "self_device_time_total" if run.device.is_cuda else "self_cpu_time_total"
    rows = [
        (event.key, getattr(event, kind) * 1e-6 / steps, event.count // steps)
        for event in profiler.key_averages()
    ]
    return Operators(sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1]))


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows(rows)
