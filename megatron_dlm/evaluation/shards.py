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
from megatron_dlm.evaluation.estimates import stratified_levels, stratified_standard_error
from megatron_dlm.evaluation.hybrid_bound import HybridBound
from megatron_dlm.evaluation.likelihood import bound_of, check_objective
from megatron_dlm.evaluation.mask_bound import MaskBound, draw_sets
from megatron_dlm.evaluation.reading import Row, open_reader, read_rows
from megatron_dlm.hf.load import LoadedModel
from megatron_dlm.ops.counter_rng import Purpose, Stream, host_uniform

NUM_LEVELS = 20
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class LevelPoint:
    """The windows of one stretch of noise levels, for models whose noise is masks."""

    level: float
    """Mean share of masked tokens."""
    nats_per_masked_token: float
    standard_error: float
    """NaN where there is one draw."""
    num_draws: int


@dataclass(frozen=True)
class LogSNRPoint:
    """The windows of one stretch of log-SNRs, for hybrid models."""

    log_snr: float
    """Mean."""
    nats_per_token_and_log_snr: float
    """Density of the bound: its integral over the log-SNR is the bound."""
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
    levels: list[LevelPoint] | list[LogSNRPoint]
    """Loss against the noise level; empty for nll."""


@dataclass(frozen=True)
class _Part:
    """One draw of one window."""

    window: int
    draw: int
    row: Row
    weights: Tensor
    """float64 [] or [n]: factors of the numbers read at the slots."""
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
    """NLL (autoregressive, blocks of one token) or NELBO of the first `limit` windows, or of all.

    The windows are cut as training's validation cuts them for this model, in the same order: of a
    run they follow its configuration, otherwise the defaults. Noise: `num_samples` draws for every
    window, whose levels spread evenly over the windows too. `watch` is called with the number of
    windows done and of all. Raises ValueError where model and dataset do not fit.
    """
    check_objective(model)
    settings = _settings(model)
    corpus = open_corpus({prefix: 1.0}, settings)
    corpus.prepare()
    num_windows = corpus.num_windows if limit is None else min(limit, corpus.num_windows)
    drawing = _Drawing(model, 1 if is_exact(model) else num_samples, seed)
    tally = _Tally(num_windows, drawing, _byte_table(model))
    asked: deque[tuple[_Part, Tensor]] = deque()

    def rows() -> Iterator[Row]:
        for window in range(num_windows):
            for part in _parts(drawing, corpus, tally, window):
                for row, weights in _rows_of(part):
                    asked.append((part, weights))
                    yield row
            if watch is not None:
                watch(window + 1, num_windows)

    measure = drawing.bound if isinstance(drawing.bound, HybridBound) else None
    for _, said in read_rows(open_reader(model, measure), rows(), batch_size):
        part, weights = asked.popleft()
        tally.loss[part.window, part.draw] -= float((said.log_probs * weights).sum())
    return tally.result(prefix, "nll" if is_exact(model) else "nelbo", seed, settings)


def is_exact(model: LoadedModel) -> bool:
    """Whether the loss is the likelihood itself: nothing is drawn."""
    objective = model.objective
    is_chain = objective.kind == "block" and objective.block_size == 1
    return objective.kind == "autoregressive" or is_chain


class _Drawing:
    """The noisy inputs of a window."""

    def __init__(self, model: LoadedModel, num_samples: int, seed: int) -> None:
        is_diffusion = model.objective_kind != "autoregressive"
        self.bound = bound_of(model) if is_diffusion else None
        self.num_samples, self._seed = num_samples, seed
        self._start = host_uniform(seed, Stream.LIKELIHOOD, Purpose.NOISE_LEVEL, 0)

    @property
    def level_range(self) -> tuple[float, float]:
        """Between which noise levels are drawn."""
        if not isinstance(self.bound, HybridBound):
            return 0.0, 1.0
        ends = self.bound.path.at(torch.tensor([1.0, 0.0], dtype=torch.float64)).log_snr
        return float(ends[0]), float(ends[1])

    def draws(
        self, window: int, text: Tensor, is_text: Tensor
    ) -> Iterator[tuple[Row, Tensor, float, float]]:
        """Of text (int64 [S]), scored where is_text (bool [S]): row, weights of its slots, noise
        level and its density."""
        key, offset = torch.tensor(window), (self._start + window * _GOLDEN_RATIO) % 1.0
        if isinstance(self.bound, MaskBound):
            sets = draw_sets(
                key,
                is_text,
                num_samples=self.num_samples,
                seed=self._seed,
                offset=offset,
                block_size=self.bound.block_size,
            )
            for masked, weights, level in zip(*sets, strict=True):
                yield self.bound.row(text, masked), weights[masked], float(level), 1.0
            return
        assert self.bound is not None
        levels = self.bound.path.at(
            stratified_levels(key, num_samples=self.num_samples, seed=self._seed, offset=offset)
        )
        noisy = self.bound.noised(text, is_text, levels, key, self._seed)
        for tokens, log_snr, density in zip(
            noisy, levels.log_snr.tolist(), levels.density, strict=True
        ):
            row = self.bound.row(tokens, text, is_text, log_snr)
            yield row._replace(num_context=0), 1.0 / density, log_snr, float(density)


