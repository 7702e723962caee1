"""Hybrid diffusion: predict the clean tokens behind noise that is part mask, part uniform tokens.

Slot i predicts token i from the text alone: the model is told no noise level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.objectives.base import (
    LossSums,
    loss_and_bound_counts,
    positions,
    slots_like,
    weighted_sums,
)
from megatron_dlm.objectives.draws import TimeSampling, level_draws
from megatron_dlm.objectives.empty_tokens import insert_empty_tokens
from megatron_dlm.objectives.noise import NoiseLevels, NoisePath, TimeNoise
from megatron_dlm.objectives.noise_profile import ProfiledLoss
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Purpose, Stream, random_bits, to_uniform, uniform
from megatron_dlm.ops.mixture_loss import mixture_divergences

HybridWeighting = Literal["elbo", "surrogate", "dynamic"]

_LARGEST_SURROGATE_WEIGHT = 1e3
_LARGEST_ELBO_WEIGHT = 1e6
_LARGEST_DYNAMIC_WEIGHT = 2.0
_INDEPENDENT, _CONTEXT_KIND, _CONTEXT_FRACTION = range(3)  # positions of Purpose.SAMPLE_KIND


@dataclass(frozen=True)
class HybridObjective:
    """The bound of Scaling Behavior of Discrete Diffusion Language Models (Proposition 1).

    A slot with clean token x and noisy token z at log-SNR l costs KL(q(.|x) || q(.|model)) +
    IS(q(z|x) || q(z|model)) nats, q(.|p) = alpha p + (1 - alpha) pi, IS(p || q) = p/q - log(p/q) -
    1, where the model never predicts the mask. `weighting` is its factor:

    elbo       w / p(l), at most 1e6, w = (pi_z - pi'_z) / (pi_z + e^l [z = x]). The bound between
               the ends of the path; what lies beyond them (for known laws 0.02 to 0.1 % of it) is
               not added.
    surrogate  w, at most 1e3: what the paper trains. In the masked case (1 - t) * cross entropy.
    dynamic    2 on masks, 1 on other noise and B/V exp(-l/2), at most 2, on clean tokens: GIDD's.
               In log-SNR the bound weighs a clean token (B/V) exp(-l/2) times a noisy one for small
               B, so l is the log-SNR and the sign is minus.

    Loss and bound are means over the valid slots that are not clean context. Context slots are
    never scored, and no query of one sees a key that is not context: what a model computes for a
    prompt does not depend on the noise behind it. Tokens of the text that are the mask id itself
    are left as they are and not scored. "nelbo" = "kl" + "itakura_saito" is a bound of the text
    where all tokens of a sample share one level, as in validation.

    The best prediction for a slot is the law of its token given all other slots: what its own
    noisy value says is added by q(.|model).
    """

    vocab_size: int
    mask_token_id: int
    path: NoisePath
    batch_size: int
    weighting: HybridWeighting = "elbo"
    time_sampling: TimeSampling = "stratified"
    independent_noise_share: float = 0.0
    prompt_share: float = 0.0
    infilling_share: float = 0.0
    empty_token_share: float = 0.0
    pad_token_id: int | None = None

    metric_names: ClassVar[tuple[str, ...]] = (
        "loss",
        "nelbo",
        "kl",
        "itakura_saito",
        "noised_share",
    )
    profiled: ClassVar[ProfiledLoss] = "nelbo"

    @property
    def attention(self) -> AttentionPattern:
        has_context = self.prompt_share > 0 or self.infilling_share > 0
        return AttentionPattern.ARBITRARY if has_context else AttentionPattern.BIDIRECTIONAL

    def model_length(self, seq_length: int) -> int:
        return seq_length

    def step_length(self, step: int, *, seq_length: int, multiple: int, seed: int) -> int:
        return seq_length

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        """Corrupt the first S tokens; context and invalid slots stay clean, unscored, uncounted."""
        clean, valid = batch.tokens[:, :-1], batch.valid[:, :-1]
        if self.empty_token_share > 0:
            assert self.pad_token_id is not None, "build_objective asks for a pad id"
            clean, valid = insert_empty_tokens(
                batch, seed, stream, largest_share=self.empty_token_share, pad=self.pad_token_id
            )
        context = self._context(batch, seed, stream)
        scored = valid & ~context & (clean != self.mask_token_id)
        levels = self.path.at(self._draws(batch, context, seed, stream))
        tokens = torch.where(scored, self._noised(clean, levels, batch, seed, stream), clean)
        weight = bound_weights(
            levels, tokens, clean, mask_token_id=self.mask_token_id, vocab_size=self.vocab_size
        )
        elbo_weights = (weight / levels.density).clamp(0.0, _LARGEST_ELBO_WEIGHT)
        if self.weighting == "elbo":
            weights = elbo_weights
        elif self.weighting == "surrogate":
            weights = weight.clamp(0.0, _LARGEST_SURROGATE_WEIGHT)
        else:
            weights = self._dynamic_weights(levels, tokens, clean)
        return ModelInputs(
            tokens=tokens,
            position_ids=positions(slots_like(clean), batch.input_document),
            targets=clean,
            weights=torch.where(scored, weights, 0.0).float(),
            elbo_weights=torch.where(scored, elbo_weights, 0.0).float(),
            counted=scored,
            valid=scored,
            noise_level=levels.log_snr.float(),
        )

    def attention_mask(self, batch: TokenBatch, seed: int, stream: Stream) -> Tensor | None:
        """Hides from every context slot all that is not context; None where no sample has any."""
        if self.attention is not AttentionPattern.ARBITRARY:
            return None
        context = self._context(batch, seed, stream)
        return (context[:, :, None] & ~context[:, None, :])[:, None]

    def loss_sums(
        self, logits: Tensor, rows: ModelInputs, tp_group: ProcessGroup | None
    ) -> LossSums:
        """Weighted sum of the two divergences; see `mixture_divergences`."""
        log_snr = rows.noise_level.double()
        uniform_share, _ = self.path.mixing(log_snr)
        divergence, itakura_saito = mixture_divergences(
            logits,
            rows.tokens,
            rows.targets,
            log_snr,
            uniform_share,
            vocab_size=self.vocab_size,
            mask_token_id=self.mask_token_id,
            tp_group=tp_group,
        )
        sums = weighted_sums(divergence + itakura_saito, rows)
        sums.metrics["kl"] = (divergence.detach() * rows.elbo_weights).sum()
        sums.metrics["itakura_saito"] = (itakura_saito.detach() * rows.elbo_weights).sum()
        sums.metrics["noised_share"] = (rows.tokens != rows.targets).sum(dtype=torch.float32)
        return sums

    def counts(self, inputs: ModelInputs) -> dict[str, Tensor]:
        counts = loss_and_bound_counts(inputs)
        return counts | dict.fromkeys(("kl", "itakura_saito", "noised_share"), counts["nelbo"])

    def noised_probability(self, noise_level: Tensor) -> Tensor:
        return torch.sigmoid(-noise_level)

    def _context(self, batch: TokenBatch, seed: int, stream: Stream) -> Tensor:
        length = batch.tokens.shape[1] - 1
        shares = (self.prompt_share, self.infilling_share)
        return _context_slots(batch.sample_index, length, seed, stream, shares=shares)

    def _draws(self, batch: TokenBatch, context: Tensor, seed: int, stream: Stream) -> Tensor:
        """Uniform numbers behind the noise levels, float64 [b, s]; context is at the clean end."""
        draws = level_draws(
            batch.sample_index,
            seed,
            stream,
            batch_size=self.batch_size,
            sampling=self.time_sampling,
        )[:, None].expand(context.shape)
        if self.independent_noise_share > 0:
            index, slots = batch.sample_index[:, None], slots_like(context)[:1]
            position = torch.full_like(index, _INDEPENDENT)
            kind = uniform(seed, stream, Purpose.SAMPLE_KIND, index, position)
            own = uniform(seed, stream, Purpose.TOKEN_NOISE_LEVEL, index, slots).double()
            draws = torch.where(kind < self.independent_noise_share, own, draws)
        return torch.where(context, 0.0, draws)

    def _noised(
        self, clean: Tensor, levels: NoiseLevels, batch: TokenBatch, seed: int, stream: Stream
    ) -> Tensor:
        """int64 [b, s]: every token of `clean`, or its noise."""
        slots = slots_like(clean)[:1]
        bits = {
            purpose: random_bits(seed, stream, purpose, batch.sample_index[:, None], slots)
            for purpose in (Purpose.MASK, Purpose.NOISE_KIND, Purpose.NOISE_TOKEN)
        }
        is_noise = to_uniform(bits[Purpose.MASK]) < torch.sigmoid(-levels.log_snr)
        is_uniform = to_uniform(bits[Purpose.NOISE_KIND]) < levels.uniform_share
        text_id = bits[Purpose.NOISE_TOKEN].remainder(self.vocab_size - 1)
        text_id = text_id + (text_id >= self.mask_token_id)
        noise = torch.where(is_uniform, text_id, self.mask_token_id)
        return torch.where(is_noise, noise, clean)

    def _dynamic_weights(self, levels: NoiseLevels, noisy: Tensor, clean: Tensor) -> Tensor:
        assert isinstance(self.path, TimeNoise), "checked by ObjectiveConfig"
        on_clean = self.path.amplitude / self.vocab_size * torch.exp(-0.5 * levels.log_snr)
        on_noise = torch.where(noisy == self.mask_token_id, 2.0, 1.0).double()
        weights = torch.where(noisy == clean, on_clean, on_noise)
        return weights.clamp(max=_LARGEST_DYNAMIC_WEIGHT)


@lru_cache(maxsize=1)  # the inputs and the mask of a micro-batch ask one after the other
def _context_slots(
    sample_index: Tensor, length: int, seed: int, stream: Stream, *, shares: tuple[float, float]
) -> Tensor:
    """bool [b, s]: the clean prompts, and the clean tokens of samples to be filled in.

    Their fraction is arccos(1 - 2 r) / pi for a uniform r: often nearly none or nearly all. shares:
    of samples with a prompt, and of those to be filled in.
    """
    prompt_share, infilling_share = shares
    index = sample_index[:, None]
    slots = torch.arange(length, device=index.device)[None, :]
    kind, draw = (
        uniform(seed, stream, Purpose.SAMPLE_KIND, index, torch.full_like(index, position))
        for position in (_CONTEXT_KIND, _CONTEXT_FRACTION)
    )
    fraction = torch.arccos(1.0 - 2.0 * draw.double()) / math.pi
    has_prompt = kind < prompt_share
    has_islands = ~has_prompt & (kind < prompt_share + infilling_share)
    islands = uniform(seed, stream, Purpose.INFILLING, index, slots) < fraction
    prompt = slots < (fraction * length).floor()
    return (has_prompt & prompt) | (has_islands & islands)


def bound_weights(
    levels: NoiseLevels, noisy: Tensor, clean: Tensor, *, mask_token_id: int, vocab_size: int
) -> Tensor:
    """w = (pi_z - pi'_z) / (pi_z + e^l [z = x]), float64, of the shape of noisy (z) and clean (x).

    Divided by levels.density it is the weight of the slot in the bound. Not clipped.
    """
    is_mask, num_text_ids = noisy == mask_token_id, vocab_size - 1
    share, slope = levels.uniform_share, levels.uniform_slope
    probability = torch.where(is_mask, 1.0 - share, share / num_text_ids)
    slope = torch.where(is_mask, -slope, slope / num_text_ids)
    signal = torch.where(noisy == clean, torch.exp(levels.log_snr), 0.0)
    return (probability - slope) / (probability + signal)
