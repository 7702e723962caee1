"""Made-up run directories for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_run(path: Path, *, num_steps: int = 400, lr: float = 1e-3, **changes: Any) -> Path:
    """A run that was interrupted and went on; the directory."""
    path.mkdir(parents=True)
    settings = {
        "model": {"num_layers": 4, "hidden_size": 64},
        "objective": {"kind": "masked"},
        "optimizer": {"lr": lr},
        "train": {"steps": num_steps, "output_dir": str(path)},
        **changes,
    }
    (path / "config.yaml").write_text(json.dumps(settings, indent=1))  # JSON is YAML
    facts = {
        "commit": "0123456789abcdef",
        "uncommitted_changes": True,
        "host": "node-1",
        "device": "cpu",
        "world_size": 2,
        "num_parameters": 1_234_567,
        "training_flops": 1.5e15,
        "steps": num_steps,
        "packages": {"torch": "2.0"},
    }
    (path / "run.json").write_text(json.dumps(facts))
    state = {
        "state": "finished",
        "step": num_steps,
        "reason": "reached the last step",
        "time": "2030-01-02T11:10:00+00:00",
    }
    (path / "status.json").write_text(json.dumps(state))
    entries = [
        entry for step in range(10, num_steps + 1, 10) for entry in reports(step, num_steps, lr)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_events(path, num_steps)
    return path


def reports(step: int, num_steps: int, lr: float) -> list[dict[str, Any]]:
    """What is reported at one step."""
    place = {"tokens": step * 4096, "epoch": step * 4096 / 200_000}
    loss = 2 + 1000 * lr + 5 * math.exp(-step / 60) + 0.2 * math.sin(step)
    train = {
        "loss": loss,
        "nelbo": loss + 0.1,
        "grad_norm": 0.5 + 3 * math.exp(-step / 40) + (30 if step == 200 else 0),
        "lr": lr * min(1, step / 50),
        "tokens_per_second": 20_000 + 500 * math.sin(step / 20),
        "data_wait_share": 0.002,
        "peak_memory_bytes": 3e8 + step * 1000,
    }
    if step % 50 == 0:
        train |= {f"grad_norm_layer_{layer}": 0.1 * (layer + 1) for layer in range(4)}
        train |= {f"param_norm_layer_{layer}": 5.0 + layer for layer in range(4)}
    found = [{"step": step, "split": "train", **train, **place}]
    if step % 50 == 0:
        profile = {
            f"nll_at_noise_{low / 10:.1f}-{(low + 1) / 10:.1f}": 1 + low / 4 + 100 / (step + 50)
            for low in range(10)
        }
        found.append({"step": step, "split": "valid", "nelbo": loss + 0.3, **profile, **place})
    return found


def write_events(path: Path, num_steps: int) -> None:
    middle = num_steps // 2
    events = [
        ("10:00:00", "start", 0, {"host": "node-1"}),
        ("10:20:00", "save", middle - 20, {"seconds": 0.123456, "reason": None}),
        ("10:25:00", "signal", middle, {"name": "SIGTERM"}),
        ("10:25:05", "end", middle, {"state": "preempted"}),
        ("10:40:00", "resume", middle, {"host": "node-2"}),
        ("10:50:00", "rollback", middle + 50, {"to_step": middle, "reason": "loss spike"}),
        ("11:10:00", "end", num_steps, {"state": "finished"}),
    ]
    lines = [
        json.dumps({"time": f"2030-01-02T{time}+00:00", "kind": kind, "step": step, **fields})
        for time, kind, step, fields in events
    ]
    (path / "events.jsonl").write_text("\n".join(lines) + "\n")
