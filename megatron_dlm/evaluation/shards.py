"""Loss of a model on shards: the windows of training's validation, scored once or several times.

Shapes: S sequence length, W windows, N draws of noise per window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.config.schema import DataConfig
from megatron_dlm.data.corpus import Corpus
from megatron_dlm.data.loader import read_micro_batch
from megatron_dlm.data.open_corpus import CorpusSettings, open_corpus
from megatron_dlm.evaluation.likelihood import (
    check_objective,
    draw_sets,
    stratified_standard_error,
)
from megatron_dlm.evaluation.reading import Row, open_reader, read_rows
from megatron_dlm.hf.load import LoadedModel
from megatron_dlm.ops.counter_rng import Purpose, Stream, host_uniform

NUM_LEVELS = 20
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class LevelPoint:
    """The windows of one stretch of noise levels."""

    level: float
    """Mean share of masked tokens."""
    nats_per_masked_token: float
    standard_error: float
    """NaN where there is one draw."""
    num_draws: int


@dataclass(frozen=True)
class ShardScore:
    """Loss on one dataset."""

    prefix: str
    metric: str
    """nll, exact; or nelbo, the bound from above."""
    nats_per_token: float
    standard_error: float
    """Over the windows, with what the draws of noise add; NaN for one window. Windows count as
    independent; those of one document are less so."""
    noise_standard_error: float
    """The part of it that more draws would remove; 0 for nll, NaN for one draw per window."""
    perplexity: float
    bits_per_byte: float | None
    """By the bytes that the scored tokens stand for; ids without text add loss but no bytes. None
    without a tokenizer."""
    bits_per_byte_standard_error: float | None
    num_windows: int
    num_tokens: int
    """Scored tokens."""
    num_bytes: int | None
    num_samples: int
    """Draws of noise per window."""
    seed: int
    seq_length: int
    packing: str
    levels: list[LevelPoint]
    """Loss against the noise level; empty for nll."""


@dataclass(frozen=True)
class _Part:
    """One draw of one window: what is read, what is predicted, and what it weighs."""

    window: int
    draw: int
    inputs: Tensor
    """int64 [S]"""
    targets: Tensor
    """int64 [S]"""
    is_scored: Tensor
    """bool [S]: slots whose prediction counts."""
    document: Tensor | None
    """int64 [S]: attention stays inside; None lets it cross."""


def evaluate_shards(
    model: LoadedModel,
    prefix: str,
    *,
    limit: int | None = None,
    num_samples: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    watch: Callable[[int, int], None] | None = None,
) -> ShardScore:
    """NLL (autoregressive) or NELBO (masked) of the first `limit` windows of a dataset, or of all.

    The windows are cut as training's validation cuts them for this model, in the same order: of a
    run they follow its configuration, otherwise the defaults. Noise: `draw_sets` for every window,
    whose offsets spread evenly over the windows too. `watch` is called with the number of windows
    done and of all. Raises ValueError where model and dataset do not fit.
    """
    check_objective(model)
    settings = _settings(model)
    corpus = open_corpus({prefix: 1.0}, settings)
    corpus.prepare()
    num_windows = corpus.num_windows if limit is None else min(limit, corpus.num_windows)
    is_masked = model.objective_kind == "masked"
    tally = _Tally(num_windows, num_samples if is_masked else 1, _byte_table(model))
    asked: deque[_Part] = deque()

    def rows() -> Iterator[Row]:
        for window in range(num_windows):
            for part in _parts(model, corpus, tally, window, seed):
                for row in _rows_of(part):
                    asked.append(part)
                    yield row
            if watch is not None:
                watch(window + 1, num_windows)

    for _, said in read_rows(open_reader(model), rows(), batch_size):
        part = asked.popleft()
        tally.loss[part.window, part.draw] -= float(said.log_probs.sum())
    return tally.result(prefix, "nelbo" if is_masked else "nll", seed, settings)


def _settings(model: LoadedModel) -> CorpusSettings:
    trained = model.facts.get("manifest", {}).get("config", {}).get("data", {})
    names = ("packing", "reset_attention_mask", "seed")
    data = DataConfig(**{name: trained[name] for name in names if name in trained})
    return CorpusSettings(
        seq_length=model.max_length,
        seed=data.seed,
        vocab_size=model.model.config.vocab_size,
        mask_token_id=model.mask_token_id if model.objective_kind == "masked" else None,
        tokenizer_sha256=None if model.tokenizer is None else model.tokenizer.sha256,
        packing=data.packing,
        resets_attention=data.resets_attention,
    )


def _byte_table(model: LoadedModel) -> np.ndarray | None:
    """int64 [V]: bytes of text that every id stands for."""
    if model.tokenizer is None:
        return None
    table = np.zeros(model.model.config.vocab_size, dtype=np.int64)
    sizes = model.tokenizer.token_bytes()
    table[: len(sizes)] = sizes[: len(table)]
    return table


def _parts(
    model: LoadedModel, corpus: Corpus, tally: _Tally, window: int, seed: int
) -> Iterator[_Part]:
    """The draws of a window, also noted in the tally."""
    batch = read_micro_batch(corpus, window, 1)
    tokens, is_text = batch.tokens[0], batch.valid[0]
    document = None if batch.input_document is None else batch.input_document[0]
    if model.objective_kind == "autoregressive":
        tally.open_window(window, tokens[1:][is_text[1:]])
        yield _Part(window, 0, tokens[:-1], tokens[1:], is_text[1:], document)
        return
    targets, is_text = tokens[:-1], is_text[:-1]
    tally.open_window(window, targets[is_text])
    if not bool(is_text.any()):
        return
    start = host_uniform(seed, Stream.LIKELIHOOD, Purpose.NOISE_LEVEL, 0)
    masked, weights, levels = draw_sets(
        torch.tensor(window),
        is_text,
        num_samples=tally.num_samples,
        seed=seed,
        offset=(start + window * _GOLDEN_RATIO) % 1.0,
    )
    tally.weights[window], tally.levels[window] = weights.numpy(), levels.numpy()
    assert model.mask_token_id is not None
    for draw, hidden in enumerate(masked):
        inputs = targets.masked_fill(hidden, model.mask_token_id)
        yield _Part(window, draw, inputs, targets, hidden, document)


def _rows_of(part: _Part) -> Iterator[Row]:
    """The whole window, or each of its documents by itself; those without a scored slot are left
    out."""
    length = len(part.inputs)
    if part.document is None:
        bounds = [0, length]
    else:
        bounds = [0, *(part.document.diff().nonzero()[:, 0] + 1).tolist(), length]
    for start, stop in pairwise(bounds):
        slots = part.is_scored[start:stop].nonzero()[:, 0]
        if len(slots):
            yield Row(part.inputs[start:stop], slots, part.targets[start:stop][slots])


class _Tally:
    """Sums over every window and draw; float64 [W, N] each."""

    def __init__(self, num_windows: int, num_samples: int, byte_table: np.ndarray | None) -> None:
        self.num_samples = num_samples
        shape = (num_windows, num_samples)
        self.loss = np.zeros(shape)
        """Nats of the scored slots."""
        self.weights, self.levels = np.ones(shape), np.zeros(shape)
        self._num_tokens = np.zeros(num_windows, dtype=np.int64)
        self._num_bytes = np.zeros(num_windows, dtype=np.int64)
        self._byte_table = byte_table

    def open_window(self, window: int, targets: Tensor) -> None:
        """Count the tokens that the window scores: int64 [l]."""
        self._num_tokens[window] = len(targets)
        if self._byte_table is not None:
            self._num_bytes[window] = self._byte_table[targets.numpy()].sum()

    def result(self, prefix: str, metric: str, seed: int, settings: CorpusSettings) -> ShardScore:
        estimates = self.loss * self.weights
        sums = estimates.mean(1)
        num_tokens, num_bytes = int(self._num_tokens.sum()), int(self._num_bytes.sum())
        nats = float(sums.sum() / num_tokens)
        has_bytes = self._byte_table is not None and num_bytes > 0
        bits = float(sums.sum() / num_bytes / math.log(2)) if has_bytes else None
        bits_error = (
            ratio_standard_error(sums, self._num_bytes) / math.log(2) if has_bytes else None
        )
        is_exact = metric == "nll"
        return ShardScore(
            prefix=prefix,
            metric=metric,
            nats_per_token=nats,
            standard_error=ratio_standard_error(sums, self._num_tokens),
            noise_standard_error=0.0 if is_exact else _noise_error(estimates) / num_tokens,
            perplexity=math.exp(min(nats, 700.0)),
            bits_per_byte=bits,
            bits_per_byte_standard_error=bits_error,
            num_windows=len(sums),
            num_tokens=num_tokens,
            num_bytes=num_bytes if self._byte_table is not None else None,
            num_samples=self.num_samples,
            seed=seed,
            seq_length=settings.seq_length,
            packing=settings.packing,
            levels=[] if is_exact else self._level_points(estimates),
        )

    def _level_points(self, estimates: np.ndarray) -> list[LevelPoint]:
        """The mean over equally wide stretches of levels, weighed by their draws, is the bound."""
        sizes = np.repeat(self._num_tokens[:, None], self.num_samples, axis=1)
        points = []
        stretch = np.ceil(self.levels * NUM_LEVELS).astype(np.int64)  # of levels above 0, from 1
        for number in range(1, NUM_LEVELS + 1):
            chosen = (stretch == number) & (sizes > 0)
            if chosen.any():
                points.append(
                    LevelPoint(
                        level=float(self.levels[chosen].mean()),
                        nats_per_masked_token=float(estimates[chosen].sum() / sizes[chosen].sum()),
                        standard_error=ratio_standard_error(estimates[chosen], sizes[chosen]),
                        num_draws=int(chosen.sum()),
                    )
                )
        return points


def ratio_standard_error(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of sum(sums) / sum(sizes) over n independent pairs; NaN for n = 1."""
    count, total = len(sums), sizes.sum()
    if count < 2:
        return math.nan
    residuals = sums - sums.sum() / total * sizes
    return math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(total)


def _noise_error(estimates: np.ndarray) -> float:
    """Standard error of the sum over the windows, by the draws of each: [W, N]."""
    errors = [stratified_standard_error(torch.from_numpy(row)) for row in estimates]
    return math.sqrt(sum(error**2 for error in errors))
