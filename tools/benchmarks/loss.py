"""Losses over a large vocabulary: hybrid diffusion, cross entropy, and the chunked output layer.

Time: forward and backward pass of contenders on the same logits (or hidden rows), one after
another in one process; contenders of the same loss must agree. Peak memory: each contender in a
process of its own, the most that one forward and backward pass adds to what the process held
before there were logits.

`materialised` is the straightforward way, as public code has it: probabilities, one-hot vectors and
both distributions over [n, V], and autograd.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import (
    CLOCKS,
    Timings,
    environment,
    interleave,
    parser,
    print_environment,
    spread,
    write_json,
)
from torch import Tensor, nn

from megatron_dlm.models.output_layer import chunked_loss
from megatron_dlm.ops.mixture_loss import mixture_divergences
from megatron_dlm.ops.vocab_parallel import log_prob
from megatron_dlm.runtime.device import open_device

SEED = 1
_MIB = 1 << 20
_LOSSES = ("hybrid", "materialised", "masked", "cross_entropy")
_HEADS = ("whole", "chunked")


@dataclass(frozen=True)
class Problem:
    """Tokens of balanced hybrid noise (b = 0, linear schedule); half of them as they were."""

    vocab_size: int
    num_tokens: int
    hidden_size: int
    chunk_rows: int

    @property
    def mask_token_id(self) -> int:
        return self.vocab_size - 1

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets and log-SNR."""
        generator = torch.Generator().manual_seed(SEED)
        targets = torch.randint(0, self.mask_token_id, (self.num_tokens,), generator=generator)
        kept = torch.rand(self.num_tokens, generator=generator) < 0.5
        time = torch.rand(self.num_tokens, generator=generator, dtype=torch.float64)
        tokens = torch.where(kept, targets, self.mask_token_id)
        return tokens, targets, torch.logit(time.clamp(1e-4, 1 - 1e-4))

    def logits(self) -> Tensor:
        shape = (self.num_tokens, self.vocab_size)
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(shape, generator=generator).mul_(2).requires_grad_()

    def hidden(self) -> Tensor:
        shape = (self.num_tokens, self.hidden_size)
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(shape, generator=generator).requires_grad_()