def _settings(model: LoadedModel) -> CorpusSettings:
    trained = model.facts.get("manifest", {}).get("config", {}).get("data", {})
    names = ("packing", "reset_attention_mask", "seed")
    data = DataConfig(**{name: trained[name] for name in names if name in trained})
    return CorpusSettings(
        seq_length=model.max_length,
        seed=data.seed,
        vocab_size=model.model.config.vocab_size,
        mask_token_id=None if model.objective_kind == "autoregressive" else model.mask_token_id,
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


def _parts(drawing: _Drawing, corpus: Corpus, tally: _Tally, window: int) -> Iterator[_Part]:
    """The draws of a window, also noted in the tally."""
    batch = read_micro_batch(corpus, window, 1)
    tokens, is_text = batch.tokens[0], batch.valid[0]
    document = None if batch.input_document is None else batch.input_document[0]
    if drawing.bound is None:
        tally.open_window(window, tokens[1:][is_text[1:]])
        slots = is_text[1:].nonzero()[:, 0]
        row = Row(tokens[:-1], slots, tokens[1:][slots])
        yield _Part(window, 0, row, torch.ones(1, dtype=torch.float64), document)
        return
    text, is_text = tokens[:-1], is_text[:-1]
    tally.open_window(window, text[is_text])
    if not bool(is_text.any()):
        return
    draws = drawing.draws(window, text, is_text)
    for draw, (row, weights, level, density) in enumerate(draws):
        tally.levels[window, draw], tally.densities[window, draw] = level, density
        yield _Part(window, draw, row, weights, document)


def _rows_of(part: _Part) -> Iterator[tuple[Row, Tensor]]:
    """The whole window, or each of its documents by itself, and the weights of its slots; those
    without a scored slot are left out."""
    row, length = part.row, len(part.row.tokens)
    if part.document is None:
        bounds = [0, length]
    else:
        bounds = [0, *(part.document.diff().nonzero()[:, 0] + 1).tolist(), length]
    weights = part.weights.expand(len(row.slots))
    for start, stop in pairwise(bounds):
        inside = (row.slots >= start) & (row.slots < stop)
        if bool(inside.any()):
            own = row._replace(
                tokens=row.tokens[start:stop],
                slots=row.slots[inside] - start,
                targets=row.targets[inside],
                clean=None if row.clean is None else row.clean[start:stop],
            )
            yield own, weights[inside]


class _Tally:
    """Sums over every window and draw; float64 [W, N] each."""

    def __init__(self, num_windows: int, drawing: _Drawing, byte_table: np.ndarray | None) -> None:
        self._drawing = drawing
        shape = (num_windows, drawing.num_samples)
        self.loss = np.zeros(shape)
        """Estimates of the window's loss, nats."""
        self.levels, self.densities = np.zeros(shape), np.ones(shape)
        """Noise levels, and the density of the law that they are drawn from."""
        self._num_tokens = np.zeros(num_windows, dtype=np.int64)
        self._num_bytes = np.zeros(num_windows, dtype=np.int64)
        self._byte_table = byte_table

    def open_window(self, window: int, targets: Tensor) -> None:
        """Count the tokens that the window scores: int64 [l]."""
        self._num_tokens[window] = len(targets)
        if self._byte_table is not None:
            self._num_bytes[window] = self._byte_table[targets.numpy()].sum()

    def result(self, prefix: str, metric: str, seed: int, settings: CorpusSettings) -> ShardScore:
        sums = self.loss.mean(1)
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
            noise_standard_error=0.0 if is_exact else _noise_error(self.loss) / num_tokens,
            perplexity=math.exp(min(nats, 700.0)),
            bits_per_byte=bits,
            bits_per_byte_standard_error=bits_error,
            num_windows=len(sums),
            num_tokens=num_tokens,
            num_bytes=num_bytes if self._byte_table is not None else None,
            num_samples=self._drawing.num_samples,
            seed=seed,
            seq_length=settings.seq_length,
            packing=settings.packing,
            levels=[] if is_exact else self._level_points(),
        )

    def _level_points(self) -> list[LevelPoint] | list[LogSNRPoint]:
        """The mean over equally wide stretches of levels, times their range, is the bound."""
        sizes = np.repeat(self._num_tokens[:, None], self.loss.shape[1], axis=1)
        low, high = self._drawing.level_range
        stretch = np.ceil((self.levels - low) / (high - low) * NUM_LEVELS).astype(np.int64)
        found = []
        for number in range(1, NUM_LEVELS + 1):  # of levels above the lowest
            chosen = (stretch == number) & (sizes > 0)
            if chosen.any():
                loss, counts = (self.loss * self.densities)[chosen], sizes[chosen]
                error = ratio_standard_error(loss, counts)
                mean = float(loss.sum() / counts.sum())
                found.append((float(self.levels[chosen].mean()), mean, error, int(chosen.sum())))
        if isinstance(self._drawing.bound, HybridBound):
            return [LogSNRPoint(*point) for point in found]
        return [LevelPoint(*point) for point in found]


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
