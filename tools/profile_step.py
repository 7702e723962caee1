"""Where the time and the memory of a training step go, on CPU or GPU.

    python tools/profile_step.py --config run.yaml --profile.output_dir profile
    torchrun --nproc-per-node 8 tools/profile_step.py --config run.yaml --profile.output_dir profile

takes the configuration of a run (its data section is not read: tokens are made up), trains a few
steps and writes into the output directory
  phases.json   seconds of each phase, tokens/s, MFU where the peak of the device is known
  memory.csv    memory at the end of each phase of each step: second, phase, bytes
  operators.csv operators (kernels on a GPU) by the time they take themselves
  trace.json    for chrome://tracing or https://ui.perfetto.dev
Phases are timed one by one, waiting for the device after each, so collectives that overlap with
computing are not hidden in another phase; the step itself is timed without that, before.
MFU = tokens/s * model FLOPs per token / (ranks * dense bf16 peak). Not yet run on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from megatron_dlm.config.checks import require_positive
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.determinism import use_deterministic_kernels
from megatron_dlm.runtime.device import open_device


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, and where the results go."""

    output_dir: str = "profile"
    """Directory of the results."""
    steps: int = 3
    """Steps of each measurement."""
    warmup_steps: int = 2
    """Steps before the first one."""
    operators: int = 20
    """Operators to print, those that take longest."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("steps", "warmup_steps", "operators")}
        require_positive("profile", counts)


@dataclass(frozen=True)
class ProfileConfig(RunConfig):
    """Profile a few training steps of a run: time per phase, operators, memory, trace."""

    profile: ProfileOptions = field(default_factory=ProfileOptions)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        config = parse(
            ProfileConfig, sys.argv[1:] if argv is None else argv, "python tools/profile_step.py"
        )
        profile(config)
    except (ValueError, OSError) as error:
        print(f"profile_step.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def profile(config: ProfileConfig) -> None:
    """Measure and write; rank 0 prints."""
    if config.train.deterministic:
        use_deterministic_kernels()
    device = open_device(config.train.device)  # before megatron.core is imported
    from step_phases import measure_phases, plain_seconds, trace
    from synthetic_run import SyntheticRun

    from megatron_dlm.runtime.parallel import parallel_context
    from megatron_dlm.training.stack_report import stack_report

    options = config.profile
    directory = Path(options.output_dir)
    with parallel_context(config.parallel, device) as parallel:
        run = SyntheticRun(config, device, parallel)
        stack = stack_report(chunks=run.chunks, optimizer=run.optimizer, device=device)
        seconds = plain_seconds(run, options.steps, warmup=options.warmup_steps)
        phases = measure_phases(run, options.steps)
        if parallel.is_main:
            directory.mkdir(parents=True, exist_ok=True)
        operators = trace(
            run, options.steps, directory / "trace.json" if parallel.is_main else None
        )
        if not parallel.is_main:
            return
    summary = {"stack": stack, **phases.summary(seconds)}
    (directory / "phases.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    phases.write_memory(directory / "memory.csv")
    operators.write(directory / "operators.csv")
    for name, text in stack.items():
        print(f"{name}: {text}")
    print("", phases.table(seconds), "", operators.table(options.operators), sep="\n")
    print(f"\nwritten to {directory}: phases.json, memory.csv, operators.csv, trace.json")


if __name__ == "__main__":
    sys.exit(main())
