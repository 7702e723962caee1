"""The `plan` command: what a run will cost, from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.commands import PlanConfig, PlanRunConfig
from megatron_dlm.config.derive import (
    data_parallel_size,
    num_micro_batches,
    resolve,
    step_tokens,
    total_steps,
)
from megatron_dlm.config.hardware import GPUS
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check_layout
from megatron_dlm.data.corpus import Corpus, TierReport
from megatron_dlm.models.accounting import (
    FlopCount,
    ParameterCount,
    count_parameters,
    mean_scored_share,
    training_flops_per_token,
)
from megatron_dlm.models.accounting_memory import BatchLayout, MemoryEstimate, memory_per_rank
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.plan_data import announced_tokens, data_table, open_training_data
from megatron_dlm.scaling.short_numbers import with_unit


@dataclass(frozen=True)
class RunLength:
    """How long a run is; None where the configuration does not say."""

    steps: int
    tokens: int
    unique_tokens: int | None
    epochs: float | None
    training_flops: float
    flops_6nd: float
    seconds: float


@dataclass(frozen=True)
class RunPlan:
    """Everything that `plan` knows about a run."""

    parameters: ParameterCount
    flops_per_token: FlopCount
    scored_share: float
    data_parallel_size: int
    num_micro_batches: int
    memory_bytes: MemoryEstimate
    step_tokens: int
    tokens_per_second: float
    length: RunLength | None
    data: list[TierReport]
    """One row for each dataset; empty where the data or the length of the run is not known."""


def plan_run(config: PlanRunConfig) -> None:
    """Print the plan of a run, and write it to `plan.output` if given."""
    plan = make_plan(config, config.plan)
    if config.plan.output is not None:
        _write_json(plan, Path(config.plan.output))
    _print_plan(plan, config)


def make_plan(config: RunConfig, machine: PlanConfig) -> RunPlan:
    """Reckon a run on a machine; ValueError where the layout is impossible."""
    config = resolve(config)
    check_layout(config, machine.num_gpus)
    model, objective = config.model, config.objective
    layout = BatchLayout(
        micro_batch_size=config.train.micro_batch_size,
        num_micro_batches=num_micro_batches(config, machine.num_gpus),
        data_parallel_size=data_parallel_size(config, machine.num_gpus),
        precision=config.train.precision,
        loss_chunk_slots=config.train.loss_chunk_slots,
    )
    flops = training_flops_per_token(model, objective)
    tokens_per_second = machine.num_gpus * _peak_flops(machine) * machine.mfu / flops.total
    corpus = open_training_data(config)
    length = _length(config, corpus, flops, tokens_per_second)
    num_samples = length.steps * config.train.global_batch_size if length else 0
    return RunPlan(
        parameters=count_parameters(model),
        flops_per_token=flops,
        scored_share=mean_scored_share(objective),
        data_parallel_size=layout.data_parallel_size,
        num_micro_batches=layout.num_micro_batches,
        memory_bytes=memory_per_rank(model, config.parallel, objective, layout),
        step_tokens=step_tokens(config),
        tokens_per_second=tokens_per_second,
        length=length,
        data=corpus.report(num_samples) if corpus and length else [],
    )


def _length(
    config: RunConfig, corpus: Corpus | None, flops: FlopCount, tokens_per_second: float
) -> RunLength | None:
    train = config.train
    unique_tokens = corpus.unique_tokens if corpus else announced_tokens(config)
    if train.steps is None and train.tokens is None and train.epochs is None:
        return None
    if train.epochs is not None and unique_tokens is None:
        raise ValueError(
            f"train.epochs is {train.epochs} but the corpus size is unknown; give "
            "data.unique_tokens, or data.train with shards made by `megatron-dlm preprocess`"
        )
    num_windows = -(-(unique_tokens or 0) // config.model.seq_length)
    if corpus:
        num_windows = corpus.num_windows
    steps = total_steps(config, num_windows)
    tokens = steps * step_tokens(config)
    num_samples = steps * config.train.global_batch_size
    return RunLength(
        steps=steps,
        tokens=tokens,
        unique_tokens=unique_tokens,
        epochs=None if unique_tokens is None else num_samples / num_windows,
        training_flops=flops.total * tokens,
        flops_6nd=6.0 * count_parameters(config.model).active * tokens,
        seconds=tokens / tokens_per_second,
    )


def _peak_flops(machine: PlanConfig) -> float:
    return machine.peak_flops or GPUS[machine.device].peak_flops


def _write_json(plan: RunPlan, path: Path) -> None:
    write_whole(path, json.dumps(asdict(plan), indent=1) + "\n")


def _print_plan(plan: RunPlan, config: PlanRunConfig) -> None:
    console = Console()
    rows = _model_rows(plan, config) + _machine_rows(plan, config) + _length_rows(plan, config)
    table = Table(show_header=False, title=f"{config.objective.kind} on {_machine(config.plan)}")
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left", style="dim")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console.print(table)
    if plan.data:
        console.print(data_table(plan.data))
    console.print(
        "FLOPs: a multiply-add is 2, backward is twice forward, recomputation is not counted; "
        "bidirectional attention counts every key, twice the causal count; the output layer runs "
        "on scored slots only; experts run on the tokens that are theirs on average. 6ND takes N = "
        "the parameters that a token meets. Memory leaves out the CUDA context, communication "
        "buffers, fragmentation and what experts with more than their share of tokens need.",
        style="dim",
        highlight=False,
    )


_Row = tuple[str, str, str]


def _model_rows(plan: RunPlan, config: PlanRunConfig) -> list[_Row | None]:
    parameters, flops = plan.parameters, plan.flops_per_token
    tied = "" if config.model.untie_embeddings_and_output_weights else "embedding is tied"
    pattern = config.objective.attention.value
    return [
        ("parameters", _short(parameters.total), tied),
        *_expert_rows(parameters, config.model),
        ("  without embeddings", _short(parameters.non_embedding), ""),
        None,
        ("training FLOPs per token", _short(flops.total), "forward and backward"),
        ("  layers", _short(flops.linear), "projections and MLP"),
        ("  attention", _short(flops.attention), f"{pattern}, {config.model.seq_length} tokens"),
        ("  output layer", _short(flops.output_layer), f"on {plan.scored_share:.0%} of the slots"),
        ("  6N", _short(6.0 * parameters.active), "for comparison"),
        None,
    ]


def _expert_rows(parameters: ParameterCount, model: ModelConfig) -> list[_Row]:
    moe = model.moe
    if not moe.is_moe:
        return []
    average = " on average" if moe.routing == "expert_choice" else ""
    note = f"{moe.router_topk} of {moe.num_experts} experts{average}"
    return [("  active", _short(parameters.active), note)]


def _machine_rows(plan: RunPlan, config: PlanRunConfig) -> list[_Row | None]:
    memory, parallel, machine = plan.memory_bytes, config.parallel, config.plan
    capacity = GPUS[machine.device].memory_bytes
    verdict = "fits" if memory.total < 0.9 * capacity else "TOO MUCH"
    layout = (
        f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}, "
        f"CP {parallel.context_parallel_size}, DP {plan.data_parallel_size}"
    )
    if config.model.moe.is_moe:
        layout += f", EP {parallel.expert_model_parallel_size}"
    note = f"{verdict}: a {machine.device} has {_gigabytes(capacity)}"
    return [
        ("ranks", str(machine.num_gpus), f"{layout}; {plan.num_micro_batches} micro-batches"),
        ("memory per rank", _gigabytes(memory.total), note),
        ("  weights", _gigabytes(memory.weights), config.train.precision),
        ("  gradients", _gigabytes(memory.gradients), _gradients(config)),
        ("  optimizer", _gigabytes(memory.optimizer), f"sharded over DP{_offload(config)}"),
        ("  activations", _gigabytes(memory.activations), _recompute(config)),
        ("  logits", _gigabytes(memory.logits), "scored slots of one micro-batch"),
        None,
    ]


def _length_rows(plan: RunPlan, config: PlanRunConfig) -> list[_Row | None]:
    rows: list[_Row | None] = [
        ("tokens per step", _short(plan.step_tokens), f"{config.train.global_batch_size} samples"),
        ("tokens per second", _short(plan.tokens_per_second), f"at MFU {config.plan.mfu:g}"),
    ]
    length = plan.length
    if length is None:
        return [*rows, ("length", "unknown", "give train.steps, train.tokens or train.epochs")]
    if length.unique_tokens is None or length.epochs is None:
        epochs = ("epochs", "unknown", "give data.unique_tokens or shards with manifests")
    else:
        epochs = ("epochs", f"{length.epochs:.2f}", f"of {_short(length.unique_tokens)} tokens")
    return [
        *rows,
        ("steps", f"{length.steps:,}", ""),
        ("tokens", _short(length.tokens), ""),
        epochs,
        ("training FLOPs", f"{length.training_flops:.3g}", f"6ND: {length.flops_6nd:.3g}"),
        ("time", _duration(length.seconds), f"{_gpu_hours(length, config)} GPU hours"),
    ]


def _machine(machine: PlanConfig) -> str:
    peak = f"{_peak_flops(machine) / 1e12:.0f} TFLOP/s dense bf16"
    return f"{machine.num_gpus} x {machine.device} ({peak})"


def _gradients(config: RunConfig) -> str:
    in_fp32 = config.parallel.grad_reduce_in_fp32 or config.train.precision == "fp32"
    return "fp32" if in_fp32 else "bf16"


def _offload(config: RunConfig) -> str:
    share = config.parallel.optimizer_cpu_offload_fraction
    return f"; {share:.0%} on the host" if share else ""


def _recompute(config: RunConfig) -> str:
    notes = {
        "none": "",
        "full": "full recompute",
        "selective": f"recompute of {', '.join(config.model.recompute_modules)}",
    }
    note = notes[config.model.recompute_granularity]
    layers = config.parallel.activation_offload_layers
    return f"{layers} layers on the host" if layers else note


def _gpu_hours(length: RunLength, config: PlanRunConfig) -> str:
    return f"{length.seconds * config.plan.num_gpus / 3600:,.1f}"


def _short(number: float) -> str:
    return with_unit(number, gap=" ")


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
