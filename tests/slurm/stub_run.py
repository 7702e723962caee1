"""A run directory on the cluster whose trainer is the stub."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minislurm import MiniSlurm

from megatron_dlm.config.parse import parse
from megatron_dlm.config.slurm_commands import SlurmSubmitConfig
from megatron_dlm.launch.slurm.submit import submit_jobs


@dataclass(frozen=True)
class StubRun:
    """A run of the stub trainer."""

    directory: Path
    checkout: Path
    cluster: MiniSlurm

    def plan(self, **plan: Any) -> None:
        """What the stub is to do; see stub_entry.py."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "plan.json").write_text(json.dumps(plan))

    def submit(self, **changes: Any) -> int:
        """Submit as the command does, with `section__key=value`; the number of the last job."""
        config = parse(SlurmSubmitConfig, flags(self.directory, **changes), "submit")
        return submit_jobs(config, checkout=self.checkout)[-1]

    def log(self, job: int | str) -> str:
        """What the job script said."""
        (file,) = (self.directory / "slurm").glob(f"*-{job}.out")
        return file.read_text()

    def seen(self, job: int | str, restart: int = 0) -> list[dict[str, Any]]:
        """What each rank of a start saw, by rank."""
        files = sorted(self.directory.glob(f"seen_{job}_{restart}_*.json"))
        return [json.loads(file.read_text()) for file in files]

    def steps(self) -> list[int]:
        """Steps of the reports, in their order."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def crashes(self) -> list[list[str]]:
        """Words of each line of the count of crashes: step, job, status, restart, time, reason."""
        path = self.directory / "slurm" / "crashes.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has reported this step."""
        self.wait_for(lambda: self.steps() and self.steps()[-1] >= step)

    def wait_for(self, condition: Callable[[], Any], seconds: float = 90) -> None:
        """Poll; fails after the time with all that the job scripts said."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [file.read_text() for file in (self.directory / "slurm").glob("*.out")]
                raise TimeoutError("\n".join(["waited in vain:", *logs]))
            time.sleep(0.05)


def flags(directory: Path, **changes: Any) -> list[str]:
    """Flags of a tiny run: two nodes with one rank each; None leaves a flag out."""
    settings = {
        "model.vocab_size": 256,
        "objective.mask_token_id": 255,
        "data.train": {"shards/x": 1.0},
        "train.steps": 20,
        "train.device": "cpu",
        "train.output_dir": str(directory),
        "slurm.nodes": 2,
        "slurm.ranks_per_node": 1,
        "slurm.cpus_per_rank": 1,
        "slurm.exclusive": False,
        "slurm.memory": "100",
        "slurm.time": "10",
        "slurm.save_seconds": 60,
        "slurm.minimum_free_gb": 1,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [
        f"--{name}={json.dumps(value) if isinstance(value, dict | bool | list) else value}"
        for name, value in settings.items()
        if value is not None
    ]
