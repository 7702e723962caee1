"""`study plan`: the runs of a study as a list for a job array, and what they will cost."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.derive import step_tokens, total_steps
from megatron_dlm.config.hardware import GPUS
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.study_commands import StudyPlanConfig
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.flops import training_flops
from megatron_dlm.scaling.study import Study, StudyRun, read_study
from megatron_dlm.scaling.study_results import make_folder

_HOUR = 3600.0
_MOST_ROWS = 40
_STEP_OF_CHECKPOINT = re.compile(r"iter_(\d{7,})/?$")


@dataclass(frozen=True)
class RunCost:
    """What one run takes; of a run that goes on from another, only what it trains itself.

    None where only the data say how long an epoch is.
    """

    name: str
    parameters: int
    """All of them, experts that a token does not meet included."""
    parameters_without_embeddings: int
    """Of those that a token meets; no output layer either."""
    start_step: int | None
    steps: int | None
    """Of the whole run, those before start_step included."""
    tokens: int | None
    training_flops: float | None
    """Every matrix product as computed (docs/scaling.md: fine)."""
    training_flops_six_n: float | None
    training_flops_six_p_and_attention: float | None
    gpu_hours: float | None
    """Of the GPU that was asked for."""


def plan_study(config: StudyPlanConfig) -> None:
    """Write sweep.txt and plan.json into the study's folder and print the costs."""
    source, folder = Path(config.study), Path(config.output_dir)
    study = read_study(source)
    peak = config.mfu * GPUS[config.gpu].peak_flops
    costs = costs_of(study.configs(folder / "runs", study.num_gpus), peak_flops=peak)
    make_folder(folder)
    write_whole(folder / "sweep.txt", sweep_list(study, folder / "runs"))
    plan = {
        "study": study.name,
        "question": study.question,
        **_totals(costs),
        "gpu": config.gpu,
        "mfu": config.mfu,
        "num_gpus_of_a_run": study.num_gpus,
        "gpu_hours": _hours(costs, peak),
        "gpu_hours_by_gpu": {
            name: _hours(costs, config.mfu * gpu.peak_flops) for name, gpu in GPUS.items()
        },
        "runs": [asdict(cost) for cost in costs],
    }
    write_whole(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    _tell(study, costs, config)
    _tell_how_to_start(study, source, folder)


def costs_of(configs: Mapping[str, RunConfig], *, peak_flops: float) -> list[RunCost]:
    """One for each run; peak_flops is what a GPU delivers, its MFU counted in."""
    return [_cost_of(name, config, configs, peak_flops) for name, config in configs.items()]


def _cost_of(
    name: str, config: RunConfig, configs: Mapping[str, RunConfig], peak_flops: float
) -> RunCost:
    parameters = count_parameters(config.model)
    tables = parameters.embedding + parameters.output_layer
    steps, start = _num_steps(config), _start_step(config, configs)
    tokens = None
    if steps is not None and start is not None:
        tokens = max(0, steps - start) * step_tokens(config)
    flops = training_flops(config.model, config.objective)
    fine, six_n, six_p = (
        None if tokens is None else tokens * per_token
        for per_token in (flops.fine, flops.six_n, flops.six_p_and_attention)
    )
    return RunCost(
        name=name,
        parameters=parameters.total,
        parameters_without_embeddings=parameters.active - tables,
        start_step=start,
        steps=steps,
        tokens=tokens,
        training_flops=fine,
        training_flops_six_n=six_n,
        training_flops_six_p_and_attention=six_p,
        gpu_hours=None if fine is None else fine / peak_flops / _HOUR,
    )


def _num_steps(config: RunConfig) -> int | None:
    if config.train.epochs is None:
        return total_steps(config, num_windows=0)
    if config.data.unique_tokens is None:
        return None
    return total_steps(config, -(-config.data.unique_tokens // config.model.seq_length))


def _start_step(config: RunConfig, configs: Mapping[str, RunConfig]) -> int | None:
    """Steps that another run has taken for this one; None where that is not known here."""
    start = config.train.start_from
    if start is None:
        return 0
    if found := _STEP_OF_CHECKPOINT.search(start):
        return int(found.group(1))
    parents = [parent for parent in configs.values() if parent.train.output_dir == start]
    return _num_steps(parents[0]) if parents else None


def sweep_list(study: Study, runs: Path) -> str:
    """A line for every run: its name and its flags (see slurm/sweep.sbatch), in waves."""
    # A question may have several lines, and a line that is no comment is a run.
    lines = [" ".join(f"# {study.name}: {study.question}".split()).rstrip(": ")]
    for (first, last), wave in zip(_ranges(study), study.waves(), strict=True):
        if first > 0:
            lines.append(f"# --array={first}-{last}, once all runs above are finished:")
        for run in wave:
            after = f"  # after {', '.join(run.after)}" if run.after else ""
            lines.append(f"{run.name}  {_flags_in_a_line(run, runs)}{after}")
    return "\n".join(lines) + "\n"


def _flags_in_a_line(run: StudyRun, runs: Path) -> str:
    text = shlex.join(run.flags_in(runs))
    if "\n" in text:
        raise ValueError(
            f"run {run.name}: a setting has a line break, which sweep.txt cannot hold; use a file "
            "under base, or `study run`"
        )
    return text


def _ranges(study: Study) -> list[tuple[int, int]]:
    """First and last number of the runs of every wave."""
    ranges, first = [], 0
    for wave in study.waves():
        ranges.append((first, first + len(wave) - 1))
        first += len(wave)
    return ranges


def _totals(costs: Sequence[RunCost]) -> dict[str, float]:
    names = (
        *("tokens", "training_flops", "training_flops_six_n"),
        "training_flops_six_p_and_attention",
    )
    return {name: sum(getattr(cost, name) or 0 for cost in costs) for name in names}


def _hours(costs: Sequence[RunCost], peak_flops: float) -> float:
    return sum(cost.training_flops or 0 for cost in costs) / peak_flops / _HOUR


def _tell(study: Study, costs: Sequence[RunCost], config: StudyPlanConfig) -> None:
    table = Table(title=f"{study.name}: {len(costs)} runs")
    table.add_column("run", overflow="fold")
    for column in ("parameters", "steps", "tokens", "FLOPs", f"{config.gpu} hours"):
        table.add_column(column, justify="right")
    for cost in costs[:_MOST_ROWS]:
        numbers = (cost.parameters, cost.steps, cost.tokens, cost.training_flops, cost.gpu_hours)
        table.add_row(cost.name, *("?" if each is None else f"{each:.4g}" for each in numbers))
    if len(costs) > _MOST_ROWS:
        table.add_row(f"and {len(costs) - _MOST_ROWS} more (plan.json)")
    Console().print(table)
    totals = _totals(costs)
    print(
        f"{totals['tokens']:.4g} tokens. FLOPs: {totals['training_flops']:.3g}, every matrix "
        f"product as computed (6N: {totals['training_flops_six_n']:.3g}; 6P + 12LaS: "
        f"{totals['training_flops_six_p_and_attention']:.3g})."
    )
    hours = (
        f"{name} {_hours(costs, config.mfu * gpu.peak_flops):,.3g}" for name, gpu in GPUS.items()
    )
    print(f"GPU-hours at {config.mfu:.0%} of the dense bf16 peak: {', '.join(hours)}.")
    unknown = sum(cost.training_flops is None for cost in costs)
    if unknown:
        print(f"Not counted: {unknown} runs whose length only the data know.")


def _tell_how_to_start(study: Study, source: Path, folder: Path) -> None:
    start = shlex.join([f"LIST={folder / 'sweep.txt'}", f"SWEEP_DIR={folder / 'runs'}"])
    if study.num_gpus > 1:
        print(f"{study.num_gpus} GPUs a run: set --nodes and --ntasks-per-node in the script")
    for first, last in _ranges(study):
        waits = "--dependency=afterok:JOB " if first > 0 else ""
        note = "  # JOB: the array before" if first > 0 else ""
        print(f"{start} sbatch --array={first}-{last} {waits}slurm/sweep.sbatch{note}")
    print(f"or here: megatron-dlm study run --study {source} --output_dir {folder}")
