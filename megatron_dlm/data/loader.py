"""From a step number to the micro-batches of one data rank, read ahead by one thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.prefetch import prefetch
from megatron_dlm.ops.batch import TokenBatch

_PREFETCHED_STEPS = 3


def batches(
    corpus: Corpus,
    *,
    start_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> Iterator[list[TokenBatch]]:
    """The micro-batches of steps [start_step, start_step + num_steps), one list for each step.

    One thread reads a few steps ahead. Closing or dropping the iterator stops it; an error in it is
    raised here, at the step that it belongs to.
    """
    samples_at_once = micro_batch_size * data_size
    assert global_batch_size % samples_at_once == 0, (global_batch_size, samples_at_once)
    assert 0 <= data_rank < data_size, (data_rank, data_size)

    def read_step(step: int) -> list[TokenBatch]:
        first = step * global_batch_size + data_rank * micro_batch_size
        return [
            read_micro_batch(corpus, first + offset, micro_batch_size)
            for offset in range(0, global_batch_size, samples_at_once)
        ]

    return prefetch(read_step, range(start_step, start_step + num_steps), depth=_PREFETCHED_STEPS)


def read_micro_batch(corpus: Corpus, first: int, count: int) -> TokenBatch:
    """Samples [first, first + count) of the order."""
    samples = [corpus.sample(index) for index in range(first, first + count)]
    documents = [sample.document for sample in samples if sample.document is not None]
    assert len(documents) in (0, count), "all tiers keep to documents, or none does"
    return TokenBatch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        valid=torch.from_numpy(np.stack([sample.valid for sample in samples])),
        sample_index=torch.arange(first, first + count),
        document=torch.from_numpy(np.stack(documents)) if documents else None,
    )
