"""Masked diffusion with the output layer on the scored slots against the output layer on all slots.

Both are our train step in fp32 on CPU, 32k vocabulary, from the same weights on the same batch,
one after another in one process; their losses must agree. The gain shrinks as the layers grow
relative to the output layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from measure import CLOCKS, environment, interleave, parser, print_environment, spread, write_json

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.runtime.device import open_device

if TYPE_CHECKING:
    from contenders import Task

_BATCH_SIZE = 8
SIZES = {
    "small": ModelConfig(num_layers=6, hidden_size=256, vocab_size=32_768, seq_length=256),
    "large": ModelConfig(
        num_layers=12, hidden_size=384, num_attention_heads=6, vocab_size=32_768, seq_length=256
    ),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = open_device("cpu")  # before megatron.core is imported
    from contenders import Task

    from megatron_dlm.runtime.parallel import parallel_context

    facts = environment()
    print_environment(facts)
    results = []
    with parallel_context(ParallelConfig(), device) as parallel:
        for name in arguments.size:
            task = Task(SIZES[name], ObjectiveConfig(), _BATCH_SIZE, device, parallel)
            results.append({"model": name, **_compare(task, arguments)})
            print(_summary(results[-1]), flush=True)
    write_json(arguments.json, {"environment": facts, "clock": arguments.clock, "steps": results})


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    return options.parse_args()


def _compare(task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    from contenders import ScoringAllSlots, our_step

    batch = task.batch()
    timings = interleave(
        {
            "scored": our_step(task, batch),
            "all": our_step(task, batch, ScoringAllSlots(task.objective())),
        },
        arguments.rounds,
        clock=CLOCKS[arguments.clock],
    )
    return {
        "parameters": count_parameters(task.model).total,
        "tokens_per_step": task.num_tokens,
        "scored_share": task.scored_share(batch),
        "tokens_per_second": {
            name: timing.tokens_per_second(task.num_tokens) for name, timing in timings.items()
        },
        "speed_relative_to": {"all": timings["scored"].speed_relative_to(timings["all"])},
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def _summary(result: Mapping[str, Any]) -> str:
    speed = result["tokens_per_second"]
    return (
        f"{result['model']} ({result['parameters'] / 1e6:.1f}M parameters, "
        f"{result['scored_share']:.1%} of the slots scored): {speed['scored']:.0f} tokens/s, "
        f"all slots {speed['all']:.0f} tokens/s, ratio {spread(result['speed_relative_to']['all'])}"
    )


if __name__ == "__main__":
    main()
