"""From a sample number to tokens, and from a step number to the micro-batches of one data rank.

Sample i of the training order is a pure function of (shards, weights, budget, sequence length,
seed, i): every rank reads its own samples from the mmap, and a restart needs only the step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from megatron_dlm.data.blend import Blend
from megatron_dlm.data.budget import Windows, split_budget
from megatron_dlm.data.corpus import TokenStream
from megatron_dlm.data.order import derive_key, permute
from megatron_dlm.data.prefetch import prefetch
from megatron_dlm.data.shards import Shard
from megatron_dlm.ops.batch import TokenBatch

# What a derived key is for.
_DOCUMENT_ORDER, _WINDOW_ORDER = 1, 2
_PREFETCHED_STEPS = 3


@dataclass(frozen=True)
class _Dataset:
    """The unique tokens of one shard, cut into windows."""

    stream: TokenStream
    windows: Windows


class Corpus:
    """All datasets of a blend; made by `open_corpus`."""

    def __init__(
        self,
        datasets: list[_Dataset],
        blend: Blend,
        *,
        seed: int,
        vocab_size: int,
        mask_token_id: int | None,
        digest: str,
    ) -> None:
        self._datasets, self._blend, self._seed = datasets, blend, seed
        self._vocab_size, self._mask_token_id = vocab_size, mask_token_id
        self.seq_length = datasets[0].windows.seq_length
        self.unique_tokens = sum(dataset.windows.num_tokens for dataset in datasets)
        """Different tokens that training sees, over all datasets."""
        self.num_windows = sum(dataset.windows.num_windows for dataset in datasets)
        """Samples in one epoch."""
        self.digest = digest
        """Identifies shards and their text, weights, budget, sequence length and seed; no paths."""

    def locate(self, index: int) -> tuple[int, int, int]:
        """Sample number -> (dataset, epoch of that dataset, window)."""
        place, pick = self._blend.locate(index)
        size = self._datasets[place].windows.num_windows
        epoch, step = divmod(pick, size)
        key = derive_key(self._seed, _WINDOW_ORDER, place, epoch)
        return place, epoch, permute(step, size=size, key=key)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 [S+1], valid bool [S+1]) of one sample; see `Windows` for what is valid."""
        place, _, window = self.locate(index)
        stream, windows = self._datasets[place].stream, self._datasets[place].windows
        start = windows.start(window)
        length = min(self.seq_length + 1, windows.num_tokens - start)
        tokens = stream.read(start, length)
        self._check_ids(tokens, stream.shard)
        if length <= self.seq_length:  # nothing follows the stream: the filler is never scored
            tokens = np.append(tokens, tokens[-1])
        return tokens, windows.valid(window)

    def _check_ids(self, tokens: np.ndarray, shard: Shard) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"shard {shard.prefix} holds token id {low if low < 0 else high}, outside the "
                f"vocabulary of {self._vocab_size} (model.vocab_size); train with the tokenizer "
                "that made the shard"
            )
        if self._mask_token_id is not None and (tokens == self._mask_token_id).any():
            raise ValueError(
                f"shard {shard.prefix} holds token id {self._mask_token_id}, the mask id "
                "(objective.mask_token_id); reserve an id for the mask that the text does not use"
            )


def open_corpus(
    prefixes: Mapping[str, float],
    *,
    seq_length: int,
    seed: int,
    vocab_size: int,
    mask_token_id: int | None,
    unique_tokens: int | None = None,
    tokenizer_sha256: str | None = None,
) -> Corpus:
    """Open the shards of a blend (path prefix -> weight) and check that they fit the run.

    With `unique_tokens` the weights split the budget, each dataset gives exactly its part, and one
    epoch passes each of them once. Without, every dataset is whole and the weights set how often
    each is drawn.
    """
    if not prefixes:
        raise ValueError("no shards are given; list path prefixes and weights under data.train")
    shards = [Shard(prefix) for prefix in prefixes]
    for shard in shards:
        _check_manifest(
            shard,
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            tokenizer_sha256=tokenizer_sha256,
        )
    weights = list(prefixes.values())
    sizes = _dataset_sizes(shards, weights, unique_tokens)
    datasets = []
    for place, (shard, num_tokens) in enumerate(zip(shards, sizes, strict=True)):
        if num_tokens < seq_length + 1:
            raise ValueError(
                f"sequence longer than the document set: {shard.prefix} gives {num_tokens} tokens, "
                f"model.seq_length {seq_length} needs at least {seq_length + 1}; shorten the "
                "sequence or give more text"
            )
        key = derive_key(seed, _DOCUMENT_ORDER, place)
        stream = TokenStream(shard, num_tokens=num_tokens, key=key)
        datasets.append(_Dataset(stream, Windows(num_tokens, seq_length)))
    facts = {
        "shards": [
            [os.path.basename(s.prefix), s.num_tokens, s.num_documents, s.fingerprint()]
            for s in shards
        ],
        "weights": weights,
        "seed": seed,
        "unique_tokens": unique_tokens,
        "seq_length": seq_length,
    }
    if unique_tokens is not None:
        weights = [dataset.windows.num_windows for dataset in datasets]
    return Corpus(
        datasets,
        Blend.of(weights),
        seed=seed,
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        digest=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
    )


def _dataset_sizes(
    shards: list[Shard], weights: list[float], unique_tokens: int | None
) -> list[int]:
    """Unique tokens that each shard gives."""
    if unique_tokens is None:
        return [shard.num_tokens for shard in shards]
    parts = split_budget(unique_tokens, weights)
    for shard, part in zip(shards, parts, strict=True):
        if part > shard.num_tokens:
            share = "" if len(shards) == 1 else f", of which {part} from this shard by its weight"
            raise ValueError(
                f"data.unique_tokens asks for {unique_tokens} tokens{share}, but {shard.prefix} "
                f"holds {shard.num_tokens}; lower data.unique_tokens or give more text"
            )
    return parts


def _check_manifest(
    shard: Shard, *, vocab_size: int, mask_token_id: int | None, tokenizer_sha256: str | None
) -> None:
    """Refuse a shard of another tokenizer before any token is read; no manifest, no opinion."""
    manifest = shard.manifest
    if manifest is None:
        return
    theirs = manifest.tokenizer_sha256
    if tokenizer_sha256 is not None and theirs is not None and theirs != tokenizer_sha256:
        raise ValueError(
            f"shard {shard.prefix} was made by the tokenizer with sha256 {theirs}, data.tokenizer "
            f"has {tokenizer_sha256}; preprocess the text again or name the shard's tokenizer"
        )
    if manifest.vocab_size > vocab_size:
        raise ValueError(
            f"shard {shard.prefix} has a vocabulary of {manifest.vocab_size}, the model one of "
            f"{vocab_size}; raise model.vocab_size or preprocess with a smaller tokenizer"
        )
    if (
        mask_token_id is not None
        and mask_token_id != manifest.mask_id
        and mask_token_id <= manifest.max_token_id
    ):
        raise ValueError(
            f"objective.mask_token_id {mask_token_id} may occur in the text of shard "
            f"{shard.prefix} (reserved mask id {manifest.mask_id}, largest id "
            f"{manifest.max_token_id}); use the reserved id or one above the largest"
        )


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
    return TokenBatch(
        tokens=torch.from_numpy(np.stack([tokens for tokens, _ in samples])),
        valid=torch.from_numpy(np.stack([valid for _, valid in samples])),
        sample_index=torch.arange(first, first + count),
    )