class Layer(nn.Module):
    """What Megatron's ColumnParallelLinear does on one rank."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape = (problem.vocab_size, problem.hidden_size)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        self.weight = nn.Parameter(values.mul_(problem.hidden_size**-0.5))

    def forward(self, rows: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        return rows @ (self.weight if weight is None else weight).t(), None


def main() -> None:
    arguments = _arguments()
    open_device("cpu")
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.tokens, arguments.hidden_size, arguments.chunk_rows)
    problems = [Problem(vocab_size, *sizes) for vocab_size in arguments.vocab_size]
    if arguments.peak_of is not None:
        print(json.dumps(_peak(problems[0], arguments.peak_of)))
        return
    facts = environment()
    print_environment(facts)
    results = []
    for problem in problems:
        results.append(_compare(problem, arguments))
        print(_summary(results[-1]), flush=True)
    write_json(arguments.json, {"environment": facts, "clock": arguments.clock, "losses": results})


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--vocab-size", type=int, nargs="+", default=[32_768, 131_072])
    options.add_argument("--tokens", type=int, default=4096, help="rows (default: %(default)s)")
    options.add_argument(
        "--hidden-size", type=int, default=512, help="of the output layer (default: %(default)s)"
    )
    options.add_argument(
        "--chunk-rows", type=int, default=256, help="rows per chunk (default: %(default)s)"
    )
    options.add_argument("--part", nargs="+", choices=("loss", "head"), default=["loss", "head"])
    options.add_argument("--peak-of", choices=_LOSSES + _HEADS, help=argparse.SUPPRESS)
    return options.parse_args()


def _steps(problem: Problem, names: tuple[str, ...]) -> dict[str, Callable[[], float]]:
    """Forward and backward pass of each contender; returns its loss."""
    if names[0] in _HEADS:
        hidden, layer = problem.hidden(), Layer(problem)
        return {name: _head_step(problem, name, hidden, layer) for name in names}
    logits = problem.logits()
    return {name: _loss_step(problem, name, logits) for name in names}


def _loss_step(problem: Problem, name: str, logits: Tensor) -> Callable[[], float]:
    tokens, targets, log_snr = problem.labels()
    share = torch.sigmoid(log_snr - (1000 if name == "masked" else 0))

    def loss() -> Tensor:
        if name == "cross_entropy":
            values = log_prob(logits, targets, vocab_size=problem.vocab_size, tp_group=None)
            return -values.mean()
        if name == "materialised":
            kl, divergence = materialised(logits, tokens, targets, log_snr, share)
        else:
            kl, divergence = _divergences(problem, logits, tokens, targets, log_snr, share)
        return (kl + divergence / log_snr.exp()).float().mean()

    return lambda: _forward_and_backward(loss, [logits])


def _head_step(problem: Problem, name: str, hidden: Tensor, layer: Layer) -> Callable[[], float]:
    tokens, targets, log_snr = problem.labels()
    share = torch.sigmoid(log_snr)

    def loss_of(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        of_rows = (values[rows] for values in (tokens, targets, log_snr, share))
        kl, divergence = _divergences(problem, logits, *of_rows)
        total = (kl + divergence / log_snr[rows].exp()).float().sum() / problem.num_tokens
        return total, total.detach()

    def loss() -> Tensor:
        if name == "chunked":
            return chunked_loss(layer, hidden, None, loss_of, chunk_rows=problem.chunk_rows)[0]
        return loss_of(layer(hidden)[0], slice(None))[0]

    return lambda: _forward_and_backward(loss, [hidden, layer.weight])


def _divergences(problem: Problem, *of_rows: Tensor) -> tuple[Tensor, Tensor]:
    return mixture_divergences(
        *of_rows,
        vocab_size=problem.vocab_size,
        mask_token_id=problem.mask_token_id,
        tp_group=None,
    )


def _forward_and_backward(loss: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    value = loss()
    torch.autograd.grad(value, leaves)
    return float(value.detach())


def materialised(
    logits: Tensor, tokens: Tensor, targets: Tensor, log_snr: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """KL and D_IS as they are written down; the mask is the last id."""
    vocab_size = logits.shape[1]
    alpha = torch.sigmoid(log_snr).float()[:, None]
    is_mask = nn.functional.one_hot(torch.tensor(vocab_size - 1), vocab_size).float()
    uniform = (1 - is_mask) / (vocab_size - 1)
    prior = share.float()[:, None] * uniform + (1 - share.float()[:, None]) * is_mask
    probabilities = (logits - 1e6 * is_mask).softmax(dim=1)
    truth = alpha * nn.functional.one_hot(targets, vocab_size) + (1 - alpha) * prior
    model = alpha * probabilities + (1 - alpha) * prior
    tiny = torch.finfo(torch.float32).tiny
    kl = (truth * (truth.clamp(min=tiny).log() - model.clamp(min=tiny).log())).sum(dim=1)
    at_token = tokens[:, None]
    ratio = truth.gather(1, at_token)[:, 0] / (model.gather(1, at_token)[:, 0] + 1e-12)
    return kl, ratio - ratio.log() - 1


def _compare(problem: Problem, arguments: argparse.Namespace) -> dict[str, Any]:
    clock = CLOCKS[arguments.clock]
    timings: dict[str, Timings] = {}
    peaks: dict[str, float] = {}
    if "loss" in arguments.part:
        # Contenders of one call must have one loss; cross entropy is timed among its rounds alone.
        steps = _steps(problem, _LOSSES)
        timings |= _interleaved(steps, ("hybrid", "materialised"), arguments.rounds, clock)
        peaks |= {name: _peak_elsewhere(problem, name) for name in _LOSSES}
    if "head" in arguments.part:
        steps = _steps(problem, _HEADS)
        timings |= _interleaved(steps, _HEADS, arguments.rounds, clock)
        peaks |= {name: _peak_elsewhere(problem, name) for name in _HEADS}
    return {
        **asdict(problem),
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "peak_mib": peaks,
    }


def _interleaved(
    steps: Mapping[str, Callable[[], float]],
    same_loss: tuple[str, ...],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Timings]:
    """All steps in turn; those of `same_loss` must agree."""
    reference = steps[same_loss[0]]()
    others = [name for name in steps if name not in same_loss]
    offset = {name: reference - steps[name]() for name in others}

    def shifted(name: str) -> Callable[[], float]:
        return lambda: steps[name]() + offset.get(name, 0.0)

    return interleave({name: shifted(name) for name in steps}, rounds, clock=clock)


def _peak(problem: Problem, name: str) -> float:
    """MiB that one forward and backward pass adds to this process, with its logits (Linux)."""
    prepared = _steps(problem, (name,)) if name in _HEADS else None
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    [step] = (prepared or _steps(problem, (name,))).values()
    step()
    return _resident_mib("VmHWM") - before


def _peak_elsewhere(problem: Problem, name: str) -> float:
    options = {
        "--peak-of": name,
        "--vocab-size": problem.vocab_size,
        "--tokens": problem.num_tokens,
        "--hidden-size": problem.hidden_size,
        "--chunk-rows": problem.chunk_rows,
    }
    flags = [str(part) for option in options.items() for part in option]
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kib) * 1024 / _MIB


def _summary(result: Mapping[str, Any]) -> str:
    seconds = {name: Timings(values, []) for name, values in result["seconds"].items()}
    lines = [f"vocabulary {result['vocab_size']}, {result['num_tokens']} tokens"]
    pairs = [
        ("materialised", "hybrid"),
        ("hybrid", "cross_entropy"),
        ("masked", "cross_entropy"),
        ("chunked", "whole"),
    ]
    for name, timing in seconds.items():
        speed = timing.tokens_per_second(result["num_tokens"])
        lines.append(f"  {name}: {speed:.0f} tokens/s, peak {result['peak_mib'][name]:.0f} MiB")
    for one, other in pairs:
        if one in seconds:
            time = spread(seconds[other].speed_relative_to(seconds[one]))
            memory = result["peak_mib"][one] / result["peak_mib"][other]
            lines.append(f"  {one} / {other}: time {time}, peak {memory:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
