"""Takes the place of megatron_dlm/training/entry.py in the tests of the job scripts: a trainer
without torch that keeps a run directory, obeys signals and fails where it is told to.

Told by the file `plan.json` in the run directory: step_seconds; deaf: true; fail: [rank, step,
how], once; always: the same at every start. How: "raise", a status to exit with, or "kill".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dlm.checkpoint.retention import directory_name, whole_checkpoints, write_manifest
from megatron_dlm.config.parse import dump
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.training.status import State, write_status

_VARIABLES = ("SLURM_", "MASTER_", "CUDA_VISIBLE", "OMP_", "NCCL_", "SITE_", "RANK", "LOCAL_RANK")


def train(config: RunConfig) -> None:
    """Sleep through the steps, save every fifth and at the end or when asked to stop."""
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    run = Path(config.train.output_dir)
    rank = int(os.environ.get("RANK", os.environ["SLURM_PROCID"]))
    world = int(os.environ.get("WORLD_SIZE", os.environ["SLURM_NTASKS"]))
    plan = json.loads((run / "plan.json").read_text()) if (run / "plan.json").exists() else {}
    whole, _ = whole_checkpoints(run / "checkpoints")
    step = whole[-1].step if whole else 0
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    environment = {name: os.environ[name] for name in os.environ if name.startswith(_VARIABLES)}
    seen = {"argv": sys.argv, "cwd": os.getcwd(), "code": __file__, "environment": environment}
    start = f"{os.environ['SLURM_JOB_ID']}_{restart}_{rank}"
    write_whole(run / f"seen_{start}.json", json.dumps({**seen, "step": step}))
    num_steps = config.train.steps
    assert num_steps is not None
    if rank == 0:
        write_whole(run / "config.yaml", dump(config))
        write_whole(run / "run.json", json.dumps({"steps": num_steps}))
    _say(run, rank, "running", step)
    while len(list(run.glob(f"seen_{start.rpartition('_')[0]}_*.json"))) < world:
        time.sleep(0.01)  # until all ranks are there, as real ones would
    while step < num_steps:
        time.sleep(plan.get("step_seconds", 0.02))
        step += 1
        _fail_as_planned(run, plan, rank, step)
        if rank == 0:
            _report(run, step)
            if (asked and not plan.get("deaf")) or step % 5 == 0 or step == num_steps:
                _save(run, step)
        if asked and not plan.get("deaf"):
            print(f"rank {rank}: saved at step {step}", flush=True)
            _say(run, rank, "preempted", step)
            return
    _say(run, rank, "finished", step)


def _say(run: Path, rank: int, state: State, step: int) -> None:
    if rank == 0:
        write_status(run, state, step)


def _fail_as_planned(run: Path, plan: dict[str, Any], rank: int, step: int) -> None:
    for name in ("fail", "always"):
        if plan.get(name, [None, None])[:2] != [rank, step]:
            continue
        if name == "fail":
            write_whole(run / "plan.json", json.dumps({**plan, "fail": [None, None]}))
        how = plan[name][2]
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise RuntimeError(f"planned failure at step {step}")
        raise SystemExit(how)


def _report(run: Path, step: int) -> None:
    values = {"loss": 5 - 0.01 * step, "tokens": 100 * step, "tokens_per_second": 50.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "split": "train", **values}) + "\n")


def _save(run: Path, step: int) -> None:
    target = run / "checkpoints" / directory_name(step)
    target.mkdir(parents=True, exist_ok=True)
    write_manifest(target, {"step": step})
