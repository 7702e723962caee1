"""Random state of dropout: a pure function of (seed, step), so nothing of it is checkpointed."""

from __future__ import annotations

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dlm.runtime.parallel import ParallelContext

# Tracker seeds are base + small rank offsets (at most a few thousand); steps must not overlap them.
_SEED_STRIDE = 1_000_003
_SEED_RANGE = 2**31 - 100_000


def seed_dropout(seed: int, step: int, parallel: ParallelContext) -> None:
    """Seed the dropout generators of this rank for one step.

    Tensor-parallel ranks share the mask of replicated activations and differ on split ones;
    pipeline stages, context- and data-parallel ranks always differ.
    """
    place = parallel.pipeline.rank * parallel.context.size + parallel.context.rank
    place = place * parallel.data.size + parallel.data.rank
    base = (seed * _SEED_STRIDE + step) * _SEED_STRIDE + place * 10_007
    model_parallel_cuda_manual_seed(base % _SEED_RANGE)
