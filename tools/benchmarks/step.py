"""Our train step against a plain PyTorch loop and Megatron Core's stock local spec, on CPU, fp32.

All three train the same transformer from the same weights on the same batch (AdamW, clipping),
one after another in one process; the first two losses of all must agree. The peers run the output
layer on every slot and get the corrupted inputs of masked diffusion for free. Then one real
`megatron-dlm train` run reports how long its steps waited for data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from data_wait import measure_data_wait
from measure import CLOCKS, environment, interleave, parser, print_environment, spread, write_json

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.runtime.device import open_device

if TYPE_CHECKING:
    from contenders import Task


@dataclass(frozen=True)
class Size:
    """A model and how many samples of it make one step."""

    model: ModelConfig
    batch_size: int


_SMALL = ModelConfig(num_layers=6, hidden_size=256, vocab_size=8192, seq_length=256)
_LARGE = ModelConfig(
    num_layers=12,
    hidden_size=384,
    num_attention_heads=6,
    vocab_size=8192,
    seq_length=256,
    untie_embeddings_and_output_weights=True,
)
SIZES = {
    "7m-256": Size(_SMALL, batch_size=4),
    "27m-256": Size(_LARGE, batch_size=4),
    "27m-1024": Size(replace(_LARGE, seq_length=1024), batch_size=1),
    "27m-2048": Size(replace(_LARGE, seq_length=2048), batch_size=1),
    "13m-256-32k": Size(replace(_SMALL, vocab_size=32_768), batch_size=4),
}
_DEFAULT_SIZES = ("7m-256", "27m-256", "27m-1024")
OBJECTIVES = ("autoregressive", "masked")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = open_device("cpu")  # before megatron.core is imported
    from contenders import Task

    from megatron_dlm.runtime.parallel import parallel_context

    facts = environment()
    print_environment(facts)
    print(_row("model", "objective", "parameters", "tokens/s", "x plain loop", "x stock spec"))
    results = []
    with parallel_context(ParallelConfig(), device) as parallel:
        for name in arguments.size:
            size = SIZES[name]
            for kind in arguments.objective:
                task = Task(
                    size.model, ObjectiveConfig(kind=kind), size.batch_size, device, parallel
                )
                results.append({"model": name, **_compare(task, arguments)})
                print(_summary(results[-1]), flush=True)
    share = None if arguments.skip_data_wait else measure_data_wait()
    if share is not None:
        print(f"\nshare of the step spent waiting for data in a real run: {share:.2%}")
    write_json(
        arguments.json,
        {
            "environment": facts,
            "clock": arguments.clock,
            "steps": results,
            "data_wait_share": share,
        },
    )


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--size", nargs="+", choices=SIZES, default=_DEFAULT_SIZES)
    options.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options.add_argument("--skip-data-wait", action="store_true", help="leave out the real run")
    return options.parse_args()


def _compare(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    from contenders import our_step, plain_step, stock_step

    batch = task.batch()
    timings = interleave(
        {
            "ours": our_step(task, batch),
            "plain": plain_step(task, batch),
            "stock": stock_step(task, batch),
        },
        arguments.rounds,
        clock=CLOCKS[arguments.clock],
    )
    ours = timings["ours"]
    return {
        "objective": task.objective_config.kind,
        "parameters": count_parameters(task.model).total,
        "tokens_per_step": task.num_tokens,
        "scored_share": task.scored_share(batch),
        "tokens_per_second": {
            name: timing.tokens_per_second(task.num_tokens) for name, timing in timings.items()
        },
        "speed_relative_to": {
            name: ours.speed_relative_to(timings[name]) for name in ("plain", "stock")
        },
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def _summary(result: Mapping[str, Any]) -> str:
    return _row(
        result["model"],
        result["objective"],
        f"{result['parameters'] / 1e6:.1f}M",
        f"{result['tokens_per_second']['ours']:.0f}",
        *(spread(ratios) for ratios in result["speed_relative_to"].values()),
    )


def _row(*cells: str) -> str:
    widths = (11, 15, 11, 9, 18, 18)
    return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
