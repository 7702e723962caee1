"""Loss on held-out windows: the same windows with the same noise at every validation."""

from __future__ import annotations

from dataclasses import replace

from megatron_dlm.config.derive import data_parallel_size
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.loader import read_micro_batch
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.training.optimizer import parameters_gathered
from megatron_dlm.training.step import Pass, run_micro_batches


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


def validate(setup: Pass, micro_batches: list[TokenBatch]) -> dict[str, float]:
    """Mean of every metric over the validation windows, the same on all ranks."""
    with parameters_gathered(setup.chunks):
        for chunk in setup.chunks:
            chunk.eval()
        run_micro_batches(setup, micro_batches, forward_only=True)
        for chunk in setup.chunks:
            chunk.train()
    return setup.metrics.reduce()
