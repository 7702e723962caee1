"""Training steps of whole models on one GPU: ours in every setting, and compiled plain PyTorch.

    python tools/benchmarks/gpu_step.py --json results.json         # 1.7B, bf16 and fp8, the sweep
    python tools/benchmarks/gpu_step.py --size toy --device cpu --precision fp32   # its logic

Every row times real updates (corruption, forward, backward, clipping, optimizer) on made-up tokens,
one contender after the other in one process. Rows:
  peer            the same transformer in plain PyTorch: torch.compile, autocast, fused AdamW,
                  scaled_dot_product_attention, output layer on every slot, inputs given
  masked          ours, bidirectional, swept over precision, micro-batch and recompute
  autoregressive  ours, the same shape
  all-slots       ours, masked, with the output layer on every slot: what scoring few slots saves
  chunked         ours, masked, output layer and loss on 4096 slots at a time
  experts         ours, masked, 8 experts of which a token takes 2 (grouped GEMM on a GPU)
The last four take the fastest micro-batch of masked. x peer is tokens/s over those of the fastest
peer at that length. MFU = tokens/s * model FLOPs per token / dense bf16 peak, where model FLOPs are
the matrix products of forward and backward (3 x forward; bidirectional attention in full, causal
half; output layer on scored slots; nothing recomputed). Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import environment, print_environment, write_json

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig, TrainConfig
from megatron_dlm.models.accounting import count_parameters, training_flops_per_token
from megatron_dlm.runtime.device import Device, open_device
from megatron_dlm.runtime.memory import peak_memory_bytes

if TYPE_CHECKING:
    from megatron_dlm.runtime.parallel import ParallelContext

_TOY = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=64,
        seq_length=32,
        vocab_size=256,
        untie_embeddings_and_output_weights=True,
    ),
    objective=ObjectiveConfig(mask_token_id=255),
)
_CHUNK_SLOTS = 4096
RECOMPUTE = {"none": {}, "mlp": {"recompute_modules": ["mlp"]}, "full": {}}


@dataclass
class Row:
    """One line of the table; the measured values are None where it did not fit or is refused."""

    contender: str
    sequence: int
    precision: str
    micro_batch: int
    recompute: str
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    times_peer: float | None = None
    loss: float | None = None
    """Of the first step, nats per token."""
    error: str = ""


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    base: RunConfig
    device: Device
    parallel: ParallelContext
    rounds: int
    compiles: bool

    def config(self, row: Row, **changes: Any) -> RunConfig:
        """The run of one row: one micro-batch is one step."""
        recompute = "selective" if row.recompute == "mlp" else row.recompute
        model = dataclasses.replace(
            self.base.model,
            seq_length=row.sequence,
            recompute_granularity=recompute,
            **RECOMPUTE[row.recompute],
        )
        train = TrainConfig(
            global_batch_size=row.micro_batch,
            micro_batch_size=row.micro_batch,
            precision=row.precision,  # type: ignore[arg-type]
        )
        config = dataclasses.replace(self.base, model=model, train=train)
        return dataclasses.replace(config, **changes)


def main() -> None:
    arguments = _arguments()
    device = open_device(arguments.device)  # before megatron.core is imported
    from megatron_dlm.runtime.parallel import parallel_context

    facts = {
        **environment(),
        "device": device.name,
        "has": device.capabilities.describe(),
        "arguments": sys.argv[1:],
    }
    print_environment(facts)
    base = _TOY if arguments.size == "toy" else parse(RunConfig, ["--config", _PRESET], "gpu_step")
    parallel_config = ParallelConfig(gradient_accumulation_fusion=arguments.fuse_gradients)
    base = dataclasses.replace(base, parallel=parallel_config)
    print(f"{count_parameters(base.model).total / 1e9:.3f}B parameters\n{_HEADER}", flush=True)
    rows: list[Row] = []
    with parallel_context(parallel_config, device) as parallel:
        bench = Bench(base, device, parallel, arguments.rounds, arguments.compile)
        for sequence in arguments.sequence or [base.model.seq_length]:
            for row in measure_length(bench, arguments, sequence):
                rows.append(row)
                print(line(row), flush=True)
                results = {"environment": facts, "rows": [vars(each) for each in rows]}
                write_json(arguments.json, results)


_PRESET = "preset:coder_1b7"


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--size", choices=["1.7b", "toy"], default="1.7b")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--sequence", nargs="+", type=int, help="default: 2048 4096, toy: 32")
    options.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp8"])
    options.add_argument("--micro-batch", nargs="+", type=int, help="samples; default: 1 2 4 8")
    options.add_argument("--recompute", nargs="+", choices=RECOMPUTE, default=["none"])
    options.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options.add_argument("--rounds", type=int, default=10, help="timed steps (%(default)s)")
    options.add_argument(
        "--fuse-gradients", action="store_true", help="parallel.gradient_accumulation_fusion"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    arguments = options.parse_args()
    is_toy = arguments.size == "toy"
    arguments.sequence = arguments.sequence or ([32] if is_toy else [2048, 4096])
    arguments.precision = arguments.precision or ["bf16", "fp8"]
    arguments.micro_batch = arguments.micro_batch or [1, 2, 4, 8]
    arguments.compile = arguments.device == "cuda"
    return arguments


def measure_length(bench: Bench, arguments: argparse.Namespace, sequence: int) -> Iterator[Row]:
    """All rows of one sequence length, the peer first."""
    first = arguments.precision[0]
    peer = None
    if "peer" in arguments.only:
        rows = [Row("peer", sequence, first, size, "none") for size in arguments.micro_batch]
        for row in rows:
            yield measured(bench, row, _peer(bench, row))
        peer = max((row.tokens_per_second or 0.0 for row in rows), default=0.0) or None
    swept = []
    settings = itertools.product(arguments.precision, arguments.micro_batch, arguments.recompute)
    for precision, size, recompute in settings:
        row = Row("masked", sequence, precision, size, recompute)
        swept.append(measured(bench, row, _ours(bench, bench.config(row)), peer))
        yield row
    for precision in arguments.precision:
        fitting = [row for row in swept if row.precision == precision and row.tokens_per_second]
        if not fitting:
            continue
        best = max(fitting, key=lambda row: row.tokens_per_second or 0.0)
        for name in arguments.only:
            if name in _VARIANTS:
                row = Row(name, sequence, precision, best.micro_batch, best.recompute)
                yield measured(bench, row, _VARIANTS[name](bench, row), peer)


Opened = tuple[Callable[[], float], RunConfig]
"""A step that returns the loss before it, and the run whose FLOPs it does."""


def measured(
    bench: Bench, row: Row, open_step: Callable[[], Opened], peer: float | None = None
) -> Row:
    """Fill the row: median of the rounds after two steps."""
    try:
        step, config = open_step()
        row.loss = step()
        step()
        seconds = [_timed(bench.device, step) for _ in range(bench.rounds)]
    except torch.OutOfMemoryError:
        row.error = "out of memory"
    except ValueError as error:
        row.error = str(error)
    else:
        flops = training_flops_per_token(config.model, config.objective).total
        row.step_seconds = statistics.median(seconds)
        row.tokens_per_second = row.micro_batch * row.sequence / row.step_seconds
        row.peak_memory_bytes = peak_memory_bytes(bench.device)
        if bench.device.peak_flops:
            row.mfu = row.tokens_per_second * flops / bench.device.peak_flops
        row.times_peer = row.tokens_per_second / peer if peer else None
    step = None  # type: ignore[assignment]
    gc.collect()
    bench.device.forget_peak_memory()
    return row


def _timed(device: Device, step: Callable[[], float]) -> float:
    device.synchronize()
    started = time.perf_counter()
    step()
    device.synchronize()
    return time.perf_counter() - started


def _ours(bench: Bench, config: RunConfig, *, scores_all: bool = False) -> Callable[[], Opened]:
    def open_step() -> Opened:
        from contenders import ScoringAllSlots
        from synthetic_run import SyntheticRun

        run = SyntheticRun(config, bench.device, bench.parallel)
        if scores_all:
            run.scored_with(ScoringAllSlots(run.objective))  # type: ignore[arg-type]
        return run.step, config

    return open_step


def _autoregressive(bench: Bench, row: Row) -> Callable[[], Opened]:
    return _ours(bench, bench.config(row, objective=ObjectiveConfig(kind="autoregressive")))


def _all_slots(bench: Bench, row: Row) -> Callable[[], Opened]:
    return _ours(bench, bench.config(row), scores_all=True)


def _chunked(bench: Bench, row: Row) -> Callable[[], Opened]:
    config = bench.config(row)
    train = dataclasses.replace(config.train, loss_chunk_slots=_CHUNK_SLOTS)
    return _ours(bench, dataclasses.replace(config, train=train))


def _experts(bench: Bench, row: Row) -> Callable[[], Opened]:
    """Eight experts a quarter as wide in half the layers: about the memory of the dense model."""
    config = bench.config(row)
    model = config.model
    experts = MoEConfig(num_experts=8, ffn_hidden_size=-(-model.ffn_size // 64) * 16)
    model = dataclasses.replace(model, num_layers=model.num_layers // 2, moe=experts)
    return _ours(bench, dataclasses.replace(config, model=model))


def _peer(bench: Bench, row: Row) -> Callable[[], Opened]:
    def open_step() -> Opened:
        from gpu_peer import peer_step

        config = bench.config(row)
        return peer_step(config, bench.device, bench.parallel, compiles=bench.compiles), config

    return open_step


_VARIANTS = {
    "autoregressive": _autoregressive,
    "all-slots": _all_slots,
    "chunked": _chunked,
    "experts": _experts,
}
CONTENDERS = ("peer", *_VARIANTS)
_WIDTHS = (15, 9, 10, 12, 10, 9, 10, 7, 8, 7, 8)


def line(row: Row) -> str:
    """One row of the table."""
    if row.error:
        cells = [row.error]
    else:
        assert row.step_seconds is not None
        assert row.peak_memory_bytes is not None
        cells = [
            f"{row.step_seconds * 1e3:.1f}",
            f"{row.tokens_per_second:.0f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            f"{row.peak_memory_bytes / 1e9:.2f}",
            "" if row.times_peer is None else f"{row.times_peer:.2f}",
            f"{row.loss:.4f}",
        ]
    return _cells(
        row.contender, row.sequence, row.precision, row.micro_batch, row.recompute, *cells
    )


def _cells(*values: object) -> str:
    return " ".join(
        str(value).ljust(width) for value, width in zip(values, _WIDTHS, strict=False)
    ).rstrip()


_HEADER = _cells(
    "contender", "sequence", "precision", "micro-batch", "recompute", "ms/step", "tokens/s", "MFU",
    "GB", "x peer", "loss",
)  # fmt: skip


if __name__ == "__main__":
    main()
