"""Loss on held-out windows: the same windows with the same noise at every validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_dlm.config.derive import data_parallel_size
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.loader import read_micro_batch
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.training.optimizer import parameters_gathered
from megatron_dlm.training.step import Pass, run_micro_batches

_PIECE_PER_STAGE = 8


def num_validation_samples(config: RunConfig, corpus: Corpus) -> int:
    """validation.num_samples, or every window of the corpus if it has fewer."""
    return min(config.validation.num_samples, corpus.num_windows)


def validation_micro_batches(
    config: RunConfig, corpus: Corpus, parallel: ParallelContext
) -> list[TokenBatch]:
    """This rank's share of the validation windows.

    Whole micro-batches need filler rows on some layouts; they are marked invalid, so that exactly
    the same tokens are scored on every layout.
    """
    num_samples = num_validation_samples(config, corpus)
    micro = config.train.micro_batch_size
    # The interleaved schedule wants a multiple of the pipeline size.
    multiple = parallel.pipeline.size if parallel.virtual_pipeline_size else 1
    unit = micro * data_parallel_size(config, parallel.world_size) * multiple
    num_rows = -(-num_samples // unit) * unit
    per_rank = num_rows // parallel.data.size
    first = parallel.data.rank * per_rank
    return [
        _micro_batch(corpus, start, micro, num_samples)
        for start in range(first, first + per_rank, micro)
    ]


def _micro_batch(corpus: Corpus, first: int, count: int, num_samples: int) -> TokenBatch:
    batch = read_micro_batch(corpus, first, count)
    is_scored = batch.sample_index < num_samples
    return replace(batch, valid=batch.valid & is_scored[:, None])


def _never() -> bool:
    return False


def validate(
    setup: Pass, micro_batches: list[TokenBatch], *, is_stopped: Callable[[], bool] = _never
) -> dict[str, float] | None:
    """Mean of every metric over the validation windows, the same on all ranks. Collective.

    `is_stopped` is asked again and again and gives the same answer on all ranks; once it is true
    the rest is left out, and the answer is None.
    """
    # A pipeline runs empty after every piece, so its pieces are longer.
    stages = setup.parallel.pipeline.size
    length = 1 if stages == 1 else _PIECE_PER_STAGE * stages
    is_cut_short = False
    with parameters_gathered(setup.chunks):
        for chunk in setup.chunks:
            chunk.eval()
        for first in range(0, len(micro_batches), length):
            is_cut_short = first > 0 and is_stopped()
            if is_cut_short:
                break
            run_micro_batches(setup, micro_batches[first : first + length], forward_only=True)
        for chunk in setup.chunks:
            chunk.train()
    losses = setup.metrics.reduce()
    return None if is_cut_short else losses
