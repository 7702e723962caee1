"""`study plan`: the runs of a study as a list for a job array, and what they will cost."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.derive import resolve, step_tokens, total_steps
from megatron_dlm.config.hardware import GPUS
from megatron_dlm.config.study_commands import StudyPlanConfig
from megatron_dlm.models.accounting import count_parameters, training_flops_per_token
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.study import Study, StudyRun, read_study

_HOUR = 3600.0


@dataclass(frozen=True)
class RunCost:
    """What one run takes."""

    name: str
    parameters: int
    tokens: int | None
    """None where only the data say how long an epoch is."""
    training_flops: float | None


def plan_study(config: StudyPlanConfig) -> None:
    """Write study.yaml, sweep.txt and plan.json into the study's folder and print the costs."""
    source, folder = Path(config.study), Path(config.output_dir)
    study = read_study(source)
    study.check()
    costs = [cost_of(run, folder) for run in study.runs]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "sweep.txt", sweep_list(study))
    known = [cost.training_flops for cost in costs if cost.training_flops is not None]
    hours = sum(known) / (config.mfu * GPUS[config.gpu].peak_flops) / _HOUR
    plan = {
        "study": study.name,
        "question": study.question,
        "runs": [asdict(cost) for cost in costs],
        "training_flops": sum(known),
        "gpu": config.gpu,
        "mfu": config.mfu,
        "gpu_hours": hours,
    }
    write_whole(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    _tell(study, costs, config, hours)
    print(
        f"{folder / 'sweep.txt'}: for slurm/sweep.sbatch with --array=0-{len(study.runs) - 1}; or"
    )
    print(f"  megatron-dlm study run --study {source} --output_dir {folder}")


def cost_of(run: StudyRun, folder: Path) -> RunCost:
    """Parameters, tokens and FLOPs of one run, from its configuration and its tokenizer."""
    config = resolve(run.config(folder / "runs" / run.name))
    tokens = None
    if config.train.epochs is None:
        tokens = total_steps(config, num_windows=0) * step_tokens(config)
    elif config.data.unique_tokens is not None:
        windows = config.data.unique_tokens // config.model.seq_length
        tokens = total_steps(config, num_windows=windows) * step_tokens(config)
    per_token = training_flops_per_token(config.model, config.objective).total
    flops = None if tokens is None else tokens * per_token
    return RunCost(run.name, count_parameters(config.model).total, tokens, flops)


def sweep_list(study: Study) -> str:
    """A line for every run: its name and its flags (see slurm/sweep.sbatch)."""
    lines = [f"# {study.name}: {study.question}".rstrip(": ")]
    lines += [f"{run.name}  {shlex.join(run.flags)}" for run in study.runs]
    return "\n".join(lines) + "\n"


def _tell(study: Study, costs: list[RunCost], config: StudyPlanConfig, hours: float) -> None:
    table = Table(title=f"{study.name}: {len(costs)} runs")
    for column in ("run", "parameters", "tokens", "training FLOPs"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for cost in costs:
        tokens = "?" if cost.tokens is None else f"{cost.tokens:.3g}"
        flops = "?" if cost.training_flops is None else f"{cost.training_flops:.3g}"
        table.add_row(cost.name, f"{cost.parameters:.3g}", tokens, flops)
    console = Console()
    console.print(table)
    unknown = sum(cost.training_flops is None for cost in costs)
    without = f" (without {unknown} runs whose epochs only the data know)" if unknown else ""
    console.print(
        f"{sum(cost.training_flops or 0 for cost in costs):.3g} FLOPs, {hours:.3g} hours of one "
        f"{config.gpu} at {config.mfu:.0%} of its peak{without}"
    )
