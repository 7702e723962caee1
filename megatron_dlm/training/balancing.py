"""Keeps the weight of the balancing losses of MoE layers what the config says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron_dlm.models.moe_routers import routers_of
from megatron_dlm.objectives.base import Objective
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.runtime.parallel import ParallelContext


@torch.no_grad()
def weigh_balancing_losses(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[TokenBatch],
    objective: Objective,
    *,
    seed: int,
    stream: Stream,
    parallel: ParallelContext,
) -> None:
    """Tell the routers which share of the slots of this global batch is counted.

    Routers sum their losses over all slots, and the step then divides all gradients by the counted
    ones: twice too few in block diffusion, whose slots are noisy and clean, fewer than all where
    prompts, filler or unmasked tokens do not count. Call before the micro-batches of a training
    step on every rank; a dense model costs nothing, others the noise once more and an all-reduce.
    """
    routers = routers_of(chunks)
    if not routers:
        return
    device = next(chunks[0].parameters()).device
    slots = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in micro_batches:
        counted = objective.prepare(batch.to(device), seed, stream).counted
        slots += torch.stack([counted.sum(), torch.tensor(counted.numel(), device=device)])
    dist.all_reduce(slots, group=parallel.data.group)
    share = (slots[0] / slots[1]).float()
    for router in routers:
        router.balancing_scale = share
