"""How far a run is, from its files alone: the job script asks before and after every start.

`python -m megatron_dlm.launch.slurm.run_state RUN_DIRECTORY [CONFIG.yaml]` prints the state, the
step of the newest whole checkpoint and, if known, the last step; on a second line how the start of
the Slurm job that asks stands (status.json), and why it ended.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_dlm.checkpoint.retention import whole_checkpoints
from megatron_dlm.config.derive import total_steps
from megatron_dlm.config.json_text import parse_json
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.training.status import Status, read_status


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    kind: Literal["new", "unfinished", "finished"]
    step: int
    """Of the newest whole checkpoint; 0 where there is none."""
    num_steps: int | None
    """The last step, where it is known."""
    status: Status | None = field(default=None, compare=False)
    """What the trainer said last, whichever start of it."""


def run_state(run_directory: Path, config: RunConfig | None = None) -> RunState:
    """The state of a run that `config` asks for; default: that was asked for at its last start.

    Finished is a run whose newest whole checkpoint is that of its last step: every run saves then,
    whatever else it does. Raises ValueError or OSError where a file of the run cannot be read.
    """
    checkpoints, _ = whole_checkpoints(run_directory / "checkpoints")
    step = checkpoints[-1].step if checkpoints else 0
    num_steps = _num_steps(run_directory, config)
    status = read_status(run_directory)
    if num_steps is not None and step >= num_steps:
        return RunState("finished", step, num_steps, status)
    is_new = not checkpoints and not (run_directory / "run.json").exists()
    return RunState("new" if is_new else "unfinished", step, num_steps, status)


def _num_steps(run_directory: Path, config: RunConfig | None) -> int | None:
    """The last step, from the configuration, or for epochs as the trainer counted it."""
    started = None
    if (run_directory / "config.yaml").exists():
        started = parse(RunConfig, ["--config", str(run_directory / "config.yaml")], "run state")
    asked = config or started
    if asked is None:
        return None
    if asked.train.epochs is None:
        return total_steps(asked, num_windows=0)
    # The trainer knows how many windows an epoch has; what it says holds for the same epochs.
    facts = run_directory / "run.json"
    if started is None or started.train.epochs != asked.train.epochs or not facts.exists():
        return None
    return int(parse_json(facts.read_text(encoding="utf-8"))["steps"])


def main(arguments: list[str]) -> int:
    """Print the state in two lines."""
    run_directory, *config_files = arguments
    config = None
    try:
        if config_files:
            config = parse(RunConfig, ["--config", config_files[0]], "run state")
        state = run_state(Path(run_directory), config)
    except (ValueError, OSError) as error:
        print(f"run state: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(state.kind, state.step, "" if state.num_steps is None else state.num_steps)
    if state.status is not None and state.status.is_of_this_job:
        print(state.status.state, state.status.reason or "")
    else:  # of an earlier start: this one did not come so far
        print("unknown")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
